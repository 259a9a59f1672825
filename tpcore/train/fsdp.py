"""Parameters that the data-parallel ranks share out, or have bfloat16 copies of, by torch's FSDP2.

    trainer.data_parallel   precision   a rank keeps, in float32     during a step
    fsdp2                   any         its rows of each parameter   whole blocks, for a while
    ddp                     bf16        all parameters               bfloat16 copies of blocks

The layers see whole parameters of their own tensor-parallel shard, in the format of the precision;
gradients are accumulated over micro-batches and summed over ranks in float32 while the backward
runs. FSDP2 averages unless it is told otherwise; the trainer divides by the labels of the whole
step, so here it sums. With `ddp` the ranks are replicas, which is FSDP2 over groups of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from tpcore.models.bert import BertModel
from tpcore.models.output import BertOutput
from tpcore.parallel.collectives import all_gather
from tpcore.parallel.group import DataParallelGroup
from tpcore.tasks.task import Task, TaskBatch
from tpcore.train.overlap import LossSums
from tpcore.train.precision import Precision, Weights


class FullyShardedLossSums(LossSums):
    """The loss sums of a batch by FSDP2: the blocks one by one, the rest of the model as one.

    Args:
        model: of this rank; its parameters become DTensors.
        task: what it learns.
        dp: more than one rank.
        precision: in which format the layers get their weights.
        shards: whether each rank keeps its rows alone.
    """

    meets = True
    in_step = True

    def __init__(
        self,
        model: BertModel,
        task: Task,
        dp: DataParallelGroup,
        precision: Precision,
        *,
        shards: bool,
    ) -> None:
        super().__init__(model, task, dp)
        device_type = next(model.parameters()).device.type
        mesh = dp.device_mesh(device_type) if shards else _replicas(dp, device_type)
        is_cast = precision.weights != torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=precision.weights if is_cast else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self.root: FSDPModule = fully_shard(self.module, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(self.module, "predict")
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)

    def predict(self, batch: TaskBatch) -> BertOutput:
        output = super().predict(batch)
        # No backward follows, which would do it: the next step wants the parameters of then.
        self.root.reshard()
        return output

    def context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        self.root.set_requires_gradient_sync(is_last)
        return nullcontext()


class FullyShardedWeights(Weights):
    """The trainable parameters as plain tensors over the memory of FSDP2's.

    Args:
        model: after `fully_shard`.
        shapes: of its state before, by name.
        shards: the ranks that hold the other rows; one rank: each has them all.
    """

    is_wrapped = True

    def __init__(
        self, model: BertModel, shapes: Mapping[str, torch.Size], shards: DataParallelGroup
    ) -> None:
        self.model, self.shards, self._shapes = model, shards, shapes
        self._sharded: dict[str, nn.Parameter] = dict(model.named_parameters())
        assert self._sharded.keys() == shapes.keys()
        own = {name: _local(parameter) for name, parameter in self._sharded.items()}
        self._whole = {
            name: nn.Parameter(tensor, requires_grad=self._sharded[name].requires_grad)
            for name, tensor in own.items()
        }
        self._copied = {}  # FSDP2 has those itself
        self.main = {name: p for name, p in self._whole.items() if p.requires_grad}

    def zero_gradients(self) -> None:
        for name, parameter in self.main.items():
            parameter.grad = self._sharded[name].grad = None

    def collect_gradients(self) -> None:
        for name, parameter in self.main.items():
            gradient = self._sharded[name].grad
            parameter.grad = None if gradient is None else _local(gradient)

    def publish(self) -> None:
        """Nothing: what the optimizer steps is what FSDP2 gathers."""

    def whole(self, name: str, own: Tensor) -> Tensor:
        if self.shards.size == 1:
            return own
        rows = -(-self._shapes[name][0] // self.shards.size)
        padded = own.new_zeros(rows, *own.shape[1:])
        padded[: own.shape[0]] = own
        return all_gather(padded, self.shards, 0)[: self._shapes[name][0]]

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        if self.shards.size == 1:
            return whole
        rows = -(-self._shapes[name][0] // self.shards.size)
        return whole[self.shards.rank * rows : (self.shards.rank + 1) * rows]

    def templates(self) -> dict[str, Tensor]:
        return {name: torch.empty(shape, device="meta") for name, shape in self._shapes.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state in float32, put together from all ranks: all of them call it."""
        return {name: self.whole(name, p.detach()) for name, p in self._whole.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._whole.items():
                parameter.copy_(self.own_part(name, state[name]))


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows of a DTensor: the same memory."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local().detach()


def _replicas(dp: DataParallelGroup, device_type: str) -> DeviceMesh:
    """A mesh of `dp` times one: every rank alone has all rows."""
    assert dp.process_group is not None
    rank = dist.get_rank()
    alone = dist.new_group([rank], use_local_synchronization=True)
    assert alone is not None
    return DeviceMesh.from_group(
        [dp.process_group, alone],
        device_type,
        mesh=torch.tensor(dp.ranks, device="cpu").unsqueeze(1),
        mesh_dim_names=("replicas", "rows"),
    )
