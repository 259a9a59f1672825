"""Scale, mask, softmax and dropout of attention scores in one pass.

    p = softmax(scale * scores) over the keys that are not masked,    y = keep * p / (1 - dropout_p)

A row whose keys are all masked gives zeros and receives zero gradient. Masked scores are never
looked at: a NaN there changes nothing, while a NaN at a live key makes its row NaN. With g = keep *
grad_y / (1 - dropout_p):

    grad_scores = scale * p * (g - sum(g * p))

Saved for backward: p. On a GPU the dropout bits are generated again from their key; on the CPU,
where that would cost more than all the rest, the sign of the saved p tells them.
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
from tpcore.kernels.rows import with_dense_rows


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        dropout_p: float,
        seed: Tensor | None,
        stream: int,
        row_ids: Tensor | None,
        head_offset: int,
        backend: str,
    ) -> Tensor:
        y, probs = raw_ops(backend).masked_softmax_forward(
            with_dense_rows(scores),
            mask,
            scale,
            causal,
            dropout_p,
            seed,
            stream,
            row_ids,
            head_offset,
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probs if dropout_p > 0 else y, seed, row_ids)
        ctx.constants = scale, dropout_p, stream, head_offset
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_scores = None
        if grad_y is not None:
            probs, seed, row_ids = ctx.saved_tensors
            scale, dropout_p, stream, head_offset = ctx.constants
            grad_scores = raw_ops(ctx.backend).masked_softmax_backward(
                with_dense_rows(grad_y),
                probs,
                scale,
                dropout_p,
                seed,
                stream,
                row_ids,
                head_offset,
            )
        return grad_scores, *[None] * 9


def _check(
    scores: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    row_ids: Tensor | None,
    head_offset: int,
) -> None:
    if scores.dim() != 4:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}; expected four dimensions [batch, heads, "
            "queries, keys]"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}; expected bool, True where a key is masked")
        fits = mask.dim() <= 4 and all(
            m == 1 or m == s
            for m, s in zip(reversed(mask.shape), reversed(scores.shape), strict=False)
        )
        if not fits:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to scores "
                f"{tuple(scores.shape)}"
            )
    heads = {"head_offset": head_offset, "num_heads": scores.shape[1]}
    check_dropout_key(dropout_p, seed, stream, row_ids, **heads)
    expected = scores.shape[0], scores.shape[2]
    if row_ids is not None and dropout_p > 0 and row_ids.shape != expected:
        raise ValueError(
            f"row_ids has shape {tuple(row_ids.shape)}; expected {tuple(expected)}, one id per "
            "query"
        )


def masked_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    head_offset: int = 0,
) -> Tensor:
    """Attention probabilities: dropout(softmax(scale * scores)) over the keys that are not masked.

    Args:
        scores: [b, n, sq, sk], float32, bfloat16, float16 or float64; softmax in float32 (float64
            for float64).
        mask: bool, broadcastable to scores, True where a key is masked.
        scale: multiplies the scores.
        causal: also mask the keys after the query; the last query sees the last key.
        dropout_p: probability of dropping a probability, 0 <= dropout_p < 1.
        seed: int64 tensor of one element; with stream, row_ids, head and key it fixes the bits
            (`tpcore._native.dropout_keep_mask`).
        stream: number of the place in the model.
        row_ids: int64 [b, sq], the identity of each query token.
        head_offset: global number of the first head.

    Returns:
        Probabilities in the shape and dtype of scores, also under autocast; zeros in fully masked
        rows.

    Raises:
        ValueError: if shapes or dtypes do not fit, or the dropout key is missing or out of range.
    """
    check_operands("scores", scores, mask=mask, seed=seed, row_ids=row_ids)
    _check(scores, mask, dropout_p, seed, stream, row_ids, head_offset)
    key = (dropout_p, seed, stream, row_ids, head_offset)
    backend = choose("masked_softmax", scores)
    if backend == "reference" or scores.shape[3] == 0:
        with without_autocast(scores.device.type):
            return reference.masked_softmax(scores, mask, scale, causal, *key)
    return _MaskedSoftmax.apply(scores, mask, scale, causal, *key, backend)
