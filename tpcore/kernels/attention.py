"""Self-attention of packed sequences: scores, softmax, dropout and context without a score matrix.

For the queries i and keys j of one sequence and one head, under causal j <= i only:

    p_ij = softmax over j (scale * q_i . k_j),   y_i = sum_j keep_ij * p_ij * v_j / (1 - dropout_p)

With g_ij = keep_ij * (grad_y_i . v_j) / (1 - dropout_p) and s_ij = p_ij * (g_ij - sum_j p_ij g_ij):

    grad_q_i = scale * sum_j s_ij k_j,   grad_k_j = scale * sum_i s_ij q_i,
    grad_v_j = sum_i keep_ij * p_ij * grad_y_i / (1 - dropout_p)

Saved for backward: qkv and, of the scores of each query, the maximum and the sum of exponentials.
Probabilities are computed again and dropout bits generated again, so memory grows with the tokens
alone, and padding does not exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcore._native import check_dropout_key
from tpcore.kernels import reference
from tpcore.kernels.autocast import without_autocast
from tpcore.kernels.backend import check_operands, choose, raw_ops
from tpcore.kernels.rows import as_rows, in_shape_of, once_differentiable


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cu_seqlens: Tensor,
        scale: float,
        causal: bool,
        dropout_p: float,
        seed: Tensor | None,
        stream: int,
        row_ids: Tensor | None,
        head_offset: int,
    ) -> Tensor:
        t, n, _, d = qkv.shape
        constants = scale, causal, dropout_p, seed, stream, row_ids, head_offset
        context, maximum, sum_exp = raw_ops("cpu").packed_attention_forward(
            as_rows(qkv, n * 3 * d), cu_seqlens, n, *constants
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, maximum, sum_exp, cu_seqlens, seed, row_ids)
        ctx.constants = scale, causal, dropout_p, stream, head_offset
        return torch.ops.aten._unsafe_view(context, (t, n, d))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_qkv = None
        if grad is not None:
            qkv, maximum, sum_exp, cu_seqlens, seed, row_ids = ctx.saved_tensors
            scale, causal, dropout_p, stream, head_offset = ctx.constants
            _, n, _, d = qkv.shape
            grad_qkv = raw_ops("cpu").packed_attention_backward(
                as_rows(grad, n * d),
                as_rows(qkv, n * 3 * d),
                maximum,
                sum_exp,
                cu_seqlens,
                scale,
                causal,
                dropout_p,
                seed,
                stream,
                row_ids,
                head_offset,
            )
            grad_qkv = in_shape_of(grad_qkv, qkv)
        return grad_qkv, None, None, None, None, None, None, None, None


def _check(
    qkv: Tensor,
    cu_seqlens: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    row_ids: Tensor | None,
    head_offset: int,
) -> None:
    if qkv.dim() != 4 or qkv.shape[2] != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; expected [tokens, heads, 3, head size]"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; expected int32"
            " [sequences + 1], the first token of each sequence and then the number of tokens"
        )
    heads = {"head_offset": head_offset, "num_heads": qkv.shape[1]}
    check_dropout_key(dropout_p, seed, stream, row_ids, **heads)
    if row_ids is not None and dropout_p > 0 and row_ids.shape != qkv.shape[:1]:
        raise ValueError(
            f"row_ids has shape {tuple(row_ids.shape)}; expected ({qkv.shape[0]},), one id per"
            " token"
        )


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    scale: float | None = None,
    causal: bool = False,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    row_ids: Tensor | None = None,
    head_offset: int = 0,
) -> Tensor:
    """Multi-head attention of each packed sequence over itself.

    Args:
        qkv: [t, n, 3, d], the query, key and value of every head of every token; float32, bfloat16,
            float16 or float64. The strides of the tokens are free.
        cu_seqlens: int32 [sequences + 1]: 0, where each further sequence begins, t.
        scale: multiplies the scores; None: 1 / sqrt(d).
        causal: each token attends to itself and to earlier tokens of its sequence only.
        dropout_p: probability of dropping a probability, 0 <= dropout_p < 1.
        seed: int64 tensor of one element; with stream, row_ids, head and the index of the key in
            its sequence it fixes the bits (`tpcore._native.dropout_keep_mask`), which are those of
            `masked_softmax`.
        stream: number of the place in the model.
        row_ids: int64 [t], the identity of each token.
        head_offset: global number of the first head.

    Returns:
        [t, n, d] in the dtype of qkv, also under autocast; sums are kept in float32 (float64 for
        float64).

    Raises:
        ValueError: if shapes or dtypes do not fit, or the dropout key is missing or out of range.
    """
    check_operands("qkv", qkv, cu_seqlens=cu_seqlens, seed=seed, row_ids=row_ids)
    _check(qkv, cu_seqlens, dropout_p, seed, stream, row_ids, head_offset)
    if scale is None:
        scale = qkv.shape[3] ** -0.5
    key = (dropout_p, seed, stream, row_ids, head_offset)
    if choose("packed_attention", qkv) == "reference":
        with without_autocast(qkv.device.type):
            return reference.packed_attention(qkv, cu_seqlens, scale, causal, *key)
    return _PackedAttention.apply(qkv, cu_seqlens, scale, causal, *key)
