"""Bias, dropout and residual in Triton; formulas in `tpcore.kernels.bias_dropout_residual`.

Bytes per element of s bytes: forward 3s (x, residual, y), backward 2s (grad_y, grad_x); no mask is
stored. Tiles start at global columns divisible by 4, so that a group of random words never spans
two of them, whatever the offset of a column shard.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpcore._philox import dropout_threshold
from tpcore.kernels.triton.philox import kept
from tpcore.kernels.triton.rows import load_per_row, rows_of
from tpcore.kernels.triton.tiles import Tile, column_sums, launching_on, row_groups, tile_for

_NOT_SPECIALIZED = ["num_rows", "threshold", "stream", "first_group"]


@triton.jit
def _dropped(
    value,
    scale,
    seed,
    row_ids,
    rows,
    in_rows,
    group,
    stream,
    threshold,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Value where it is kept, times scale; 0 elsewhere."""
    ids = load_per_row(row_ids, rows, in_rows, 0, ROWS)
    keep = kept(seed, ids, group, stream, threshold, BLOCK // 4)
    return tl.where(keep, value * scale, 0.0)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _forward_kernel(
    x,
    bias,
    residual,
    y,
    num_rows,
    num_columns,
    x_stride,
    residual_stride,
    scale,
    seed,
    row_ids,
    threshold,
    stream,
    first_group,
    skipped,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column_blocks = tl.cdiv(num_columns + skipped, BLOCK)
    program = tl.program_id(0)
    first = program % column_blocks * BLOCK
    rows = rows_of(program // column_blocks, ROWS)
    columns = first - skipped + tl.arange(0, BLOCK)[None, :]
    in_rows, in_columns = rows < num_rows, (columns >= 0) & (columns < num_columns)
    inside = in_rows & in_columns
    value = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)
    if seed is not None:
        group = first_group + first // 4
        value = _dropped(
            value, scale, seed, row_ids, rows, in_rows, group, stream, threshold, ROWS, BLOCK
        )
    if residual is not None:
        residual_rows = residual + rows * residual_stride
        value += tl.load(residual_rows + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + rows * num_columns + columns, value, mask=inside)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _backward_kernel(
    grad_y,
    grad_x,
    partial,
    num_rows,
    num_columns,
    grad_y_stride,
    scale,
    seed,
    row_ids,
    threshold,
    stream,
    first_group,
    skipped,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    columns = first - skipped + tl.arange(0, BLOCK)[None, :]
    in_columns = (columns >= 0) & (columns < num_columns)
    column_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(num_rows, ROWS), tl.num_programs(1)):
        rows = rows_of(tile, ROWS)
        in_rows = rows < num_rows
        inside = in_rows & in_columns
        grad_rows = grad_y + rows * grad_y_stride
        grad = tl.load(grad_rows + columns, mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            group = first_group + first // 4
            grad = _dropped(
                grad, scale, seed, row_ids, rows, in_rows, group, stream, threshold, ROWS, BLOCK
            )
        if grad_x is not None:
            tl.store(grad_x + rows * num_columns + columns, grad, mask=inside)
        column_sum += grad
    if partial is not None:
        total = tl.sum(column_sum, axis=0, keep_dims=True)
        partial_row = partial + tl.program_id(1).to(tl.int64) * num_columns
        tl.store(partial_row + columns, total, mask=in_columns)


def _tile(num_columns: int) -> Tile:
    return tile_for(num_columns, elements=4096, max_columns=1024)


def _key(
    p: float, seed: Tensor | None, stream: int, row_ids: Tensor | None, column_offset: int
) -> tuple[float, Tensor | None, Tensor | None, int, int, int, int]:
    """The arguments scale .. skipped of both kernels; without dropout there is no seed."""
    if p == 0.0:
        return 1.0, None, None, 0, 0, 0, 0
    assert row_ids is not None
    first_group, skipped = divmod(column_offset, 4)
    threshold = dropout_threshold(p)
    return 1 / (1 - p), seed, row_ids.contiguous(), threshold, stream, first_group, skipped


def bias_dropout_residual_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    p: float,
    seed: Tensor | None,
    stream: int,
    row_ids: Tensor | None,
    column_offset: int,
) -> Tensor:
    num_rows, num_columns = x.shape
    y = x.new_empty(x.shape)
    tile = _tile(num_columns)
    key = _key(p, seed, stream, row_ids, column_offset)
    column_blocks = triton.cdiv(num_columns + key[-1], tile.columns)
    with launching_on(x):
        _forward_kernel[(triton.cdiv(num_rows, tile.rows) * column_blocks,)](
            x,
            bias,
            residual,
            y,
            num_rows,
            num_columns,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            *key,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
    return y


def bias_dropout_residual_backward(
    grad_y: Tensor,
    p: float,
    seed: Tensor | None,
    stream: int,
    row_ids: Tensor | None,
    column_offset: int,
    need_grad_x: bool,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = grad_y.shape
    tile = _tile(num_columns)
    key = _key(p, seed, stream, row_ids, column_offset)
    column_blocks = triton.cdiv(num_columns + key[-1], tile.columns)
    groups = row_groups(grad_y, tile, column_blocks=column_blocks, resident_warps=32)
    grad_x = grad_y.new_empty(grad_y.shape if need_grad_x else (0,))
    partial = None
    if need_grad_bias:
        partial = grad_y.new_empty((groups, num_columns), dtype=torch.float32)
    with launching_on(grad_y):
        _backward_kernel[(column_blocks, groups)](
            grad_y,
            grad_x if need_grad_x else None,
            partial,
            num_rows,
            num_columns,
            grad_y.stride(0),
            *key,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
    return grad_x, column_sums(partial, grad_y)
