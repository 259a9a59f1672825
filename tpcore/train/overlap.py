"""Gradients summed over data-parallel ranks while the backward still runs, by torch's DDP.

`trainer.data_parallel=sum`, the default, sums all gradients once at the end of a step
(`gradients.sum_gradients`). `ddp` hands them to DistributedDataParallel, which sums each bucket as
soon as its gradients are there: the same sums, hidden behind the backward.

DDP averages; the trainer divides by the labels of the whole step, so here a hook sums. It looks for
parameters that a step does not use in every step, and does not rebuild its buckets therefore: a
resumed run sums in the same order as one that was never interrupted. It sums in the format of the
weights; where those are bfloat16, and for `fsdp2`, see `fsdp`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tpcore.models.bert import BertModel
from tpcore.models.output import BertOutput
from tpcore.parallel.group import DataParallelGroup
from tpcore.tasks.task import Task, TaskBatch


class LossSums:
    """The loss sums of a batch; the trainer sums gradients over `dp` when a step is over.

    Args:
        model: of this rank.
        task: what it learns.
        dp: the ranks that hold the same parameters.
    """

    meets: bool = False
    """Whether the last backward of a step leaves sums over `dp` in the gradients."""
    in_step: bool = False
    """Whether a forward is one of all ranks: those without a batch of their own must have one."""

    def __init__(self, model: BertModel, task: Task, dp: DataParallelGroup) -> None:
        self.module = _LossSums(model, task)

    def __call__(self, batch: TaskBatch, seed: Tensor) -> Tensor:
        """As `Task.loss_sums`: fp32 [k]."""
        sums: Tensor = self.module(batch, seed)
        return sums

    def predict(self, batch: TaskBatch) -> BertOutput:
        """What the head says of a batch, without a gradient."""
        return self.module.predict(batch)

    def context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a batch, which is the last one of its step or not."""
        return nullcontext()


class OverlappedLossSums(LossSums):
    """The same by DistributedDataParallel; `dp` has more than one rank."""

    meets = True

    def __init__(self, model: BertModel, task: Task, dp: DataParallelGroup) -> None:
        super().__init__(model, task, dp)
        self.ddp = DistributedDataParallel(
            self.module, process_group=dp.process_group, find_unused_parameters=True
        )
        # Without annotations: DDP compares them with classes, and here they are strings.
        self.ddp.register_comm_hook(dp.process_group, lambda group, bucket: _sum(group, bucket))

    def __call__(self, batch: TaskBatch, seed: Tensor) -> Tensor:
        sums: Tensor = self.ddp(batch, seed)
        return sums

    def context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self.ddp.no_sync()


class _LossSums(nn.Module):
    """Returns the sums alone: DDP waits for the gradients of all that a module returns."""

    def __init__(self, model: BertModel, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: TaskBatch, seed: Tensor) -> Tensor:
        output = self.model.forward_packed(
            batch.packed, batch.head_labels, seed, hidden_states=False
        )
        return self.task.loss_sums(output, batch)

    def predict(self, batch: TaskBatch) -> BertOutput:
        return self.model.forward_packed(batch.packed, batch.head_labels, hidden_states=False)


def _sum(group: dist.ProcessGroup, bucket: Any) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
