"""Attention in plain PyTorch, one sequence and one head at a time: the twin of layers/attention.py.

It shares no code with the layer: no buckets, no padding, no masks. Dropout bits come from the
generator's own function, asked for one head of one sequence at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore._native import dropout_keep_mask
from tpcore.parallel.random import DropoutContext


def dropped(x: Tensor, p: float, stream: int, dropout: DropoutContext | None) -> Tensor:
    """Hidden dropout on x [t, h]."""
    if dropout is None or p == 0:
        return x
    keep = dropout_keep_mask(p, dropout.seed, stream, dropout.row_ids, x.shape[1])
    return x * keep / (1 - p)


def attention(
    parameters: dict[str, Tensor],
    x: Tensor,
    lengths: tuple[int, ...],
    num_heads: int,
    *,
    causal: bool = False,
    p: float = 0.0,
    stream: int = 0,
    dropout: DropoutContext | None = None,
) -> Tensor:
    """x [t, h] -> [t, h], output bias included."""
    h = x.shape[1]
    d = h // num_heads
    qkv = F.linear(x, parameters["qkv.weight"], parameters["qkv.bias"]).view(-1, num_heads, 3, d)
    row_ids = torch.arange(x.shape[0]) if dropout is None else dropout.row_ids
    outputs = []
    for own, own_ids in zip(qkv.split(lengths), row_ids.split(lengths), strict=True):
        heads = []
        for head in range(num_heads):
            q, k, v = own[:, head].unbind(1)
            scores = q @ k.t() / math.sqrt(d)
            if causal:
                later = torch.ones_like(scores, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, -math.inf)
            probs = scores.softmax(-1)
            if dropout is not None and p > 0:
                keep = dropout_keep_mask(p, dropout.seed, stream, own_ids, len(own_ids), head=head)
                probs = probs * keep / (1 - p)
            heads.append(probs @ v)
        outputs.append(torch.cat(heads, dim=1))
    return F.linear(torch.cat(outputs), parameters["dense.weight"], parameters["dense.bias"])
