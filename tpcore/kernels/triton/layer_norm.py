"""Layer norm and layer norm of a residual sum in Triton; formulas in `tpcore.kernels.layer_norm`.

Bytes per element of s bytes: forward 2s (x, y), with a residual 4s (and total); backward 3s
(grad_y, x, grad_x), with grad_total 4s. Rows too long for one tile are read twice, in backward
three times. grad_weight and grad_bias: every program sums the rows it walks through in registers
and leaves one row of partial sums, which are then added in a fixed order: no atomics, the same bits
in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpcore.kernels.triton.rows import load_per_row, row_sum, rows_of
from tpcore.kernels.triton.tiles import column_sums, launching_on, row_groups, tile_for


@triton.jit
def _read(x_rows, residual_rows, columns, inside):
    """x, or x + residual rounded as it is stored, in float32."""
    value = tl.load(x_rows + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_rows is not None:
        value += tl.load(residual_rows + columns, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x_rows.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _pivot(x, residual, x_at, residual_at, in_rows, ROWS: tl.constexpr):
    """Near the mean of each row: its first element.

    Sums are taken of differences to it: a sum of elements far from zero loses what tells them
    apart.
    """
    pivot = load_per_row(x, x_at, in_rows, 0.0, ROWS).to(tl.float32)
    if residual is not None:
        pivot += load_per_row(residual, residual_at, in_rows, 0.0, ROWS).to(tl.float32)
    return pivot


@triton.jit
def _affine(xhat, weight, bias, columns, in_columns):
    if weight is not None:
        xhat *= tl.load(weight + columns, mask=in_columns, other=0.0).to(tl.float32)
    if bias is not None:
        xhat += tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)
    return xhat


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    y,
    mean_out,
    rstd_out,
    num_rows,
    num_columns,
    x_stride,
    residual_stride,
    eps,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = rows_of(tl.program_id(0), ROWS)
    in_rows = rows < num_rows
    x_rows = x + rows * x_stride
    residual_rows = residual
    if residual is not None:
        residual_rows += rows * residual_stride
    at = rows * num_columns
    pivot = _pivot(x, residual, rows * x_stride, rows * residual_stride, in_rows, ROWS)

    if WHOLE:
        columns = tl.arange(0, BLOCK)[None, :]
        in_columns = columns < num_columns
        inside = in_rows & in_columns
        value = _read(x_rows, residual_rows, columns, inside)
        if residual is not None:
            tl.store(total + at + columns, value, mask=inside)
        shifted = tl.where(in_columns, value - pivot, 0.0)
        shift = row_sum(shifted) / num_columns
        mean = pivot + shift
        centred = tl.where(in_columns, shifted - shift, 0.0)
        variance = row_sum(centred * centred) / num_columns
        rstd = tl.rsqrt(variance + eps)
        tl.store(
            y + at + columns,
            _affine(centred * rstd, weight, bias, columns, in_columns),
            mask=inside,
        )
    else:
        # One row. Chan's update joins the mean and the squared deviations of block after block.
        tl.static_assert(ROWS == 1)
        shift = 0.0
        deviation = 0.0
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)[None, :]
            in_columns = columns < num_columns
            value = _read(x_rows, residual_rows, columns, in_rows & in_columns)
            shifted = tl.where(in_columns, value - pivot, 0.0)
            count = tl.minimum(num_columns - start, BLOCK).to(tl.float32)
            block_shift = row_sum(shifted) / count
            centred = tl.where(in_columns, shifted - block_shift, 0.0)
            delta = block_shift - shift
            share = count / (start + count)
            shift += delta * share
            deviation += row_sum(centred * centred) + delta * delta * (start * share)
        mean = pivot + shift
        rstd = tl.rsqrt(deviation / num_columns + eps)
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)[None, :]
            in_columns = columns < num_columns
            inside = in_rows & in_columns
            value = _read(x_rows, residual_rows, columns, inside)
            if residual is not None:
                tl.store(total + at + columns, value, mask=inside)
            value = _affine((value - pivot - shift) * rstd, weight, bias, columns, in_columns)
            tl.store(y + at + columns, value, mask=inside)
    tl.store(mean_out + rows, mean, mask=in_rows)
    tl.store(rstd_out + rows, rstd, mask=in_rows)


@triton.jit
def _gradient(
    grad_y,
    x,
    mean,
    rstd,
    rows,
    columns,
    in_rows,
    in_columns,
    grad_stride,
    x_stride,
    ROWS: tl.constexpr,
):
    """grad_y and xhat of a tile, zero outside; and rstd of its rows."""
    inside = in_rows & in_columns
    grad = tl.load(grad_y + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    centre = load_per_row(mean, rows, in_rows, 0.0, ROWS)
    scale = load_per_row(rstd, rows, in_rows, 0.0, ROWS)
    return grad, tl.where(in_columns, (value - centre) * scale, 0.0), scale


@triton.jit
def _weight(weight, columns, in_columns):
    w = 1.0
    if weight is not None:
        w = tl.load(weight + columns, mask=in_columns, other=0.0).to(tl.float32)
    return w


@triton.jit
def _store_grad_x(grad_x, grad_total, g, xhat, rstd, mean_g, mean_g_xhat, at, total_at, inside):
    value = rstd * (g - mean_g - xhat * mean_g_xhat)
    if grad_total is not None:
        value += tl.load(grad_total + total_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x + at, value, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad_y,
    x,
    mean,
    rstd,
    weight,
    grad_total,
    grad_x,
    partial_weight,
    partial_bias,
    num_rows,
    num_columns,
    grad_y_stride,
    x_stride,
    grad_total_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every num_programs(1)-th tile of a block of columns; grad_x only if that is the whole row."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_columns = columns < num_columns
    w = _weight(weight, columns, in_columns)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(num_rows, ROWS), tl.num_programs(1)):
        rows = rows_of(tile, ROWS)
        in_rows = rows < num_rows
        grad, xhat, scale = _gradient(
            grad_y, x, mean, rstd, rows, columns, in_rows, in_columns, grad_y_stride, x_stride, ROWS
        )
        weight_sum += grad * xhat
        bias_sum += grad
        if grad_x is not None:
            g = grad * w
            mean_g = row_sum(g) / num_columns
            mean_g_xhat = row_sum(g * xhat) / num_columns
            at = rows * num_columns + columns
            total_at = rows * grad_total_stride + columns
            inside = in_rows & in_columns
            _store_grad_x(
                grad_x, grad_total, g, xhat, scale, mean_g, mean_g_xhat, at, total_at, inside
            )
    at = tl.program_id(1).to(tl.int64) * num_columns + columns
    if partial_weight is not None:
        tl.store(partial_weight + at, tl.sum(weight_sum, axis=0, keep_dims=True), mask=in_columns)
    if partial_bias is not None:
        tl.store(partial_bias + at, tl.sum(bias_sum, axis=0, keep_dims=True), mask=in_columns)


@triton.jit(do_not_specialize=["num_rows"])
def _long_row_kernel(
    grad_y,
    x,
    mean,
    rstd,
    weight,
    grad_total,
    grad_x,
    num_rows,
    num_columns,
    grad_y_stride,
    x_stride,
    grad_total_stride,
    BLOCK: tl.constexpr,
):
    """grad_x of one row that no tile can hold."""
    row = rows_of(tl.program_id(0), 1)
    sum_g = tl.zeros([1, BLOCK], tl.float32)
    sum_g_xhat = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        in_columns = columns < num_columns
        grad, xhat, _ = _gradient(
            grad_y, x, mean, rstd, row, columns, True, in_columns, grad_y_stride, x_stride, 1
        )
        g = grad * _weight(weight, columns, in_columns)
        sum_g += g
        sum_g_xhat += g * xhat
    mean_g = row_sum(sum_g) / num_columns
    mean_g_xhat = row_sum(sum_g_xhat) / num_columns
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        in_columns = columns < num_columns
        grad, xhat, scale = _gradient(
            grad_y, x, mean, rstd, row, columns, True, in_columns, grad_y_stride, x_stride, 1
        )
        g = grad * _weight(weight, columns, in_columns)
        at, total_at = row * num_columns + columns, row * grad_total_stride + columns
        _store_grad_x(
            grad_x, grad_total, g, xhat, scale, mean_g, mean_g_xhat, at, total_at, in_columns
        )


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_columns = x.shape
    y = x.new_empty(x.shape)
    total = y if residual is None else x.new_empty(x.shape)
    mean = x.new_empty(num_rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tile = tile_for(num_columns, elements=2048, max_columns=16384)
    with launching_on(x):
        _forward_kernel[(triton.cdiv(num_rows, tile.rows),)](
            x,
            residual,
            weight,
            bias,
            total,
            y,
            mean,
            rstd,
            num_rows,
            num_columns,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            WHOLE=num_columns <= tile.columns,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
    return y, total, mean, rstd


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _forward(x, None, weight, bias, eps)
    return y, mean, rstd


def add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, residual, weight, bias, eps)


def layer_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    grad_total: Tensor | None,
    need_grad_x: bool,
    need_grad_weight: bool,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, num_columns = x.shape
    tile = tile_for(num_columns, elements=2048, max_columns=8192)
    column_blocks = triton.cdiv(num_columns, tile.columns)
    groups = row_groups(x, tile, column_blocks=column_blocks, resident_warps=16)

    def partial(needed: bool) -> Tensor | None:
        return x.new_empty((groups, num_columns), dtype=torch.float32) if needed else None

    grad_x = x.new_empty(x.shape) if need_grad_x else None
    partial_weight, partial_bias = partial(need_grad_weight), partial(need_grad_bias)
    long = column_blocks > 1
    inputs = grad_y, x, mean, rstd, weight, grad_total
    total_stride = 0 if grad_total is None else grad_total.stride(0)
    sizes = num_rows, num_columns, grad_y.stride(0), x.stride(0), total_stride
    with launching_on(x):
        if not long or need_grad_weight or need_grad_bias:
            _backward_kernel[(column_blocks, groups)](
                *inputs,
                None if long else grad_x,
                partial_weight,
                partial_bias,
                *sizes,
                ROWS=tile.rows,
                BLOCK=tile.columns,
                num_warps=tile.num_warps,
            )
        if long and need_grad_x:
            _long_row_kernel[(num_rows,)](
                *inputs, grad_x, *sizes, BLOCK=tile.columns, num_warps=tile.num_warps
            )
    if grad_x is None:
        grad_x = x.new_empty(0)
    return grad_x, column_sums(partial_weight, x), column_sums(partial_bias, x)
