"""Tensor parallelism under Lightning: a strategy that gives a Trainer both groups.

    class Classifier(lightning.LightningModule):
        def configure_model(self):
            if self.model is None:      # also called before validation and test
                self.model = BertModel(config, tp=self.trainer.strategy.tp, head=...)

    strategy = TensorParallelStrategy(tensor_parallel_size=2)
    lightning.Trainer(accelerator="cpu", devices=4, strategy=strategy).fit(Classifier(), data)

What NeMo's NLPDDPPlugin did, without process-wide state: consecutive ranks share a copy of the
model, see the same batches, and hold their shards; DistributedDataParallel runs over the ranks that
hold the same shard; the norm for `gradient_clip_val` is that of the whole model; each
tensor-parallel rank saves a checkpoint of its own, `<folder>/mp_rank_XX/<name>.ckpt`.
"""

from __future__ import annotations

import atexit
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from tpcore.parallel.group import (
    DataParallelGroup,
    TensorParallelGroup,
    destroy_parallel,
    init_parallel,
)
from tpcore.parallel.sharding import sharding_table
from tpcore.train.gradients import clip_gradients, gradient_norm

_RANK_FOLDER = re.compile(r"mp_rank_\d{2,}")


class TensorParallelStrategy(DDPStrategy):
    """DistributedDataParallel over tensor-parallel models.

    The groups exist from `configure_model` on, as `trainer.strategy.tp` and `.dp`; a module whose
    layers are made in `__init__`, before the ranks know each other, cannot be split. Every rank
    must draw the same initial weights, so seeds have to be equal: call `lightning.seed_everything`
    (torch's own first seed is another one in every process).

    Args:
        tensor_parallel_size: ranks that share a copy of the model; divides the number of ranks.
        kwargs: those of Lightning's DDPStrategy, and through it of DistributedDataParallel.

    Attributes:
        tp: the ranks that share a copy of the model.
        dp: the ranks that hold the same part of it.
    """

    tp: TensorParallelGroup
    dp: DataParallelGroup

    def __init__(self, tensor_parallel_size: int = 1, **kwargs: Any) -> None:
        if "process_group" in kwargs:
            raise ValueError(
                "process_group is the data-parallel group, which this strategy makes itself; pass "
                "tensor_parallel_size"
            )
        super().__init__(**kwargs)
        self.tensor_parallel_size = tensor_parallel_size

    def setup_distributed(self) -> None:
        """Connect the ranks, then make the two groups.

        Raises:
            ValueError: the size does not divide the number of ranks, or seeds differ.
        """
        super().setup_distributed()
        if dist.get_backend() == "gloo":
            # Its threads may still release tensors, for which they need an interpreter; Lightning
            # itself closes NCCL's only.
            atexit.register(destroy_parallel)
        timeout = self._timeout or default_pg_timeout
        self.tp, self.dp = init_parallel(
            self.tensor_parallel_size, timeout_s=timeout.total_seconds()
        )
        self._ddp_kwargs["process_group"] = self.dp.process_group
        _check_seeds(self.tp)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """All ranks of a tensor-parallel group read the same share of the data."""
        return {"num_replicas": self.dp.size, "rank": self.dp.rank}

    def setup(self, trainer: Trainer) -> None:
        """Move the model to the device; for training, wrap it and make the optimizers."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
        else:
            # Not that of DDPStrategy, which without DDP copies the weights of global rank 0 to all.
            assert self.accelerator is not None
            assert self.model is not None
            self.accelerator.setup(trainer)
            self.precision_plugin.convert_module(self.model)
            self.model_to_device()
            self.setup_precision_plugin()
        precision = self.precision_plugin
        precision.clip_grad_by_norm = self._clip_by_global_norm  # type: ignore[method-assign]
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            precision.scaler = self._shared_scaler(precision.scaler)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any | None = "mean") -> Any:
        """Over the data-parallel ranks unless told otherwise: the others have the same numbers."""
        return super().reduce(tensor, group or self.dp.process_group, reduce_op)

    def all_gather(
        self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False
    ) -> Tensor:
        """Likewise: every example once."""
        return super().all_gather(tensor, group or self.dp.process_group, sync_grads)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """What all ranks of the run decide, or any of them."""
        votes = torch.tensor(int(decision), device=self.root_device)
        count = int(super().reduce(votes, dist.group.WORLD, "sum"))
        return count == self.world_size if all else count > 0

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """One file a tensor-parallel rank, `mp_rank_XX` put before the name of the file."""
        if self.dp.rank == 0:
            self.checkpoint_io.save_checkpoint(
                checkpoint, self.own_path(filepath), storage_options=storage_options
            )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """This rank's file, given the path without `mp_rank_XX` or that of any rank.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: another tensor-parallel size saved it.
        """
        path = self.own_path(checkpoint_path)
        folders = Path(path).parent.parent.glob("mp_rank_*")
        saved = [folder.name for folder in sorted(folders) if (folder / Path(path).name).exists()]
        if saved and len(saved) != self.tp.size:
            raise ValueError(
                f"{checkpoint_path} was saved by {len(saved)} tensor-parallel ranks, and this is a "
                f"run of tensor_parallel_size={self.tp.size}; use the size that saved it"
            )
        return super().load_checkpoint(path, weights_only)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Each writer removes its own file."""
        if self.dp.rank == 0:
            self.checkpoint_io.remove_checkpoint(self.own_path(filepath))

    def own_path(self, filepath: Any) -> str:
        """Where this rank has its part of a checkpoint: `a/b.ckpt` -> `a/mp_rank_01/b.ckpt`."""
        folder, name = os.path.split(os.fspath(filepath))
        if _RANK_FOLDER.fullmatch(os.path.basename(folder)):
            folder = os.path.dirname(folder)
        return os.path.join(folder, f"mp_rank_{self.tp.rank:02d}", name)

    def _clip_by_global_norm(self, optimizer: torch.optim.Optimizer, clip_val: int | float) -> None:
        module: LightningModule | None = self.lightning_module
        assert module is not None
        parameters = self.precision_plugin.main_params(optimizer)
        named = dict(module.named_parameters())
        norm, _ = gradient_norm(named, sharding_table(module), self.tp)
        clip_gradients(parameters, norm, clip_val)

    def _shared_scaler(self, scaler: Any) -> ShardedGradScaler:
        """A scaler for which an overflow on one rank of the group is an overflow on all."""
        return ShardedGradScaler(
            device=self.root_device.type,
            init_scale=scaler.get_scale(),
            growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(),
            growth_interval=scaler.get_growth_interval(),
            process_group=self.tp.process_group,
        )


def _check_seeds(tp: TensorParallelGroup) -> None:
    seeds: list[int] = [0] * tp.size
    dist.all_gather_object(seeds, torch.initial_seed(), group=tp.process_group)
    if len(set(seeds)) > 1:
        raise ValueError(
            f"the ranks of a tensor-parallel group have the seeds {seeds}; they draw the same "
            "weights and then keep their shards, so call lightning.seed_everything(seed) on all"
        )
