"""Cross entropy over a vocabulary that may be split over processes, in one read of the logits.

Each shard reduces its columns to four numbers per token: the maximum m, d = sum exp(logit - m), the
logit of the target (0 if another shard holds it) and the sum of its logits. `combine` turns them
into the same four over all shards; with tensor parallelism that is one small collective, 16 bytes
per token, and without it nothing. With ls the label smoothing and num_classes the size of the whole
vocabulary,

    loss = log d - (1 - ls) * (target_logit - m) - ls * (sum_logits / num_classes - m)

which is lse - (1 - ls) * target_logit - ls * mean, without the cancellation. Backward needs no
communication:

    grad_logits = grad_loss * (exp(logits - m) / d - (1 - ls) * [target] - ls / num_classes)

where [target] is 1 in the column of the target. A z-loss adds z (log d + m)^2, which keeps
log d + m near 0 (arXiv 2204.02311, section 5). It multiplies the first term of the gradient by
1 + 2 z (log d + m), so the backward gets d divided by that, and is otherwise the same. Saved for
backward: the logits, m and d, not a softmax. That the work is split where the shards meet is why
kernels need not know of process groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpcore.kernels import reference
from tpcore.kernels.autocast import without_autocast
from tpcore.kernels.backend import check_operands, choose, raw_ops
from tpcore.kernels.rows import once_differentiable, with_dense_rows

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]
Combine = Callable[[Tensor, Tensor, Tensor, Tensor], Statistics]


def _ops(backend: str) -> Any:
    return reference if backend == "reference" else raw_ops(backend)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        vocab_start: int,
        num_classes: int,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        combine: Combine | None,
        backend: str,
    ) -> Tensor:
        ops = _ops(backend)
        logits, target = with_dense_rows(logits), with_dense_rows(target)
        with without_autocast(logits.device.type):
            statistics = ops.cross_entropy_statistics(
                logits, target, vocab_start, num_classes, ignore_index
            )
            if combine is not None:
                statistics = combine(*statistics)
            maximum, sum_exp, target_logit, sum_logits = statistics
            loss = sum_exp.log() - (1.0 - label_smoothing) * (target_logit - maximum)
            if label_smoothing > 0:
                loss = loss - label_smoothing * (sum_logits / num_classes - maximum)
            if z_loss > 0:
                log_sum = sum_exp.log() + maximum
                loss = loss + z_loss * log_sum.square()
                sum_exp = sum_exp / (1.0 + 2.0 * z_loss * log_sum)
            loss = loss.masked_fill(target == ignore_index, 0.0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, maximum, sum_exp)
        ctx.constants = vocab_start, num_classes, ignore_index, label_smoothing
        ctx.backend = backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logits = None
        if grad_loss is not None:
            logits, target, maximum, sum_exp = ctx.saved_tensors
            ops = _ops(ctx.backend)
            with without_autocast(logits.device.type):
                grad_logits = ops.cross_entropy_backward(
                    with_dense_rows(grad_loss), logits, target, maximum, sum_exp, *ctx.constants
                )
        return grad_logits, None, None, None, None, None, None, None, None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_start: int = 0,
    num_classes: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    combine: Combine | None = None,
) -> Tensor:
    """Per-token cross entropy of a shard of the vocabulary.

    Args:
        logits: [t, v/tp], float32, bfloat16, float16 or float64; statistics in float32 (float64 for
            float64).
        target: int64 [t], global class ids.
        vocab_start: global id of the first column.
        num_classes: size of the whole vocabulary; columns with a global id from there on (padding)
            are left out. By default the columns of logits, which is only right where there is one
            shard.
        ignore_index: tokens with this target have loss 0 and no gradient.
        label_smoothing: weight of the uniform distribution over the num_classes classes, 0 <=
            label_smoothing < 1.
        z_loss: weight of the squared log-sum-exp over the whole vocabulary, 0 or more.
        combine: turns (max, sum_exp, target_logit, sum_logits) of this shard into those of all
            shards; None where this shard is the whole vocabulary.

    Returns:
        loss [t], float32 (float64 for float64 logits), also under autocast. A target that is no
        class gives NaN where it cannot be checked without waiting for the device.

    Raises:
        ValueError: if shapes or dtypes do not fit, num_classes is missing on a shard, or (on the
            CPU) a target is neither a class nor ignore_index.
    """
    check_operands("logits", logits, target=target)
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and target {tuple(target.shape)}; "
            "expected [t, v] and [t]"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target is {target.dtype}; expected int64")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing}; expected 0 <= label_smoothing < 1")
    if z_loss < 0.0:
        raise ValueError(f"z_loss={z_loss}; expected 0 or more")
    if num_classes is None:
        if combine is not None or vocab_start != 0:
            raise ValueError(
                "num_classes is None on a shard of the vocabulary; pass the size of the whole "
                "vocabulary"
            )
        num_classes = logits.shape[1]
        if num_classes == 0:
            raise ValueError("logits has no column; expected one for each class")
    elif combine is None and not 0 < num_classes - vocab_start <= logits.shape[1]:
        raise ValueError(
            f"logits holds the classes {vocab_start}..{vocab_start + logits.shape[1] - 1} of "
            f"num_classes={num_classes};"
            " pass combine to join it with the other shards"
        )
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_targets(target, num_classes, ignore_index)
    backend = choose("cross_entropy", logits)
    return _CrossEntropy.apply(
        logits,
        target,
        vocab_start,
        num_classes,
        ignore_index,
        label_smoothing,
        z_loss,
        combine,
        backend,
    )


def _check_targets(target: Tensor, num_classes: int, ignore_index: int) -> None:
    invalid = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if invalid.any():
        position = int(invalid.nonzero()[0])
        raise ValueError(
            f"target[{position}] is {int(target[position])}; expected a class "
            f"0..{num_classes - 1} or"
            f" ignore_index={ignore_index}"
        )
