"""Bias and GeLU in one pass.

    y = gelu(z),  z = x + bias

    "none"          gelu(z) = z/2 (1 + erf(z / sqrt 2))
    "tanh"          gelu(z) = z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))
    "erf_1.41421"   gelu(z) = z/2 (1 + erf(z / 1.41421)), which NeMo up to 1.4 computed under its
    onnx_safe switch

The three differ by up to 5e-4 (tanh) and 2e-6 (1.41421); a checkpoint is only reproduced by the one
it was trained with.
In float32 the results of the native CPU and CUDA kernels that are normal numbers lie within 2 units
in the last place for all three formulas, and their derivatives within 2e-7.
Source: Hendrycks, Gimpel, "Gaussian error linear units", arXiv 1606.08415. Saved for backward: x
    and bias, not z or y.
"""

from __future__ import annotations

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

APPROXIMATIONS = ("none", "tanh", "erf_1.41421")


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, approximate: str, backend: str) -> Tensor:
        rows = as_rows(x, x.shape[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, bias)
        ctx.approximate = approximate
        ctx.backend = backend
        return in_shape_of(
            raw_ops(backend).bias_gelu_forward(rows, as_vector(bias), approximate), x
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return None, None, None, None
        rows, bias = ctx.saved_tensors
        need_x, need_bias = ctx.needs_input_grad[:2]
        grad_x, grad_bias = raw_ops(ctx.backend).bias_gelu_backward(
            as_rows(grad_y, rows.shape[1]),
            rows,
            as_vector(bias),
            ctx.approximate,
            need_x,
            need_bias,
        )
        return (
            in_shape_of(grad_x, grad_y) if need_x else None,
            as_parameter_grad(grad_bias, bias) if need_bias else None,
            None,
            None,
        )


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """Bias and GeLU in one pass: y = gelu(x + bias).

    Args:
        x: [..., h], float32, bfloat16, float16 or float64; computed in float32 (float64 for
            float64).
        bias: [h] or None, in the dtype of x or float32.
        approximate: "none" (erf), "tanh" or "erf_1.41421"; the formulas stand at the top of this
            file.

    Returns:
        y in the shape and dtype of x, also under autocast.

    Raises:
        ValueError: if the bias does not fit x, or approximate is none of the three.
    """
    if approximate not in APPROXIMATIONS:
        raise ValueError(
            f"approximate={approximate!r}; expected one of {', '.join(APPROXIMATIONS)}"
        )
    check_operands("x", x, bias=bias)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected {tuple(x.shape[-1:])}, the last "
            "dimension of x"
        )
    backend = choose("bias_gelu", x, bias)
    if backend == "reference" or x.shape[-1] == 0:
        with without_autocast(x.device.type):
            return reference.bias_gelu(x, bias, approximate)
    return _BiasGelu.apply(x, bias, approximate, backend)
