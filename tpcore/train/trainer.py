"""The training loop.

An optimizer step is defined on the whole: its batches are formed from the seed and the epoch
alone, then cut over the data-parallel ranks; the loss is the sum over all labels of the step
divided by their number, wherever they are. So loss and gradient do not depend on the number of
ranks, on how batches were cut, or on accumulation; only rounding does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcore.memory import peak_memory_bytes
from tpcore.models.bert import BertModel
from tpcore.parallel.collectives import all_reduce
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.random import step_seed
from tpcore.tasks.task import Dataset, Example
from tpcore.train.config import ConfigError
from tpcore.train.evaluation import Evaluation, evaluate
from tpcore.train.launch import on_all_ranks
from tpcore.train.logging import RunLog, format_metrics
from tpcore.train.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    set_learning_rate,
    sum_gradients,
)
from tpcore.train.prepare import Job
from tpcore.train.run_state import (
    CheckpointKeeper,
    Progress,
    create_run,
    rank_folder,
    read_checkpoint,
    write_checkpoint,
)

_ORDER_STREAM = 1 << 32
"""Added to the epoch so that data order and dropout, which counts steps, use different seeds."""


class DivergedError(RuntimeError):
    """Loss or gradient is not a finite number; there is nothing to go on with."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    path: Path
    global_step: int
    last: dict[str, float]
    """Metrics of the last validation."""
    best: dict[str, float]
    """Metrics of the best one; empty without validation data."""
    test: dict[str, float]
    """Of the best checkpoint on model.test_ds; empty without."""


class Trainer:
    """Trains one model on one job; every rank has one.

    Args:
        job: What to do, from `prepare`.
        model: This rank's part of the model.
        tp: The ranks that share a copy of the model.
        dp: The ranks that hold the same part.
        run_path: Folder of the run, the same on all ranks; `fit` makes it.
        log: Speaks on global rank 0.
    """

    def __init__(
        self,
        job: Job,
        model: BertModel,
        *,
        tp: TensorParallelGroup,
        dp: DataParallelGroup,
        run_path: Path,
        log: RunLog,
    ) -> None:
        self.job, self.config, self.task = job, job.config, job.task
        self.model, self.tp, self.dp = model, tp, dp
        self.run_path, self.log = run_path, log
        self.is_first = tp.rank == 0 and dp.rank == 0
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(model, self.config.model.optim)
        self.schedule = job.schedule
        self.seed = self.config.trainer.seed
        self.global_step = 0
        self.last_metrics: dict[str, float] = {}
        # A rank with an empty share must still know how many terms the loss has.
        self.num_terms = len(self.task.label_counts(self.task.collate(job.train.examples[:1])))
        params = self.config.exp_manager.checkpoint_callback_params
        self.keeper = CheckpointKeeper(
            name=self.config.exp_manager.name,
            monitor=job.monitor,
            save_top_k=params.save_top_k if job.validation is not None else 0,
            save_last=params.save_last,
            name_steps=self.config.trainer.val_check_interval != 1.0,
        )

    def fit(self) -> FitResult:
        """Train, validate, keep checkpoints; test the best one at the end.

        Raises:
            DivergedError: names the step.
        """
        self._check_monitor()
        self._create_run()
        started = time.perf_counter()
        tokens = 0
        self.log.start_progress(self.job.total_steps)
        self.model.train()
        done = False
        for epoch in range(self.config.trainer.max_epochs):
            for step_in_epoch, batches in enumerate(self.epoch_batches(epoch), start=1):
                tokens += self._logged_step(epoch, batches)
                done = self.global_step == self.job.total_steps
                if done or self._validation_is_due(step_in_epoch):
                    self._validate_and_save(epoch)
                if done:
                    break
            if done:
                break
        self.log.stop_progress()
        result = FitResult(
            path=self.run_path,
            global_step=self.global_step,
            last=self.last_metrics,
            best={} if self.keeper.best is None else dict(self.keeper.best.metrics),
            test=self._test_best(),
        )
        self._final_table(result, tokens, time.perf_counter() - started)
        return result

    def epoch_batches(self, epoch: int) -> Iterator[list[list[Example]]]:
        """The batches of each optimizer step of an epoch, before they are cut over ranks."""
        examples = self.job.train.examples
        data = self.config.model.train_ds
        order = epoch_order(len(examples), self.seed, epoch, shuffle=data.shuffle)
        starts = range(0, len(order), data.batch_size)
        batches = [[examples[i] for i in order[s : s + data.batch_size]] for s in starts]
        accumulate = self.config.trainer.accumulate_grad_batches
        for start in range(0, len(batches), accumulate):
            yield batches[start : start + accumulate]

    def train_step(self, batches: Sequence[Sequence[Example]], lr: float) -> tuple[float, float]:
        """One optimizer step over whole batches; returns loss and gradient norm, before clipping.

        loss = sum_k (sum of losses_k over all batches and ranks) / (sum of counts_k, likewise)
        """
        shares = [own_share(batch, self.dp) for batch in batches]
        cut = [self.task.collate(share, self.device) for share in shares if share]
        counts = torch.zeros(self.num_terms, dtype=torch.float64)
        for batch in cut:
            counts += torch.tensor(self.task.label_counts(batch), dtype=torch.float64)
        counts = all_reduce(counts.to(self.device), self.dp)
        divisor = torch.where(counts > 0, counts, 1.0).float()

        seed = torch.tensor([step_seed(self.seed, self.global_step)], device=self.device)
        total = torch.zeros(self.num_terms, dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for batch in cut:
            with self.autocast():
                output = self.model.forward_packed(batch.packed, seed=seed)
                sums = self.task.loss_sums(output, batch)
            (sums / divisor).sum().backward()
            total += sums.detach()
        sum_gradients(self.model.parameters(), self.dp)
        loss = (all_reduce(total, self.dp) / divisor).sum().item()
        norm = gradient_norm(self.model, self.tp)
        self._check_finite(loss, norm)
        if self.config.trainer.gradient_clip_val is not None:
            clip_gradients(self.model.parameters(), norm, self.config.trainer.gradient_clip_val)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        return loss, norm.item()

    def evaluate(self, dataset: Dataset, batch_size: int) -> Evaluation:
        """The model as it is now, over a dataset; equal on all ranks."""
        return evaluate(
            self.model,
            self.task,
            dataset,
            batch_size=batch_size,
            dp=self.dp,
            device=self.device,
            autocast=self.autocast,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model runs at `trainer.precision`."""
        if self.config.trainer.precision == "32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _check_monitor(self) -> None:
        """Refuse a metric that does not exist, before anything is written."""
        params = self.config.exp_manager.checkpoint_callback_params
        source = self.config.model.source("validation_ds")
        if params.monitor is None or source is None:
            return
        few = self.task.load(source, num_samples=2)
        known = named_metrics(self.evaluate(few, batch_size=2), "val")
        if self.job.monitor[0] not in known:
            raise ConfigError(
                f"exp_manager.checkpoint_callback_params.monitor={params.monitor!r} is not a "
                f"metric of this task; use one of {', '.join(known)}"
            )

    def _create_run(self) -> None:
        def create() -> None:
            if self.is_first:
                create_run(self.run_path, self.config, self.model, self.task)
                self.log.open_folder(self.run_path)

        on_all_ranks(create, self.tp, self.dp)

    def _logged_step(self, epoch: int, batches: Sequence[Sequence[Example]]) -> int:
        """Train one step and tell about it; returns its tokens on all ranks together."""
        started = time.perf_counter()
        lr = self.schedule.learning_rate(self.global_step)
        loss, norm = self.train_step(batches, lr)
        self.global_step += 1
        tokens = sum(len(example) for batch in batches for example in batch)
        duration_s = time.perf_counter() - started
        record = {
            "step": self.global_step,
            "epoch": epoch,
            "train_loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_s": tokens / duration_s,
        }
        due = self.global_step % self.config.trainer.log_every_n_steps == 0
        if due or self.global_step == 1:
            self.log.metrics(record)
        self.log.step(record, self.job.total_steps, line=due or self.global_step == 1)
        return tokens

    def _check_finite(self, loss: float, norm: Tensor) -> None:
        for name, value in (("loss", loss), ("gradient norm", norm.item())):
            if not abs(value) < float("inf"):
                raise DivergedError(
                    f"{name} is {value} at step {self.global_step + 1}; lower model.optim.lr or "
                    f"warm up longer; checkpoints of earlier steps are in {self.run_path}"
                )

    def _validation_is_due(self, step_in_epoch: int) -> bool:
        interval = self.config.trainer.val_check_interval
        if interval > 1:
            return self.global_step % int(interval) == 0
        steps = max(1, int(interval * self.job.steps_per_epoch))
        return step_in_epoch % steps == 0

    def _validate_and_save(self, epoch: int) -> None:
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        if self.job.validation is not None:
            data = self.config.model.validation_ds
            metrics = named_metrics(self.evaluate(self.job.validation, data.batch_size), "val")
            duration_s = time.perf_counter() - started
            self.log.metrics({"step": self.global_step, "epoch": epoch, **metrics})
            shown = " | ".join(f"{name} {value}" for name, value in format_metrics(metrics))
            self.log.info(f"epoch {epoch} | step {self.global_step} | {shown} | {duration_s:.1f} s")
        self.last_metrics = metrics
        progress = Progress(epoch, self.global_step, metrics)

        def write(filename: str) -> None:
            write_checkpoint(
                self.run_path,
                filename,
                self.model,
                progress,
                self.job.monitor,
                tp=self.tp,
                dp=self.dp,
            )

        def remove(filename: str) -> None:
            if self.dp.rank == 0:
                (rank_folder(self.run_path, self.tp.rank) / filename).unlink(missing_ok=True)

        self.keeper.update(progress, write, remove)

    def _test_best(self) -> dict[str, float]:
        if self.job.test is None:
            return {}
        if self.keeper.best is not None:
            path = rank_folder(self.run_path, self.tp.rank) / self.keeper.best.filename
            self.model.load_state_dict(read_checkpoint(path)["state_dict"])
        evaluation = self.evaluate(self.job.test, self.config.model.test_ds.batch_size)
        metrics = named_metrics(evaluation, "test")
        self.log.metrics({"step": self.global_step, **metrics})
        return metrics

    def _final_table(self, result: FitResult, tokens: int, duration_s: float) -> None:
        rows = [
            ("optimizer steps", str(result.global_step)),
            ("time", f"{duration_s:.1f} s, {tokens / duration_s:.0f} tokens/s"),
            ("memory of rank 0", f"{peak_memory_bytes() / 2**20:.0f} MiB at its peak"),
        ]
        if self.keeper.best is not None:
            rows.append(("best checkpoint", self.keeper.best.filename))
        rows += format_metrics(result.best or result.last)
        rows += format_metrics(result.test)
        rows.append(("run", str(result.path)))
        self.log.table(f"{self.config.exp_manager.name}: finished", rows)


def epoch_order(num_examples: int, seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
    """The order of the examples in an epoch: a function of the seed and the epoch alone."""
    if not shuffle:
        return list(range(num_examples))
    generator = torch.Generator().manual_seed(step_seed(seed, _ORDER_STREAM + epoch))
    return torch.randperm(num_examples, generator=generator).tolist()


def own_share(batch: Sequence[Example], dp: DataParallelGroup) -> list[Example]:
    """Every `dp.size`-th example in order of length, so that ranks get about as many tokens."""
    return sorted(batch, key=lambda example: (len(example), example.index))[dp.rank :: dp.size]


def named_metrics(evaluation: Evaluation, part: str) -> dict[str, float]:
    """Loss and metrics under the names of `part`: val_loss, val_accuracy."""
    loss = {} if evaluation.loss is None else {"loss": evaluation.loss}
    return {f"{part}_{name}": value for name, value in (loss | evaluation.metrics).items()}
