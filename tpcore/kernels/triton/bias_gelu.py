"""Bias and GeLU in Triton; formulas in `tpcore.kernels.bias_gelu`.

Bytes per element of s bytes: forward 2s (x, y), backward 3s (grad_y, x, grad_x). grad_bias costs no
further pass: each program sums the columns it walks through.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpcore.kernels.triton.rows import rows_of
from tpcore.kernels.triton.tiles import Tile, column_sums, launching_on, row_groups, tile_for


@triton.jit
def _phi(z, APPROXIMATE: tl.constexpr):
    """The factor of z in gelu(z), and its derivative."""
    if APPROXIMATE == "tanh":
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3). Beyond |z| = 11
        # it is 0 or 1 in float32; without the clamp the derivative there would be 0 * infinity.
        near = tl.minimum(tl.abs(z), 11.0)
        square = near * near
        e = tl.exp(-1.5957691216057308 * near * (1.0 + 0.044715 * square))
        s = 1.0 / (1.0 + e)
        phi = tl.where(z < 0.0, e * s, s)
        density = e * s * s * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        # (1 + erf(c z)) / 2, with density c / sqrt(pi) exp(-(c z)^2)
        c: tl.constexpr = 0.7071067811865476 if APPROXIMATE == "none" else 1.0 / 1.41421
        phi = 0.5 + 0.5 * tl.erf(c * z)
        density = c * 0.5641895835477563 * tl.exp(-(c * z) * (c * z))
    return phi, density


@triton.jit
def _z(x_rows, bias, columns, inside, num_columns):
    z = tl.load(x_rows + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x,
    bias,
    y,
    num_rows,
    num_columns,
    x_stride,
    APPROXIMATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column_blocks = tl.cdiv(num_columns, BLOCK)
    program = tl.program_id(0)
    rows = rows_of(program // column_blocks, ROWS)
    columns = program % column_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < num_columns)
    z = _z(x + rows * x_stride, bias, columns, inside, num_columns)
    phi, _ = _phi(z, APPROXIMATE)
    tl.store(y + rows * num_columns + columns, z * phi, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad_y,
    x,
    bias,
    grad_x,
    partial,
    num_rows,
    num_columns,
    grad_y_stride,
    x_stride,
    APPROXIMATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    group = tl.program_id(1).to(tl.int64)
    column_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(num_rows, ROWS), tl.num_programs(1)):
        rows = rows_of(tile, ROWS)
        inside = (rows < num_rows) & (columns < num_columns)
        z = _z(x + rows * x_stride, bias, columns, inside, num_columns)
        phi, density = _phi(z, APPROXIMATE)
        grad = tl.load(grad_y + rows * grad_y_stride + columns, mask=inside, other=0.0)
        grad = grad.to(tl.float32) * (phi + z * density)
        if grad_x is not None:
            tl.store(grad_x + rows * num_columns + columns, grad, mask=inside)
        column_sum += grad
    if partial is not None:
        total = tl.sum(column_sum, axis=0, keep_dims=True)
        tl.store(partial + group * num_columns + columns, total, mask=columns < num_columns)


def _tile(num_columns: int) -> Tile:
    return tile_for(num_columns, elements=4096, max_columns=1024)


def bias_gelu_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    num_rows, num_columns = x.shape
    y = x.new_empty(x.shape)
    tile = _tile(num_columns)
    grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns),)
    with launching_on(x):
        _forward_kernel[grid](
            x,
            bias,
            y,
            num_rows,
            num_columns,
            x.stride(0),
            APPROXIMATE=approximate,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
    return y


def bias_gelu_backward(
    grad_y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    approximate: str,
    need_grad_x: bool,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = x.shape
    tile = _tile(num_columns)
    column_blocks = triton.cdiv(num_columns, tile.columns)
    groups = row_groups(x, tile, column_blocks=column_blocks, resident_warps=32)
    grad_x = x.new_empty(x.shape if need_grad_x else (0,))
    partial = None
    if need_grad_bias:
        partial = x.new_empty((groups, num_columns), dtype=torch.float32)
    with launching_on(x):
        _backward_kernel[(column_blocks, groups)](
            grad_y,
            x,
            bias,
            grad_x if need_grad_x else None,
            partial,
            num_rows,
            num_columns,
            grad_y.stride(0),
            x.stride(0),
            APPROXIMATE=approximate,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
    return grad_x, column_sums(partial, x)
