"""The files of one training: what is written when, and how a run continues from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcore.checkpoint.errors import CheckpointError
from tpcore.models.bert import BertModel
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.sharding import Sharding
from tpcore.tasks.sections import DataConfig
from tpcore.tasks.task import Dataset, Example
from tpcore.train.checkpoint_files import (
    CHECKPOINT_FOLDER,
    Manifest,
    Progress,
    find_file,
    list_checkpoints,
    read_all_ranks,
    read_checkpoint,
    read_manifest,
    remove_checkpoint,
    usable_checkpoints,
    write_checkpoint,
    write_json_atomically,
)
from tpcore.train.config import ConfigError
from tpcore.train.evaluation import Evaluation, named_metrics
from tpcore.train.facts import environment_facts
from tpcore.train.keeper import CheckpointKeeper, EarlyStopping, Kept
from tpcore.train.launch import of_first_rank, on_all_ranks
from tpcore.train.logging import RunLog
from tpcore.train.nemo_file import rebuild, save_nemo
from tpcore.train.precision import LossScaler, Weights, precision_of
from tpcore.train.prepare import Job
from tpcore.train.run_state import (
    RESULT_FILE,
    RunChoice,
    check_resumable,
    continue_run,
    create_run,
    forget_metrics_after,
)
from tpcore.train.training_state import (
    group_steps,
    load_group_steps,
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    own_optimizer_state,
    own_weights,
    random_states_of,
    sharded_dims,
)

_SHOWN_EXAMPLES = 16


@dataclass
class Position:
    """Where a training stands in its data."""

    epoch: int = 0
    step_in_epoch: int = 0
    """Optimizer steps of this epoch that are done."""
    global_step: int = 0
    tokens: int = 0
    """That all ranks together have trained on."""
    is_validated: bool = False
    """Whether the validation that was due after the last step has been done."""

    def advance(self, tokens: int) -> None:
        """One more step is done."""
        self.step_in_epoch += 1
        self.global_step += 1
        self.tokens += tokens
        self.is_validated = False

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be where `dataclasses.asdict` of another one was."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, state[field.name])


@dataclass(frozen=True)
class TrainingState:
    """What changes while a model is trained."""

    model: BertModel
    weights: Weights
    shardings: Mapping[str, Sharding]
    optimizer: torch.optim.Optimizer
    scaler: LossScaler
    position: Position


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


class RunStore:
    """Writes and reads the files of one training; on every rank.

    Args:
        job: what is trained.
        run: the folder.
        state: what is written, and put back.
        tp: the ranks that share a copy of the model.
        dp: the ranks that hold the same part.
        log: hears what happens.
        beat: is told of writing, which may take long.
    """

    def __init__(
        self,
        job: Job,
        run: RunChoice,
        state: TrainingState,
        *,
        tp: TensorParallelGroup,
        dp: DataParallelGroup,
        log: RunLog,
        beat: Callable[[str], None],
    ) -> None:
        self.job, self.path, self.resumes, self.state = job, run.path, run.resumes, state
        self.tp, self.dp, self.log, self.beat = tp, dp, log, beat
        self.is_first = self.tp.rank == 0 and self.dp.rank == 0
        self.config, self.monitor = job.config, job.monitor
        self.params = self.config.exp_manager.checkpoint_callback_params
        has_validation = job.validation is not None
        self.keeper = CheckpointKeeper(
            name=self.config.exp_manager.name,
            monitor=self.monitor,
            save_top_k=self.params.save_top_k if has_validation else 0,
            save_last=self.params.save_last,
            name_steps=self.config.trainer.val_check_interval != 1.0,
        )
        self.last_metrics: Mapping[str, float] = {}
        stopping = self.config.exp_manager.early_stopping_callback_params
        self.stopping: EarlyStopping | None = None
        if self.config.exp_manager.create_early_stopping_callback:
            if not has_validation:
                raise ConfigError(
                    "exp_manager.create_early_stopping_callback=true needs validation data; set "
                    "model.validation_ds, or leave it out"
                )
            monitor = job.stopping_monitor
            self.stopping = EarlyStopping(monitor, stopping.patience, stopping.min_delta)

    # --- the folder -----------------------------------------------------------------------------

    def check_monitor(self, evaluate: Callable[[Dataset, DataConfig], Evaluation]) -> None:
        """Refuse a metric that `evaluate` does not give, before anything is written."""
        keys = {"checkpoint_callback_params": self.monitor[0]}
        if self.stopping is not None:
            keys["early_stopping_callback_params"] = self.stopping.monitor[0]
        exp = self.config.exp_manager
        keys = {k: metric for k, metric in keys.items() if getattr(exp, k).monitor is not None}
        source = self.config.model.source("validation_ds")
        if not keys or source is None:
            return
        few = self.job.task.load(source, num_samples=2)
        known = named_metrics(evaluate(few, DataConfig(batch_size=2)), "val")
        for key, metric in keys.items():
            if metric not in known:
                raise ConfigError(
                    f"exp_manager.{key}.monitor={getattr(exp, key).monitor!r} is not a metric of "
                    f"this task; use one of {', '.join(known)}"
                )

    def open(self) -> None:
        """Make the folder, or go on in it from its newest usable checkpoint."""
        device = next(self.state.model.parameters()).device
        facts = environment_facts(self.tp, self.dp, device) if self.is_first else {}
        notes: list[str] = []

        def note(text: str) -> None:
            if text not in notes:
                notes.append(text)

        def prepare() -> list[Manifest]:
            if not self.is_first:
                return []
            if not self.resumes:
                create_run(self.path, self.config, self.state.model, self.job.task, facts)
                self.log.open_folder(self.path, tensorboard=self._tensorboard)
                return []
            notes.extend(check_resumable(self.path, self.config))
            notes.extend(f"passed over: {text}" for text in list_checkpoints(self.path)[1])
            continue_run(self.path, self.config, facts)
            found = usable_checkpoints(self.path, note)
            step = found[0].global_step if found else 0
            forget_metrics_after(self.path, step)
            self.log.open_folder(self.path, tensorboard=self._tensorboard, first_step=step + 1)
            return found

        found = of_first_rank(on_all_ranks(prepare, self.tp, self.dp), self.tp, self.dp)
        if not self.resumes:
            return
        for text in notes:
            self.log.info(text)
        if not found:
            self.log.info(f"{self.path} has no usable checkpoint; the run begins anew")
            return
        on_all_ranks(lambda: self._restore(found[0]), self.tp, self.dp)
        self.keeper.restore(found, self._remove)
        self.log.info(f"{self.path}: resumed from {found[0].filename}, step {found[0].global_step}")

    @property
    def _tensorboard(self) -> bool:
        return self.config.exp_manager.create_tensorboard_logger

    # --- checkpoints ----------------------------------------------------------------------------

    @property
    def best(self) -> Kept | None:
        """The best checkpoint so far."""
        return self.keeper.best

    @property
    def is_done(self) -> bool:
        """Whether there are no more steps to do."""
        stopped = self.stopping is not None and self.stopping.is_due
        return stopped or self.state.position.global_step >= self.job.total_steps

    def save_best_and_last(self, progress: Progress) -> None:
        """After a validation: whatever is to be kept of it."""
        self.last_metrics = progress.metrics
        if self.stopping is not None:
            self.stopping.update(progress.metrics)
            if self.stopping.is_due:
                metric = self.stopping.monitor[0]
                self.log.info(f"{metric} has not improved {self.stopping.num_bad} times: stopping")
        content = self._content()
        self.keeper.update(
            progress, lambda name: self._write(name, content, progress), self._remove
        )

    def save_if_due(self) -> None:
        """Every n steps, and not right after a validation, which has saved."""
        every = self.params.every_n_train_steps
        position = self.state.position
        if every and position.global_step % every == 0 and not position.is_validated:
            self.save_last()

    def save_last(self) -> None:
        """Write the latest checkpoint now."""
        position = self.state.position
        progress = Progress(position.epoch, position.global_step, self.last_metrics)
        self._write(self.keeper.last_filename, self._content(), progress)

    def load_best(self) -> None:
        """Put the best weights into the model, where there are any."""
        if self.best is None:
            return
        filename = self.best.filename
        # It may be older than the resumption of this run at another size.
        files = on_all_ranks(
            lambda: self._files(read_manifest(self.path, filename)), self.tp, self.dp
        )
        self._load_weights(files, filename)

    def finish(self, result: FitResult) -> None:
        """Write down that and how the run has ended."""
        if self.params.save_nemo_on_train_end:
            self._write_nemo()
        content = dataclasses.asdict(result) | {"path": str(result.path)}

        def write() -> None:
            if self.is_first:
                write_json_atomically(self.path / RESULT_FILE, content)

        on_all_ranks(write, self.tp, self.dp)

    def _write_nemo(self) -> None:
        """The weights that are in the model now, which are the best."""
        path = self.path / CHECKPOINT_FOLDER / f"{self.config.exp_manager.name}.nemo"
        self.beat(f"writing {path.name}")
        error: ValueError | None = None
        model, weights = self.state.model, self.state.weights
        state = weights.state_dict() if weights.is_wrapped else {}
        if self.dp.rank == 0:
            try:
                if weights.is_wrapped:
                    dtype = precision_of(self.config.trainer.precision).weights
                    model = rebuild(model, self.job.task, state, dtype)
                save_nemo(model, self.job.task, self.config, path)
            except ValueError as caught:
                error = caught

        def tell() -> None:
            if error is not None:
                raise error

        on_all_ranks(tell, self.tp, self.dp)

    def _content(self) -> dict[str, Any]:
        state = self.state
        weights = {name: t.detach().cpu() for name, t in state.weights.state_dict().items()}
        return {
            "state_dict": weights,
            "sharded_dim": sharded_dims(state.shardings, list(weights)),
            "training": {
                "optimizer": optimizer_state(state.optimizer, state.weights),
                "group_steps": group_steps(state.optimizer),
                "scaler": state.scaler.state_dict(),
                "stopping": None if self.stopping is None else self.stopping.state_dict(),
                "position": dataclasses.asdict(state.position),
                "last_metrics": dict(self.last_metrics),
                "random": random_states_of(self.dp),
            },
        }

    def _write(self, filename: str, content: Mapping[str, Any], progress: Progress) -> None:
        self.beat(f"writing {filename} after step {progress.global_step}")
        write_checkpoint(
            self.path, filename, content, progress, self.monitor, tp=self.tp, dp=self.dp
        )

    def _remove(self, filename: str) -> None:
        if self.is_first:
            remove_checkpoint(self.path, filename)

    def _restore(self, manifest: Manifest) -> None:
        state = self.state
        files = self._files(manifest)
        training = files[min(self.tp.rank, len(files) - 1)]["training"]
        try:
            self._load_weights(files, manifest.filename)
            load_optimizer_state(
                state.optimizer,
                state.weights,
                own_optimizer_state(files, state.model, state.weights.templates()),
            )
            load_group_steps(state.optimizer, training["group_steps"])
            state.scaler.load_state_dict(training["scaler"])
            if self.stopping is not None and training["stopping"] is not None:
                self.stopping.load_state_dict(training["stopping"])
            state.position.restore(training["position"])
            self.last_metrics = training["last_metrics"]
            states = training["random"]
            load_random_state(states[min(self.dp.rank, len(states) - 1)])
        except (KeyError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{self.path}: {manifest.filename} is no state that can be resumed: {error!r}"
            ) from error

    def _files(self, manifest: Manifest) -> list[dict[str, Any]]:
        """By writing rank; where as many wrote, this rank's own file stands for all."""
        if len(manifest.files) == self.tp.size:
            own = read_checkpoint(find_file(self.path, manifest, self.tp.rank))
            return [own] * self.tp.size
        return read_all_ranks(self.path, manifest.filename)

    def _load_weights(self, files: Sequence[Mapping[str, Any]], filename: str) -> None:
        weights = self.state.weights
        own = own_weights(files, self.state.model, weights.templates(), f"{self.path}: {filename}")
        weights.load_state_dict(own)

    # --- messages -------------------------------------------------------------------------------

    @property
    def where_to_resume(self) -> str:
        """What to do after a run was stopped."""
        last = self.keeper.last_filename
        return f"saved as {last} in {self.path}; go on with exp_manager.resume_if_exists=true"

    def describe_divergence(
        self, what: str, value: float, batches: Sequence[Sequence[Example]]
    ) -> str:
        """The message of a DivergedError; the examples of the step are written to a file."""
        step = self.state.position.global_step + 1
        source = self.job.train.source
        indices = [[example.index for example in batch] for batch in batches]
        manifests, _ = list_checkpoints(self.path)
        if self.is_first and self.path.is_dir():
            record = {"step": step, what: str(value), "file": source, "examples": indices}
            write_json_atomically(self.path / "diverged.json", record)
        flat = [index for batch in indices for index in batch]
        shown = ", ".join(map(str, flat[:_SHOWN_EXAMPLES]))
        more = f" and {len(flat) - _SHOWN_EXAMPLES} more" if len(flat) > _SHOWN_EXAMPLES else ""
        last = (
            f"the last good checkpoint is {manifests[0].filename} of step "
            f"{manifests[0].global_step} in {self.path}"
            if manifests
            else f"there is no checkpoint yet in {self.path}"
        )
        return (
            f"{what} is {value:g} at step {step}; lower model.optim.lr or warm up longer; its "
            f"examples are {shown}{more} of {source}, counted from 0; {last}"
        )
