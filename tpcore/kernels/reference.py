"""Every op in a few lines of plain PyTorch: the specification of all other backends.

Differentiable by autograd, any device, any floating dtype; computed in float32 (float64 for float64
input) and rounded once at the end. These functions expect valid arguments: the functions of
`tpcore.kernels` check them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore._native import accumulation_dtype, attention_dropout_keep_mask, dropout_keep_mask


def layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Layer norm: (x - mean) / sqrt(var + eps) * weight + bias over the last dimensions."""
    dtype = accumulation_dtype(x.dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), normalized_shape, weight, bias, eps).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias), by erf, by tanh, or by erf with the constant 1.41421 for sqrt(2)."""
    dtype = accumulation_dtype(x.dtype)
    z = x.to(dtype)
    if bias is not None:
        z = z + bias.to(dtype)
    if approximate == "erf_1.41421":
        return (z * 0.5 * (1.0 + torch.erf(z / 1.41421))).to(x.dtype)
    return F.gelu(z, approximate=approximate).to(x.dtype)


def masked_positions(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """True where a query may not see a key, None if it may see all.

    Causal is aligned at the end: the last query sees the last key.
    """
    if not causal:
        return mask
    num_queries, num_keys = scores.shape[-2:]
    future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device)
    future = future.triu(num_keys - num_queries + 1)
    return future if mask is None else mask | future


def masked_softmax(
    scores: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    row_ids: Tensor | None,
    head_offset: int,
) -> Tensor:
    """Dropout of softmax(scale * scores) over the keys that are not masked; zeros where all are."""
    dtype = accumulation_dtype(scores.dtype)
    z = scores.to(dtype)
    if scale != 1.0:
        z = z * scale
    masked = masked_positions(scores, mask, causal)
    if masked is None:
        y = torch.softmax(z, dim=-1)
    else:
        y = torch.softmax(z.masked_fill(masked, float("-inf")), dim=-1)
        y = y.masked_fill(masked.all(dim=-1, keepdim=True), 0.0)
    if dropout_p > 0:
        assert seed is not None
        assert row_ids is not None
        num_heads, num_keys = scores.shape[1], scores.shape[3]
        keep = attention_dropout_keep_mask(
            dropout_p, seed, stream, row_ids, num_heads, num_keys, head_offset=head_offset
        )
        y = torch.where(keep, y * (1.0 / (1.0 - dropout_p)), 0.0)
    return y.to(scores.dtype)


def packed_attention(
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
    """dropout(softmax(scale * q k^T)) v, one sequence after the other; qkv [t, n, 3, d]."""
    dtype = accumulation_dtype(qkv.dtype)
    contexts = [qkv[:0, :, 0].to(dtype)]
    for first, end in pairwise(cu_seqlens.tolist()):
        q, k, v = qkv[first:end].to(dtype).permute(2, 1, 0, 3).unbind()
        ids = None if row_ids is None else row_ids[None, first:end]
        scores = (q @ k.transpose(1, 2))[None]
        key = (dropout_p, seed, stream, ids, head_offset)
        probs = masked_softmax(scores, None, scale, causal, *key)[0]
        contexts.append((probs @ v).transpose(0, 1))
    return torch.cat(contexts).to(qkv.dtype)


def bias_dropout_residual(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    p: float,
    seed: Tensor | None,
    stream: int,
    row_ids: Tensor | None,
    column_offset: int,
) -> Tensor:
    """dropout(x + bias) + residual, x and residual of one dtype; row_ids flat, one per row."""
    dtype = accumulation_dtype(x.dtype)
    y = x.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    if p > 0:
        assert seed is not None
        assert row_ids is not None
        keep = dropout_keep_mask(p, seed, stream, row_ids, x.shape[-1], column_offset=column_offset)
        y = torch.where(keep.view(x.shape), y * (1.0 / (1.0 - p)), 0.0)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)


def cross_entropy(
    logits: Tensor, target: Tensor, num_classes: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    """Per-token loss over the whole vocabulary: what the shards together must reproduce."""
    live = logits[:, :num_classes].to(accumulation_dtype(logits.dtype))
    return F.cross_entropy(
        live, target, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def _live_columns(logits: Tensor, vocab_start: int, num_classes: int) -> int:
    return max(0, min(logits.shape[1], num_classes - vocab_start))


def cross_entropy_statistics(
    logits: Tensor, target: Tensor, vocab_start: int, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one shard knows of each row: max, sum exp(logit - max), logit of the target, sum.

    The logit of a target on another shard is 0. A target that is neither a class nor ignore_index
    gives NaN, on every shard, so that the loss is never silently wrong.
    """
    num_live = _live_columns(logits, vocab_start, num_classes)
    live = logits[:, :num_live].to(accumulation_dtype(logits.dtype))
    target_logit = live.new_zeros(live.shape[0])
    invalid = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    target_logit = target_logit.masked_fill(invalid, float("nan"))
    if num_live == 0:
        zeros = live.new_zeros(live.shape[0])
        return torch.full_like(zeros, float("-inf")), zeros, target_logit, zeros.clone()
    maximum = live.amax(dim=1)
    # Where every logit is -infinity the sum of exponentials is 0, as it is without any column.
    shift = maximum.masked_fill(maximum == float("-inf"), 0.0)
    sum_exp = (live - shift[:, None]).exp_().sum(dim=1)
    local = target - vocab_start
    own = (local >= 0) & (local < num_live) & (target != ignore_index)
    picked = live.gather(1, local.clamp(0, num_live - 1)[:, None])[:, 0]
    return maximum, sum_exp, torch.where(own, picked, target_logit), live.sum(dim=1)


def cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    vocab_start: int,
    num_classes: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """Gradient of the logits of one shard: the formula in cross_entropy.py; 0 where ignored."""
    num_live = _live_columns(logits, vocab_start, num_classes)
    live = logits[:, :num_live].to(accumulation_dtype(logits.dtype))
    grad = (live - maximum[:, None]).exp_().div_(sum_exp[:, None])
    if label_smoothing > 0:
        grad -= label_smoothing / num_classes
    if num_live > 0:
        local = target - vocab_start
        own = ((local >= 0) & (local < num_live)).to(grad.dtype) * (label_smoothing - 1.0)
        grad.scatter_add_(1, local.clamp(0, num_live - 1)[:, None], own[:, None])
    grad *= grad_loss.to(grad.dtype)[:, None]
    grad = grad.masked_fill_((target == ignore_index)[:, None], 0.0)
    return F.pad(grad.to(logits.dtype), (0, logits.shape[1] - num_live))
