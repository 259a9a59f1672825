"""Layer norm, and layer norm of a residual sum.

    y = (x - mean) * rstd * weight + bias,    rstd = 1 / sqrt(var + eps)

with mean and (biased) variance of each row in float32, whatever the dtype of x. With xhat = (x -
mean) * rstd and g = grad_y * weight, over the c columns of a row:

    grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)),   grad_weight = sum grad_y * xhat,
    grad_bias = sum grad_y

Source: Ba, Kiros, Hinton, "Layer normalization", arXiv 1607.06450. Saved for backward: x, mean,
    rstd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpcore.kernels import reference
from tpcore.kernels.autocast import without_autocast
from tpcore.kernels.backend import check_operands, choose, raw_ops
from tpcore.kernels.rows import (
    as_parameter_grad,
    as_rows,
    as_vector,
    in_shape_of,
    once_differentiable,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        num_columns: int,
        backend: str,
    ) -> Tensor:
        rows = as_rows(x, num_columns)
        y, mean, rstd = raw_ops(backend).layer_norm_forward(
            rows, as_vector(weight), as_vector(bias), eps
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, weight, bias, mean, rstd)
        ctx.backend = backend
        return in_shape_of(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return None, None, None, None, None, None
        needs = ctx.needs_input_grad[:3]
        rows, weight, bias, mean, rstd = ctx.saved_tensors
        grads = _backward(ctx.backend, needs, grad_y, rows, weight, bias, mean, rstd, None)
        return *grads, None, None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        num_columns = x.shape[-1]
        y, total, mean, rstd = raw_ops(backend).add_layer_norm_forward(
            as_rows(x, num_columns),
            as_rows(residual, num_columns),
            as_vector(weight),
            as_vector(bias),
            eps,
        )
        # The output itself is saved, so that autograd notices if the caller modifies it in place.
        total = in_shape_of(total, x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        ctx.backend = backend
        return in_shape_of(y, x), total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return grad_total, grad_total, None, None, None, None
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        needs = (need_x or need_residual, need_weight, need_bias)
        total, weight, bias, mean, rstd = ctx.saved_tensors
        rows = as_rows(total, total.shape[-1])
        grad_x, grad_weight, grad_bias = _backward(
            ctx.backend, needs, grad_y, rows, weight, bias, mean, rstd, grad_total
        )
        return (
            grad_x if need_x else None,
            grad_x if need_residual else None,
            grad_weight,
            grad_bias,
            None,
            None,
        )


def _backward(
    backend: str,
    needs: tuple[bool, bool, bool],
    grad_y: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_total: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    num_columns = rows.shape[1]
    grad_x, grad_weight, grad_bias = raw_ops(backend).layer_norm_backward(
        as_rows(grad_y, num_columns),
        rows,
        mean,
        rstd,
        as_vector(weight),
        None if grad_total is None else as_rows(grad_total, num_columns),
        *needs,
    )
    return (
        in_shape_of(grad_x, grad_y) if needs[0] else None,
        None if weight is None or not needs[1] else as_parameter_grad(grad_weight, weight),
        None if bias is None or not needs[2] else as_parameter_grad(grad_bias, bias),
    )


def _check_eps(eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"eps={eps}; expected a number of at least 0")


def _check_normalized_shape(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_shape: Sequence[int] | int | None,
) -> tuple[int, ...]:
    shape: tuple[int, ...]
    if normalized_shape is None:
        given = weight if weight is not None else bias
        shape = given.shape if given is not None else x.shape[-1:]
    else:
        shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        )
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not end in the normalized shape {tuple(shape)}; "
            "pass normalized_shape=, or weight and bias of the shape of the last dimensions"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; expected the normalized shape "
                f"{tuple(shape)}"
            )
    return shape


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    normalized_shape: tuple[int, ...] | None = None,
) -> Tensor:
    """Layer norm over the last dimensions: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        x: [..., *normalized_shape], float32, bfloat16, float16 or float64; rows may be strided.
        weight: normalized_shape, or None for 1; in the dtype of x or float32.
        bias: normalized_shape, or None for 0; same dtype as weight.
        eps: added to the variance.
        normalized_shape: the dimensions of a row; by default those of weight, without weight the
            last one.

    Returns:
        y in the shape and dtype of x, also under autocast.

    Raises:
        ValueError: if x does not end in normalized_shape, weight or bias have another shape or
            device, the dtype is none of these, or eps is negative.
    """
    check_operands("x", x, weight=weight, bias=bias)
    _check_eps(eps)
    shape = _check_normalized_shape(x, weight, bias, normalized_shape)
    num_columns = math.prod(shape)
    backend = choose("layer_norm", x, weight, bias)
    if backend == "reference" or num_columns == 0:
        with without_autocast(x.device.type):
            return reference.layer_norm(x, shape, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps, num_columns, backend)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Layer norm of a residual sum, in one pass: (layer_norm(x + residual), x + residual).

    The sum is rounded to its dtype before it is normalized, so that it can serve as the next
    residual.

    Args:
        x: [..., h].
        residual: the shape of x; if the dtypes differ, both are taken in the promoted one.
        weight: [h] or None, in the dtype of the sum or float32.
        bias: [h] or None, same dtype as weight.
        eps: added to the variance.

    Returns:
        y and the sum, both in the shape of x and the promoted dtype of x and residual, also under
        autocast.

    Raises:
        ValueError: if the shapes do not fit.
    """
    check_operands("x", x, residual=residual, weight=weight, bias=bias)
    _check_eps(eps)
    if x.shape != residual.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and residual {tuple(residual.shape)}; expected "
            "equal shapes"
        )
    shape = _check_normalized_shape(x, weight, bias, tuple(x.shape[-1:]))
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    backend = choose("add_layer_norm", x, weight, bias)
    if backend == "reference" or shape[0] == 0:
        with without_autocast(x.device.type):
            total = x + residual
            return reference.layer_norm(total, shape, weight, bias, eps), total
    return _AddLayerNorm.apply(x, residual, weight, bias, eps, backend)
