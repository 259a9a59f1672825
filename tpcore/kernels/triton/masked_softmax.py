"""Scale, mask, softmax and dropout in Triton; formulas in `tpcore.kernels.masked_softmax`.

Bytes per score of s bytes: forward 2s (scores, y; 3s where dropout needs the probabilities saved),
backward 3s (grad_y, probabilities, grad_scores); a mask is read once per head. Under causal the
scores of later keys are not read. Rows too long for one tile are read twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tpcore._philox import dropout_threshold
from tpcore.kernels.triton.philox import kept
from tpcore.kernels.triton.rows import load_per_row, row_max, row_sum, rows_of
from tpcore.kernels.triton.tiles import Tile, launching_on, tile_for

_NOT_SPECIALIZED = ["heads", "queries", "threshold", "stream", "head_offset"]


@triton.jit
def _place(heads, queries, ROWS: tl.constexpr):
    """Batch and head of this program, and its queries [ROWS, 1]: a tile stays in one head."""
    query_blocks = tl.cdiv(queries, ROWS)
    pair = tl.program_id(0) // query_blocks
    rows = rows_of(tl.program_id(0) % query_blocks, ROWS)
    return (pair // heads).to(tl.int64), (pair % heads).to(tl.int64), rows


@triton.jit
def _dropped(p, row_ids, start, seed, threshold, head_and_stream, keep_scale, BLOCK: tl.constexpr):
    keep = kept(seed, row_ids, start // 4, head_and_stream, threshold, BLOCK // 4)
    return tl.where(keep, p * keep_scale, 0.0)


@triton.jit
def _scores(
    score_rows, mask_rows, mask_stride, keys, inside, last_key, scale, CAUSAL: tl.constexpr
):
    """Scaled scores, -infinity where a key is not seen; and where keys are seen."""
    seen, near = inside, inside
    if CAUSAL:
        seen &= keys <= last_key
        near &= keys // 16 <= last_key // 16  # in steps that keep the loads wide
    z = tl.load(score_rows + keys, mask=near, other=0.0).to(tl.float32) * scale
    if mask_rows is not None:
        seen &= tl.load(mask_rows + keys * mask_stride, mask=inside, other=1) == 0
    return tl.where(seen, z, float("-inf")), seen


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _forward_kernel(
    scores,
    mask,
    y,
    probs,
    heads,
    queries,
    num_keys,
    scale,
    score_batch_stride,
    score_head_stride,
    score_row_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_stride,
    seed,
    row_ids,
    threshold,
    stream,
    head_offset,
    keep_scale,
    CAUSAL: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch, head, rows = _place(heads, queries, ROWS)
    in_rows = rows < queries
    last_key = (rows + (num_keys - queries)).to(tl.int32)
    score_rows = scores + batch * score_batch_stride + head * score_head_stride
    score_rows += rows * score_row_stride
    mask_rows = mask
    if mask is not None:
        mask_rows += batch * mask_batch_stride + head * mask_head_stride
        if MASK_PER_QUERY:
            mask_rows += rows * mask_row_stride
    at = ((batch * heads + head) * queries + rows) * num_keys
    ids = None
    if seed is not None:
        ids = load_per_row(row_ids + batch * queries, rows, in_rows, 0, ROWS)
    head_and_stream = ((head + head_offset) << 16) | stream

    if WHOLE:
        keys = tl.arange(0, BLOCK)[None, :]
        inside = in_rows & (keys < num_keys)
        z, seen = _scores(score_rows, mask_rows, mask_stride, keys, inside, last_key, scale, CAUSAL)
        e = tl.where(seen, tl.exp(z - row_max(z)), 0.0)
        # 0 only if no key is seen: the largest score adds 1, or makes it NaN.
        total = row_sum(e)
        p = e / tl.where(total == 0.0, 1.0, total)
        if seed is not None:
            tl.store(probs + at + keys, p, mask=inside)
            p = _dropped(p, ids, 0, seed, threshold, head_and_stream, keep_scale, BLOCK)
        tl.store(y + at + keys, p, mask=inside)
    else:
        # One row. Its maximum may be -infinity with a key seen (then it is NaN, as in PyTorch) or
        # without one (then it is 0): so `found` is kept.
        tl.static_assert(ROWS == 1)
        top = float("-inf")
        found = 0.0
        total = tl.zeros([1, BLOCK], tl.float32)
        end = tl.minimum(num_keys, last_key + 1) if CAUSAL else num_keys
        for start in range(0, end, BLOCK):
            keys = start + tl.arange(0, BLOCK)[None, :]
            inside = in_rows & (keys < num_keys)
            z, seen = _scores(
                score_rows, mask_rows, mask_stride, keys, inside, last_key, scale, CAUSAL
            )
            new = tl.maximum(top, row_max(z))
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(top - shift) + tl.exp(z - shift)
            found = tl.maximum(found, row_max(tl.where(seen, 1.0, 0.0)))
            top = new
        shift = tl.where(top == float("-inf"), 0.0, top)
        inverse = tl.where(found > 0, 1.0 / row_sum(total), 0.0)
        for start in range(0, num_keys, BLOCK):
            keys = start + tl.arange(0, BLOCK)[None, :]
            inside = in_rows & (keys < num_keys)
            z, _ = _scores(
                score_rows, mask_rows, mask_stride, keys, inside, last_key, scale, CAUSAL
            )
            p = tl.exp(z - shift) * inverse
            if seed is not None:
                tl.store(probs + at + keys, p, mask=inside)
                p = _dropped(p, ids, start, seed, threshold, head_and_stream, keep_scale, BLOCK)
            tl.store(y + at + keys, p, mask=inside)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _backward_kernel(
    grad_y,
    probs,
    grad_scores,
    heads,
    queries,
    num_keys,
    scale,
    grad_batch_stride,
    grad_head_stride,
    grad_row_stride,
    probs_batch_stride,
    probs_head_stride,
    probs_row_stride,
    seed,
    row_ids,
    threshold,
    stream,
    head_offset,
    keep_scale,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch, head, rows = _place(heads, queries, ROWS)
    in_rows = rows < queries
    grad_rows = grad_y + batch * grad_batch_stride + head * grad_head_stride
    grad_rows += rows * grad_row_stride
    probs_rows = probs + batch * probs_batch_stride + head * probs_head_stride
    probs_rows += rows * probs_row_stride
    out_rows = grad_scores + ((batch * heads + head) * queries + rows) * num_keys
    ids = None
    if seed is not None:
        ids = load_per_row(row_ids + batch * queries, rows, in_rows, 0, ROWS)
    head_and_stream = ((head + head_offset) << 16) | stream

    if WHOLE:
        keys = tl.arange(0, BLOCK)[None, :]
        inside = in_rows & (keys < num_keys)
        p = tl.load(probs_rows + keys, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_rows + keys, mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            g = _dropped(g, ids, 0, seed, threshold, head_and_stream, keep_scale, BLOCK)
        tl.store(out_rows + keys, scale * p * (g - row_sum(g * p)), mask=inside)
    else:
        tl.static_assert(ROWS == 1)
        dot = 0.0
        for start in range(0, num_keys, BLOCK):
            keys = start + tl.arange(0, BLOCK)[None, :]
            inside = in_rows & (keys < num_keys)
            p = tl.load(probs_rows + keys, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad_rows + keys, mask=inside, other=0.0).to(tl.float32)
            if seed is not None:
                g = _dropped(g, ids, start, seed, threshold, head_and_stream, keep_scale, BLOCK)
            dot += row_sum(g * p)
        for start in range(0, num_keys, BLOCK):
            keys = start + tl.arange(0, BLOCK)[None, :]
            inside = in_rows & (keys < num_keys)
            p = tl.load(probs_rows + keys, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad_rows + keys, mask=inside, other=0.0).to(tl.float32)
            if seed is not None:
                g = _dropped(g, ids, start, seed, threshold, head_and_stream, keep_scale, BLOCK)
            tl.store(out_rows + keys, scale * p * (g - dot), mask=inside)


def _key(
    p: float, seed: Tensor | None, stream: int, row_ids: Tensor | None, head_offset: int
) -> tuple[Tensor | None, Tensor | None, int, int, int, float]:
    """The arguments seed .. keep_scale of both kernels; without dropout there is no seed."""
    if p == 0.0:
        return None, None, 0, 0, 0, 1.0
    assert row_ids is not None
    return seed, row_ids.contiguous(), dropout_threshold(p), stream, head_offset, 1 / (1 - p)


def _tile(queries: int, num_keys: int) -> Tile:
    return tile_for(num_keys, elements=2048, max_columns=16384, max_rows=queries)


def masked_softmax_forward(
    scores: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    row_ids: Tensor | None,
    head_offset: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, num_keys = scores.shape
    y = scores.new_empty(scores.shape)
    probs = scores.new_empty(scores.shape if dropout_p > 0 else (0,))
    mask_strides = (0, 0, 0, 0) if mask is None else mask.expand(scores.shape).stride()
    tile = _tile(queries, num_keys)
    with launching_on(scores):
        _forward_kernel[(batch * heads * triton.cdiv(queries, tile.rows),)](
            scores,
            mask,
            y,
            probs,
            heads,
            queries,
            num_keys,
            scale,
            *scores.stride()[:3],
            *mask_strides,
            *_key(dropout_p, seed, stream, row_ids, head_offset),
            CAUSAL=causal,
            MASK_PER_QUERY=mask_strides[2] != 0,
            WHOLE=num_keys <= tile.columns,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
    return y, probs


def masked_softmax_backward(
    grad_y: Tensor,
    probs: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    row_ids: Tensor | None,
    head_offset: int,
) -> Tensor:
    batch, heads, queries, num_keys = probs.shape
    grad_scores = probs.new_empty(probs.shape)
    tile = _tile(queries, num_keys)
    with launching_on(probs):
        _backward_kernel[(batch * heads * triton.cdiv(queries, tile.rows),)](
            grad_y,
            probs,
            grad_scores,
            heads,
            queries,
            num_keys,
            scale,
            *grad_y.stride()[:3],
            *probs.stride()[:3],
            *_key(dropout_p, seed, stream, row_ids, head_offset),
            WHOLE=num_keys <= tile.columns,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
    return grad_scores
