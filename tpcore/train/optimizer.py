"""Optimizer, and the arithmetic of gradients that live on several ranks.

A tensor-parallel rank holds shards of some parameters and whole copies of the others; a
data-parallel rank holds the same parameters as its peers and gradients of other examples. The
functions here give what one process with the whole model and the whole batch would compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpcore.parallel.collectives import all_reduce
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.sharding import Replicated, sharding_table
from tpcore.train.config import OptimConfig

BUCKET_BYTES = 32 * 2**20
"""Gradients are summed over ranks in pieces of about this size: few messages, little memory."""

CLIP_EPSILON = 1e-6
"""Keeps the clip factor finite for zero gradients; torch.nn.utils.clip_grad_norm_ adds the same."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embedding tables, and what has no decay: norms and biases.

    A shard has as many dimensions as the whole, so the groups do not depend on the size.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or Adam of torch, in its fused form (one kernel over all parameters)."""
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name]
    return cls(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


def sum_gradients(parameters: Iterable[nn.Parameter], dp: DataParallelGroup) -> None:
    """Replace every gradient by its sum over the data-parallel ranks.

    A parameter without a gradient counts as zeros: a rank whose share of a small batch is empty
    takes part all the same.
    """
    if dp.size == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = all_reduce(torch.cat([gradient.reshape(-1) for gradient in bucket]), dp)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def gradient_norm(model: nn.Module, tp: TensorParallelGroup) -> Tensor:
    """The L2 norm of the gradient of the whole model: a scalar, fp32, equal on all ranks of `tp`.

        norm^2 = sum over ranks of (shards) + (replicated parameters, of one rank only)

    The squares of the norms of single tensors are summed in fp64: cuts move only the last digit.
    """
    table = sharding_table(model)
    counted = [
        parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and (tp.rank == 0 or not isinstance(table[name], Replicated))
    ]
    device = next(model.parameters()).device
    total = torch.zeros(1, dtype=torch.float64, device=device)
    if counted:
        norms = torch._foreach_norm(counted, dtype=torch.float32)
        total += torch.stack(list(norms)).double().square().sum()
    return all_reduce(total, tp).sqrt().float().squeeze(0)


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Multiply every gradient by `min(1, max_norm / (norm + 1e-6))`, in place."""
    factor = (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _buckets(gradients: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket
