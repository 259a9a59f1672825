"""What all kernels do per row of a tile.

A tile of one row gives scalars where others give [ROWS, 1]: what belongs to a row is then loaded
and computed once, and not once for each element of a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(tile, ROWS: tl.constexpr):
    """Row numbers of a tile: int64, so that offsets made from them never overflow."""
    first = tl.cast(tile, tl.int64) * ROWS
    return first if ROWS == 1 else first + tl.arange(0, ROWS)[:, None]


@triton.jit
def row_sum(x):
    return tl.sum(x) if x.shape[0] == 1 else tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def row_max(x):
    return tl.max(x) if x.shape[0] == 1 else tl.max(x, axis=1, keep_dims=True)


@triton.jit
def load_per_row(pointer, rows, in_rows, other, ROWS: tl.constexpr):
    """One number per row, in the shape of `rows`: read by few threads and handed to the others."""
    if ROWS == 1:
        result = tl.load(pointer + rows, mask=in_rows, other=other)
    else:
        flat, here = tl.reshape(rows, [ROWS]), tl.reshape(in_rows, [ROWS])
        result = tl.load(pointer + flat, mask=here, other=other)[:, None]
    return result
