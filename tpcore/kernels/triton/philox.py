"""Dropout bits inside kernels: the same as `tpcore._native.dropout_keep_mask`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(seed, row_ids, column_group, head_and_stream, threshold, GROUPS: tl.constexpr):
    """Which elements of a tile a dropout keeps: bool [ROWS, 4 * GROUPS].

    Philox4x32-10 with key `seed` and counter (column_group, row_id low, row_id high, head << 16 |
    stream) gives the words of four neighbouring columns, so each is drawn once for four elements.

    Args:
        seed: pointer to the int64 seed.
        row_ids: int64 [ROWS, 1].
        column_group: global number of the tile's first column, divided by 4.
        head_and_stream: head << 16 | stream.
        threshold: an element is kept if its word is at least this.
        GROUPS: columns of the tile, divided by 4.
    """
    groups = (column_group + tl.arange(0, GROUPS)[None, :]).to(tl.uint32)
    low, high = row_ids.to(tl.uint32), (row_ids >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed), groups, low, high, head_and_stream.to(tl.uint32), n_rounds=10
    )
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return words >= threshold.to(tl.uint32)
