"""Cross entropy over a vocabulary that is split over a tensor-parallel group."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcore.kernels import cross_entropy
from tpcore.parallel.collectives import all_reduce
from tpcore.parallel.group import TensorParallelGroup


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    tp: TensorParallelGroup,
    num_classes: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Per-token loss from this rank's columns of the logits; the full row never exists anywhere.

        L    = log(sum_j exp(z_j))                                 j over all V classes
        loss = L - (1 - e) z_target - (e / V) sum_j z_j + w L^2

    Each rank reduces its own columns to four numbers per token: maximum, sum of exponentials,
    target's logit (0 if it is elsewhere) and sum of logits. Two all-reduces join them: the maximum,
    then the other three packed into one tensor. Label smoothing spreads over the global V classes.
    The backward needs no communication, and the logits are not modified.

    Args:
        logits: [t, v/tp], any floating dtype; rank r holds the columns from r * v/tp on.
        target: int64 [t], global class ids or ignore_index; the same on every rank.
        tp: the ranks that hold the other columns.
        num_classes: V; columns with a global id of V or more are padding and take no part. None:
            all columns.
        ignore_index: a target that adds no loss and no gradient.
        label_smoothing: e, 0 <= e < 1.
        z_loss: w, 0 or more; keeps L near 0 (arXiv 2204.02311).

    Returns:
        float32 [t], the same on every rank; 0 where the target is ignore_index.

    Raises:
        ValueError: there are more classes than columns on all ranks together, or what
            ``tpcore.kernels.cross_entropy`` refuses.
    """
    num_columns = logits.shape[-1]
    num_classes = num_columns * tp.size if num_classes is None else num_classes
    # With a combine the kernel cannot know: a target without a column would count as logit 0.
    if not 0 < num_classes <= num_columns * tp.size:
        raise ValueError(
            f"num_classes={num_classes}; expected 1 to {num_columns * tp.size}, the columns of "
            f"logits {list(logits.shape)} on {tp.size} ranks"
        )

    def combine(
        maximum: Tensor, sum_exp: Tensor, target_logit: Tensor, sum_logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        global_maximum = all_reduce(maximum, tp, "max")
        # exp(-inf) = 0 for a shard that holds nothing but padding.
        rescaled = sum_exp * torch.exp(maximum - global_maximum)
        total = all_reduce(torch.stack((rescaled, target_logit, sum_logits)), tp)
        return global_maximum, total[0], total[1], total[2]

    return cross_entropy(
        logits,
        target,
        vocab_start=tp.rank * num_columns,
        num_classes=num_classes,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        combine=None if tp.size == 1 else combine,
    )
