"""How the data-parallel ranks share the work: the choice that `trainer.data_parallel` names."""

from __future__ import annotations

import torch

from tpcore.models.bert import BertModel
from tpcore.parallel.group import DataParallelGroup
from tpcore.tasks.task import Task
from tpcore.train.overlap import LossSums, OverlappedLossSums
from tpcore.train.precision import Precision, Weights


def parallelize(
    model: BertModel, task: Task, dp: DataParallelGroup, kind: str, precision: Precision
) -> tuple[LossSums, Weights]:
    """The model as `trainer.data_parallel` wants it, and its weights as the optimizer sees them.

    Args:
        model: in float32, frozen as it is to be; it is changed in place.
        task: what it learns.
        dp: the ranks that hold the same parameters, until now.
        kind: `sum`, `ddp` or `fsdp2`.
        precision: number formats.
    """
    casts = precision.weights != torch.float32
    if dp.size == 1 or kind == "sum" or (kind == "ddp" and not casts):
        weights = Weights(model, precision)
        overlaps = kind == "ddp" and dp.size > 1
        return (OverlappedLossSums if overlaps else LossSums)(model, task, dp), weights
    # Loaded where it is wanted: it takes a second, on every rank.
    from tpcore.train.fsdp import FullyShardedLossSums, FullyShardedWeights

    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sums = FullyShardedLossSums(model, task, dp, precision, shards=kind == "fsdp2")
    shards = dp if kind == "fsdp2" else DataParallelGroup.single()
    return sums, FullyShardedWeights(model, shapes, shards)
