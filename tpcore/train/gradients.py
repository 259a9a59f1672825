"""The arithmetic of gradients that live on several ranks.

A tensor-parallel rank holds shards of some parameters and whole copies of the others; a
data-parallel rank holds the same parameters as its peers and gradients of other examples. The
functions here give what one process with the whole model and the whole batch would compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tpcore.parallel.collectives import all_reduce
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.sharding import Replicated, Sharding

BUCKET_BYTES = 32 * 2**20
"""Gradients are summed over ranks in pieces of about this size: few messages, little memory."""

CLIP_EPSILON = 1e-6
"""Keeps the clip factor finite for zero gradients; torch.nn.utils.clip_grad_norm_ adds the same."""


def sum_gradients(parameters: Iterable[nn.Parameter], dp: DataParallelGroup) -> None:
    """Replace every gradient by its sum over the data-parallel ranks.

    Sums have the format of the parameters, whatever the gradients have. A missing gradient counts
    as zeros where another rank has one: a rank whose share of a small batch is empty takes part all
    the same. A parameter that no rank has used keeps none, so that weight decay leaves it alone at
    every number of ranks.
    """
    if dp.size == 1:
        return
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for bucket in _buckets(trainable):
        # One more number for each gradient: how many ranks have it.
        dtype = bucket[0].dtype
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in bucket]
        is_used = torch.tensor([p.grad is not None for p in bucket], dtype=dtype)
        total = all_reduce(torch.cat([*parts, is_used.to(parts[0].device)]), dp)
        *pieces, uses = total.split([*(part.numel() for part in parts), len(bucket)])
        for parameter, piece, count in zip(bucket, pieces, uses.tolist(), strict=True):
            if not count:
                continue
            if parameter.grad is None or parameter.grad.dtype != dtype:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(piece.view_as(parameter))


def gradient_norm(
    parameters: Mapping[str, nn.Parameter],
    shardings: Mapping[str, Sharding],
    tp: TensorParallelGroup,
    flags: Sequence[float] = (),
    shards: DataParallelGroup | None = None,
) -> tuple[Tensor, list[float]]:
    """The L2 norm of the gradient of the whole model: a scalar, fp32, equal on all ranks of `tp`.

        norm^2 = sum over ranks of (shards) + (replicated parameters, of one rank only)

    The squares of the norms of single tensors are summed in fp64: cuts move only the last digit.

    Args:
        parameters: this rank's, by name.
        shardings: how each of them is split.
        tp: the ranks that hold the other shards.
        flags: numbers that travel in the same message; their sums over `tp` come back.
        shards: the data-parallel ranks that hold other rows of the parameters, if there are any.
    """
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    total = torch.tensor([0.0, *flags], dtype=torch.float64, device=device)
    counted = [
        gradient
        for name, gradient in gradients.items()
        if tp.rank == 0 or not isinstance(shardings[name], Replicated)
    ]
    if counted:
        total[0] += torch.stack(_norms(counted)).double().square().sum()
    total = all_reduce(total, tp)
    if shards is not None and shards.size > 1:
        total[0] = all_reduce(total[:1].clone(), shards)[0]
    return total[0].sqrt().float(), total[1:].tolist()


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """The L2 norm of each gradient, in float32."""
    if all(g.dtype == torch.float32 or g.is_cuda for g in gradients):
        return list(torch._foreach_norm(gradients, dtype=torch.float32))
    # The CPU takes several times as long for the same norm of numbers in half precision.
    return [torch._foreach_norm([g.float()], dtype=torch.float32)[0] for g in gradients]


def has_overflow(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a gradient of this rank holds an infinity or NaN."""
    # A rank may have no row of a small parameter.
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
    if not gradients:
        return False
    largest = torch._foreach_norm(gradients, torch.inf, dtype=torch.float32)
    return not bool(torch.stack(list(largest)).isfinite().all())


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    """Multiply every gradient by `factor`, in place."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What clipping multiplies every gradient by: `min(1, max_norm / (norm + 1e-6))`."""
    return (max_norm / (norm + CLIP_EPSILON)).clamp(max=1.0)


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Multiply every gradient by `clip_factor`, in place."""
    scale_gradients(parameters, clip_factor(norm, max_norm))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (
            size + parameter.nbytes > BUCKET_BYTES or parameter.dtype != bucket[0].dtype
        ):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
