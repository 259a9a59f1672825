"""Bias, dropout and residual addition in one pass.

    y = keep * (x + bias) / (1 - p) + residual

    grad_x = keep * grad_y / (1 - p),   grad_bias = sum grad_x over rows,   grad_residual = grad_y

The bits of the mask come from a counter-based generator keyed by global coordinates
(`tpcore._native.dropout_keep_mask`), so they are equal on every backend, for every way to split the
tokens or the columns, and whenever a checkpointed layer runs again. Without bias and residual this
is plain dropout, as after the embeddings.

Saved for backward: on a GPU the key. On the CPU one bit for each element, a sixteenth of x in
bfloat16: there ten rounds of Philox cost three times what moving the gradient does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpcore._native import check_dropout_key
from tpcore.kernels import reference
from tpcore.kernels.autocast import without_autocast
from tpcore.kernels.backend import check_operands, choose, raw_ops
from tpcore.kernels.rows import as_rows, as_vector, in_shape_of


class _BiasDropoutResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        p: float,
        seed: Tensor | None,
        stream: int,
        row_ids: Tensor | None,
        column_offset: int,
        backend: str,
    ) -> Tensor:
        num_columns = x.shape[-1]
        arguments = (
            as_rows(x, num_columns),
            as_vector(bias),
            None if residual is None else as_rows(residual, num_columns),
            p,
            seed,
            stream,
            row_ids,
            column_offset,
        )
        ctx.set_materialize_grads(False)
        if backend == "cpu":
            y, keep = torch.ops.tpcore.bias_dropout_residual_cpu_forward(*arguments)
            ctx.save_for_backward(keep)
        else:
            y = raw_ops(backend).bias_dropout_residual_forward(*arguments)
            ctx.save_for_backward(seed, row_ids)
        ctx.constants = p, stream, column_offset
        ctx.backend = backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        return in_shape_of(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, need_bias, need_residual = ctx.needs_input_grad[:3]
        grad_x = grad_bias = None
        if grad_y is not None and (need_x or need_bias):
            p, stream, column_offset = ctx.constants
            # Without dropout grad_x is grad_y itself and only the sum for the bias is left to do.
            write_x = need_x and p > 0
            rows, needs = as_rows(grad_y, grad_y.shape[-1]), (write_x, need_bias)
            if ctx.backend == "cpu":
                (keep,) = ctx.saved_tensors
                grad_x, grad_bias = torch.ops.tpcore.bias_dropout_residual_cpu_backward(
                    rows, keep, p, *needs
                )
            else:
                seed, row_ids = ctx.saved_tensors
                grad_x, grad_bias = raw_ops(ctx.backend).bias_dropout_residual_backward(
                    rows, p, seed, stream, row_ids, column_offset, *needs
                )
            grad_x = in_shape_of(grad_x, grad_y) if write_x else grad_y
        return (
            grad_x if need_x else None,
            grad_bias.to(ctx.bias_dtype) if need_bias and grad_bias is not None else None,
            grad_y if need_residual else None,
            *[None] * 6,
        )


def bias_dropout_residual(
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    column_offset: int = 0,
) -> Tensor:
    """Bias, dropout and residual in one pass: y = dropout(x + bias) + residual.

    Args:
        x: [..., h], float32, bfloat16, float16 or float64; computed in float32 (float64 for
            float64).
        bias: [h] or None, in the dtype of x or float32.
        residual: the shape of x, or None; if the dtypes differ, both are taken in the promoted one.
        p: probability of dropping an element, 0 <= p < 1; 0 needs no key.
        seed: int64 tensor of one element.
        stream: number of the place in the model.
        row_ids: int64 of the shape of x without its last dimension, the identity of each token.
        column_offset: global number of the first column, where x holds a shard of the columns.

    Returns:
        y in the shape of x and the promoted dtype of x and residual, also under autocast; x itself
        where there is nothing to do (p = 0, no bias, no residual).

    Raises:
        ValueError: if shapes or dtypes do not fit, or the dropout key is missing or out of range.
    """
    check_operands("x", x, bias=bias, residual=residual, seed=seed, row_ids=row_ids)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected {tuple(x.shape[-1:])}, the last "
            "dimension of x"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; expected {tuple(x.shape)}, the shape of x"
        )
    check_dropout_key(p, seed, stream, row_ids, column_offset=column_offset)
    if p > 0:
        assert row_ids is not None
        if row_ids.shape != x.shape[:-1]:
            raise ValueError(
                f"row_ids has shape {tuple(row_ids.shape)}; expected {tuple(x.shape[:-1])}, "
                "one id per row of x"
            )
        row_ids = row_ids.reshape(-1)
    elif bias is None and residual is None:
        return x
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    key = (p, seed, stream, row_ids, column_offset)
    backend = choose("bias_dropout_residual", x, bias)
    if backend == "reference" or x.shape[-1] == 0:
        with without_autocast(x.device.type):
            return reference.bias_dropout_residual(x, bias, residual, *key)
    return _BiasDropoutResidual.apply(x, bias, residual, *key, backend)
