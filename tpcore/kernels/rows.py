"""Kernels see rows: tensors of any shape become matrices and back, without a copy where strides allow."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor, num_columns: int) -> Tensor:
    """x as [rows, num_columns] with contiguous columns; a view unless the strides of x forbid it."""
    if x.dim() != 2 or x.shape[1] != num_columns:
        x = x.reshape(x.numel() // num_columns, num_columns)
    return x if x.stride(1) == 1 or num_columns == 1 else x.contiguous()


def in_shape_of(rows: Tensor, x: Tensor) -> Tensor:
    """The contiguous result `rows` in the shape of x.

    Not a view as autograd counts them: a Function may not return a view that callers then modify in place.
    """
    if rows.shape == x.shape:
        return rows
    return torch.ops.aten._unsafe_view(rows, x.shape)
