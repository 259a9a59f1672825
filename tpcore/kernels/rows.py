"""Between autograd and the kernels, which see rows: any tensor becomes a matrix and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.function
from torch import Tensor


def with_dense_rows(x: Tensor) -> Tensor:
    """X itself if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_rows(x: Tensor, num_columns: int) -> Tensor:
    """[rows, num_columns] with contiguous columns; a view of x unless its strides forbid it."""
    if x.dim() != 2 or x.shape[1] != num_columns:
        x = x.reshape(x.numel() // num_columns, num_columns)
    return with_dense_rows(x)


def as_vector(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias as kernels want it: one dimension, contiguous."""
    if parameter is None or (parameter.dim() == 1 and parameter.is_contiguous()):
        return parameter
    return parameter.reshape(-1).contiguous()


def as_parameter_grad(total: Tensor, parameter: Tensor) -> Tensor:
    """A column sum in accumulation dtype as the gradient of a weight or bias."""
    if total.dtype != parameter.dtype:
        total = total.to(parameter.dtype)
    return total if parameter.dim() == 1 else total.view(parameter.shape)


def in_shape_of(rows: Tensor, x: Tensor) -> Tensor:
    """The contiguous result `rows` in the shape of x.

    Not a view as autograd counts them: a Function may not return a view that callers then modify in
    place.
    """
    if rows.shape == x.shape:
        return rows
    return torch.ops.aten._unsafe_view(rows, x.shape)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's decorator of that name, free where no graph of the backward is asked for."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return wrapper
