"""The training loop.

An optimizer step is defined on the whole: its batches are formed from the seed and the epoch
alone, then cut over the data-parallel ranks; the loss is the sum over all labels of the step
divided by their number, wherever they are. So loss and gradient do not depend on the number of
ranks, on how batches were cut, or on accumulation; only rounding does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tpcore.models.bert import BertModel
from tpcore.parallel.collectives import all_reduce
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.random import step_seed
from tpcore.parallel.sharding import sharding_table
from tpcore.tasks.sections import DataConfig
from tpcore.tasks.task import Dataset, Example, TaskBatch, VariesByEpoch
from tpcore.train.batching import epoch_batches, own_share
from tpcore.train.checkpoint_files import Progress
from tpcore.train.data_parallel import parallelize
from tpcore.train.evaluation import Evaluation, evaluate, named_metrics
from tpcore.train.faults import (
    SIGNALS,
    DivergedError,
    StoppedError,
    StopSignals,
    Watchdog,
    agreed_signal,
    describe_ranks,
    watchdog_store,
)
from tpcore.train.gradients import (
    clip_factor,
    gradient_norm,
    has_overflow,
    scale_gradients,
    sum_gradients,
)
from tpcore.train.logging import RunLog, format_metrics
from tpcore.train.optimizer import build_optimizer, freeze, set_learning_rate, step_weights
from tpcore.train.precision import LossScaler, precision_of
from tpcore.train.prepare import Job
from tpcore.train.review import write_review
from tpcore.train.run_state import RunChoice
from tpcore.train.saving import FitResult, Position, RunStore, TrainingState
from tpcore.train.utilization import Utilization, device_memory_bytes


class StepResult(NamedTuple):
    """One optimizer step, equal on all ranks."""

    loss: float
    grad_norm: float
    """Before clipping."""
    skipped: bool = False
    """Gradients overflowed, and the loss scale is lower now."""
    signal: int | None = None
    """A rank was told to stop."""


class Trainer:
    """Trains one model on one job; every rank has one.

    Args:
        job: What to do, from `prepare`.
        model: This rank's part of the model, in float32.
        tp: The ranks that share a copy of the model.
        dp: The ranks that hold the same part.
        run: Folder of the run, the same on all ranks; `fit` makes it or goes on in it.
        log: Speaks on global rank 0.
    """

    def __init__(
        self,
        job: Job,
        model: BertModel,
        *,
        tp: TensorParallelGroup,
        dp: DataParallelGroup,
        run: RunChoice,
        log: RunLog,
    ) -> None:
        self.job, self.config, self.task = job, job.config, job.task
        self.model, self.tp, self.dp = model, tp, dp
        self.log, self.run_path = log, run.path
        self.device = next(model.parameters()).device
        self.num_frozen = freeze(model, self.config.model.frozen_parameters)
        self.precision = precision_of(self.config.trainer.precision)
        self.shardings = sharding_table(model)
        kind = self.config.trainer.data_parallel
        self.loss_sums, self.weights = parallelize(model, self.task, dp, kind, self.precision)
        self.optimizer = build_optimizer(
            self.weights.main, self.config.model.optim, self.weights.copies
        )
        self.scaler = LossScaler(
            self.config.trainer.loss_scale,
            self.config.trainer.loss_scale_window,
            enabled=self.precision.scales_loss,
        )
        self.schedule = job.schedule
        self.seed = self.config.trainer.seed
        self.utilization = Utilization(
            job.encoder,
            tensor_parallel_size=tp.size,
            data_parallel_size=dp.size,
            device=self.device,
            dtype=self.precision.autocast or self.precision.weights,
            # Only the rank that speaks measures; a speed that nobody sees costs a second.
            peak_tflops=self.config.trainer.peak_tflops if log.enabled else 0.0,
        )
        self.num_predicted = 0
        self.position = Position()
        # A rank with an empty share must still know how many terms the loss has.
        self.num_terms = len(self.task.label_counts(self._some_batch()))
        self.signals = StopSignals()
        self.watchdog = Watchdog(
            watchdog_store(),
            dp.rank * tp.size + tp.rank,
            describe_ranks(tp.size, dp.size),
            self.config.trainer.timeout_s,
        )
        self.store = RunStore(
            job,
            run,
            TrainingState(
                model, self.weights, self.shardings, self.optimizer, self.scaler, self.position
            ),
            tp=tp,
            dp=dp,
            log=log,
            beat=self.watchdog.beat,
        )

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        return self.position.global_step

    @property
    def run_key(self) -> int:
        """Names the dropout bits of the next step."""
        return step_seed(self.seed, self.global_step)

    def fit(self) -> FitResult:
        """Train, validate, keep checkpoints; test the best one at the end.

        Raises:
            DivergedError: names the step, its examples and the last good checkpoint.
            StoppedError: a signal came; the state is saved.
        """
        self.store.check_monitor(self.evaluate)
        self.store.open()
        started, tokens = time.perf_counter(), self.position.tokens
        self.log.start_progress(self.job.total_steps, self.global_step)
        with self.signals, self.watchdog:
            self._train()
            self.log.stop_progress()
            self.watchdog.beat("the end of the run")
            result = FitResult(
                path=self.run_path,
                global_step=self.global_step,
                last=dict(self.store.last_metrics),
                best={} if self.store.best is None else dict(self.store.best.metrics),
                test=self._test_best(),
            )
            self.store.finish(result)
        tokens = self.position.tokens - tokens
        self._final_table(result, tokens, time.perf_counter() - started)
        return result

    def _train(self) -> None:
        position = self.position
        self.model.train()
        while position.epoch < self.config.trainer.max_epochs:
            if position.step_in_epoch and not position.is_validated:  # stopped right before it
                self._validate_if_due()
            for batches in self.epoch_batches(position.epoch, position.step_in_epoch):
                if self.store.is_done:
                    return
                signal = self._logged_step(batches)
                if signal is None:
                    self._validate_if_due()
                    self.store.save_if_due()
                else:
                    self._stop(signal)
            position.epoch, position.step_in_epoch = position.epoch + 1, 0

    def epoch_batches(self, epoch: int, done: int = 0) -> Iterator[list[list[Example]]]:
        """The batches of each optimizer step of an epoch, before they are cut over ranks.

        Args:
            epoch: counted from 0.
            done: steps to leave out.
        """
        examples = self.job.train.examples
        # Batches follow from the data as they were read, whatever an epoch makes of them.
        batches = epoch_batches(examples, self.config.model.train_ds, self.seed, epoch)
        if isinstance(self.task, VariesByEpoch):
            examples = self.task.examples_at(self.job.train, self.seed, epoch)
        size = self.config.trainer.accumulate_grad_batches
        for start in range(done * size, len(batches), size):
            yield [[examples[i] for i in batch] for batch in batches[start : start + size]]

    def train_step(self, batches: Sequence[Sequence[Example]], lr: float) -> StepResult:
        """One optimizer step over whole batches.

        loss = sum_k (sum of losses_k over all batches and ranks) / (sum of counts_k, likewise)
        """
        shares = [own_share(batch, self.dp) for batch in batches]
        cut = [self.task.collate(share, self.device) for share in shares if share]
        counts = torch.zeros(self.num_terms, dtype=torch.float64)
        for batch in cut:
            counts += torch.tensor(self.task.label_counts(batch), dtype=torch.float64)
        counts = self._over_ranks(counts.to(self.device))
        divisor = torch.where(counts > 0, counts, 1.0).float()

        heads = [batch.head_labels for batch in cut if batch.head_labels is not None]
        self.num_predicted = sum(len(labels.index) for labels in heads)
        seed = torch.tensor([self.run_key], device=self.device)
        total = torch.zeros(self.num_terms, dtype=torch.float64, device=self.device)
        self.weights.zero_gradients()
        # Ranks that meet in the backward must all have one, those that meet in layers equally many.
        num_batches = len(shares) if self.loss_sums.in_step else int(self.loss_sums.meets)
        idle = [self._some_batch()] * (num_batches - len(cut))
        for number, batch in enumerate([*cut, *idle], start=1):
            with self.loss_sums.context(is_last=number == len(cut) + len(idle)):
                with self.precision.context(self.device):
                    sums = self.loss_sums(batch, seed) * float(number <= len(cut))
                ((sums / divisor).sum() * self.scaler.scale).backward()
            total += sums.detach()
        self.weights.collect_gradients()
        parameters = self.weights.main.values()
        if not self.loss_sums.meets:
            sum_gradients(parameters, self.dp)
        overflow = False
        if self.scaler.enabled:
            scale_gradients(parameters, 1 / self.scaler.scale)
            overflow = has_overflow(parameters)
        flags = [float(overflow), *self.signals.flags]
        main, shards = self.weights.main, self.weights.shards
        norm, flags = gradient_norm(main, self.shardings, self.tp, flags, shards)
        # What one rank knows, all must know before one of them decides.
        known = all_reduce(torch.cat([total, total.new_tensor(flags)]), self.dp)
        loss = (known[: self.num_terms] / divisor).sum().item()
        overflow, *signals = known[self.num_terms :].tolist()
        result = StepResult(loss, norm.item(), bool(overflow), agreed_signal(signals))
        self._check_finite(result, batches)
        self.scaler.update(overflow=result.skipped)
        if result.skipped:
            return result
        clip = self.config.trainer.gradient_clip_val
        set_learning_rate(self.optimizer, lr)
        step_weights(
            self.optimizer, self.weights, None if clip is None else clip_factor(norm, clip)
        )
        return result

    def _some_batch(self) -> TaskBatch:
        """For a rank without examples."""
        return self.task.collate(self.job.train.examples[:1], self.device)

    def _over_ranks(self, counts: Tensor) -> Tensor:
        """Label counts of the whole step. An average of per-rank means would not be its loss."""
        return all_reduce(counts, self.dp)

    def evaluate(self, dataset: Dataset, data: DataConfig) -> Evaluation:
        """The model as it is now, over a dataset; equal on all ranks."""
        return evaluate(
            self.model,
            self.task,
            dataset,
            data=data,
            dp=self.dp,
            device=self.device,
            autocast=lambda: self.precision.context(self.device),
            beat=self.watchdog.beat,
            predict=self.loss_sums.predict,
            in_step=self.loss_sums.in_step,
        )

    def _logged_step(self, batches: Sequence[Sequence[Example]]) -> int | None:
        """Train one step and tell about it; returns the signal to stop for."""
        started = time.perf_counter()
        self.watchdog.beat(f"step {self.global_step + 1}")
        lr = self.schedule.learning_rate(self.global_step)
        result = self.train_step(batches, lr)
        tokens = sum(len(example) for batch in batches for example in batch)
        self.position.advance(tokens)
        duration_s = time.perf_counter() - started
        record = {
            "step": self.global_step,
            "epoch": self.position.epoch,
            "train_loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": tokens,
            "tokens_per_s": tokens / duration_s,
            "memory_mib": device_memory_bytes(self.device) / 2**20,
        }
        lengths = [len(example) for batch in batches for example in batch]
        utilization = self.utilization.of_step(
            lengths,
            self.num_predicted,
            duration_s,
            first_tokens_only=self.model.reads_first_tokens,
        )
        if utilization is not None:
            record["mfu"] = utilization
        if self.scaler.enabled:
            record |= {"loss_scale": self.scaler.scale, "skipped": result.skipped}
        due = self.global_step % self.config.trainer.log_every_n_steps == 0
        if due or self.global_step == 1:
            self.log.metrics(record)
        self.log.step(record, self.job.total_steps, line=due or self.global_step == 1)
        return result.signal

    def _check_finite(self, result: StepResult, batches: Sequence[Sequence[Example]]) -> None:
        for name, value in (("loss", result.loss), ("gradient norm", result.grad_norm)):
            if not abs(value) < float("inf") and not (result.skipped and name != "loss"):
                raise DivergedError(self.store.describe_divergence(name, value, batches))
        if self.scaler.is_exhausted:
            raise DivergedError(
                self.store.describe_divergence("loss scale", self.scaler.scale, batches)
            )

    def _validate_if_due(self) -> None:
        interval = self.config.trainer.val_check_interval
        if interval > 1:
            due = self.global_step % int(interval) == 0
        else:
            steps = max(1, int(interval * self.job.steps_per_epoch))
            due = self.position.step_in_epoch % steps == 0
        if not (due or self.global_step == self.job.total_steps):
            return
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        epoch, step = self.position.epoch, self.global_step
        if self.job.validation is not None:
            self.watchdog.beat(f"validation after step {step}")
            evaluation = self.evaluate(self.job.validation, self.config.model.validation_ds)
            metrics = named_metrics(evaluation, "val")
            duration_s = time.perf_counter() - started
            self.log.metrics({"step": step, "epoch": epoch, **metrics})
            if self.log.enabled:
                data, log = self.job.validation, self.log
                write_review(self.run_path, data, evaluation, epoch=epoch, step=step, log=log)
            shown = " | ".join(f"{name} {value}" for name, value in format_metrics(metrics))
            self.log.info(f"epoch {epoch} | step {step} | {shown} | {duration_s:.1f} s")
        self.position.is_validated = True
        self.store.save_best_and_last(Progress(epoch, step, metrics))

    def _stop(self, number: int) -> None:
        self.log.stop_progress()
        name = SIGNALS[[int(n) for n in SIGNALS].index(number)].name
        self.store.save_last()
        text = f"stopped by {name} after step {self.global_step}; {self.store.where_to_resume}"
        self.log.info(text)
        raise StoppedError(text, number)

    def _test_best(self) -> dict[str, float]:
        self.store.load_best()
        if self.job.test is None:
            return {}
        self.watchdog.beat("the test")
        evaluation = self.evaluate(self.job.test, self.config.model.test_ds)
        metrics = named_metrics(evaluation, "test")
        self.log.metrics({"step": self.global_step, **metrics})
        return metrics

    def _final_table(self, result: FitResult, tokens: int, duration_s: float) -> None:
        rows = [
            ("optimizer steps", str(result.global_step)),
            ("time", f"{duration_s:.1f} s, {tokens / duration_s:.0f} tokens/s"),
            ("memory of rank 0", f"{device_memory_bytes(self.device) / 2**20:.0f} MiB at its peak"),
        ]
        if self.num_frozen:
            rows.append(("frozen parameters", str(self.num_frozen)))
        if self.store.best is not None:
            rows.append(("best checkpoint", self.store.best.filename))
        rows += format_metrics(result.best or result.last)
        rows += format_metrics(result.test)
        rows.append(("run", str(result.path)))
        self.log.table(f"{self.config.exp_manager.name}: finished", rows)
