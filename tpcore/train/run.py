"""A finished run, loaded for use: predictions and evaluation at any tensor-parallel size.

run = load_run("runs/sms_spam/2026-11-24_09-30-00")
run.predict(["You have won a prize"])
run.evaluate("validation.tsv").metrics
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tpcore import checkpoint
from tpcore.checkpoint import CheckpointInfo
from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.folders import check_apart
from tpcore.checkpoint.state import check_tensor_parallel_size
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import build_head
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.tasks import Dataset, Task, task_class
from tpcore.tasks.sections import DataConfig
from tpcore.tokenizer import WordPieceTokenizer
from tpcore.train.checkpoint_files import (
    find_checkpoint,
    list_checkpoints,
    read_all_ranks,
    read_manifest,
)
from tpcore.train.config import TrainConfig
from tpcore.train.evaluation import Evaluation, evaluate
from tpcore.train.nemo_file import load_nemo
from tpcore.train.read_config import load_config
from tpcore.train.run_folder import CONFIG_FILE, MODEL_FILE, TASK_FILE
from tpcore.train.run_state import TOKENIZER_FOLDER, find_run, read_json
from tpcore.train.training_state import own_weights
from tpcore.train.with_head import load_with_head


@dataclass(frozen=True)
class Run:
    """A fine-tuned model with its task."""

    path: Path
    checkpoint: str
    """File name of the checkpoint that was loaded."""
    config: TrainConfig
    task: Task
    model: BertModel
    dp: DataParallelGroup
    device: torch.device

    def predict(
        self,
        inputs: Iterable[Any],
        *,
        batch_size: int = 64,
        max_tokens_per_batch: int | None = None,
    ) -> list[Any]:
        """One prediction for each input, in order; what inputs are is up to the task.

        Batches hold inputs of similar length: `batch_size` of them, or as many as have
        `max_tokens_per_batch` tokens.
        """
        if isinstance(inputs, str | bytes):
            raise TypeError(f"inputs is one {type(inputs).__name__}; expected several, as [text]")
        dataset = self.task.from_inputs(inputs)
        if not dataset.examples:
            return []
        return self.evaluate_dataset(dataset, batch_size, max_tokens_per_batch).predictions

    def evaluate(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> Evaluation:
        """Loss, metrics and predictions on a labelled file; None: the run's test or validation set.

        Raises:
            DataError: the file cannot be used.
        """
        return self.evaluate_dataset(self.load(path), batch_size, max_tokens_per_batch)

    def load(self, path: str | os.PathLike[str] | None = None) -> Dataset:
        """The dataset that `evaluate` would read."""
        model = self.config.model
        source = path or model.source("test_ds") or model.source("validation_ds")
        if source is None:
            raise ValueError(f"{self.path} has no test or validation file; give one")
        return self.task.load(source)

    def evaluate_dataset(
        self,
        dataset: Dataset,
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> Evaluation:
        """The same on a dataset that `load` or the task has read.

        Without a size, batches are those of the run's validation data.
        """
        data: DataConfig = self.config.model.validation_ds
        if batch_size or max_tokens_per_batch:
            data = DataConfig(
                batch_size=batch_size or data.batch_size, max_tokens_per_batch=max_tokens_per_batch
            )
        return evaluate(
            self.model,
            self.task,
            dataset,
            data=data,
            dp=self.dp,
            device=self.device,
        )


def load_run(
    path: str | os.PathLike[str],
    *,
    tp: TensorParallelGroup | None = None,
    dp: DataParallelGroup | None = None,
    which: str = "best",
    device: torch.device | str | None = None,
    settings: Sequence[str] | None = None,
) -> Run:
    """Load a run at the size of `tp`, whatever size it was trained at.

    Args:
        path: a run folder, a folder above it: then its newest run, or the `.nemo` file of a run;
            with `settings`, a checkpoint of any format that has a head.
        tp: None: this process alone.
        dp: None: this process alone.
        which: the checkpoint: "best", "last" or a file name.
        device: where the model goes; None: the CPU.
        settings: `key=value` of a configuration for a checkpoint that is no run: `task=...`, and
            what else the task needs to know.

    Raises:
        CheckpointError: no run, a missing or damaged file, a size that does not divide the heads.
    """
    tp = TensorParallelGroup.single() if tp is None else tp
    dp = DataParallelGroup.single() if dp is None else dp
    target = torch.device(device or "cpu")
    if settings or Path(path).is_file():
        loaded = load_with_head(path, settings, tp) if settings else load_nemo(Path(path), tp)
        return Run(
            path=Path(path),
            checkpoint=Path(path).name,
            config=loaded.config,
            task=loaded.task,
            model=loaded.model.to(target).eval(),
            dp=dp,
            device=target,
        )
    folder = find_run(path)
    description = read_json(folder / MODEL_FILE)
    task_config = read_json(folder / TASK_FILE)
    config = load_config(folder / CONFIG_FILE)
    try:
        encoder = BertConfig.from_dict(description["config"]).replace(padded_vocab_size=None)
        check_tensor_parallel_size(encoder, tp.size)
        task = task_class(task_config.pop("task")).from_config(
            task_config, WordPieceTokenizer.from_file(folder / TOKENIZER_FOLDER)
        )
        _check_consistent(folder, description, task, encoder)
        model = BertModel(encoder, tp=tp, dtype=torch.float32)
        model.head = build_head(description["head"], encoder, tp=tp, **description["head_kwargs"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: {MODEL_FILE} or {TASK_FILE} is damaged: {error}"
        ) from error
    filename = find_checkpoint(folder, which)
    files = read_all_ranks(folder, filename)
    model.load_state_dict(own_weights(files, model, model.state_dict(), f"{folder}: {filename}"))
    return Run(
        path=folder,
        checkpoint=filename,
        config=config,
        task=task,
        model=model.to(target).eval(),
        dp=dp,
        device=target,
    )


def export_run(
    path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    format: Literal["megatron", "huggingface"],
    tensor_parallel_size: int = 1,
    overwrite: bool = False,
) -> CheckpointInfo:
    """Write a run's best checkpoint, head included, as a checkpoint that other programs read.

    Raises:
        CheckpointError: as `load_run` and `checkpoint.save`.
    """
    check_apart(Path(destination), find_run(path))
    run = load_run(path)
    folder = run.path / TOKENIZER_FOLDER
    checkpoint.save(
        run.model,
        Path(destination),
        format=format,
        tensor_parallel_size=tensor_parallel_size if format == "megatron" else None,
        labels=run.task.to_config().get("labels"),
        tokenizer_files=sorted(folder.iterdir()),
        overwrite=overwrite,
    )
    return checkpoint.inspect(Path(destination))


def describe_run(path: Path) -> dict[str, Any]:
    """Facts about a run, for people and JSON; reads no weights."""
    filename = find_checkpoint(path)
    manifest = read_manifest(path, filename)
    description = read_json(path / MODEL_FILE)
    return {
        "path": str(path),
        "format": "tpcore run",
        "task": read_json(path / TASK_FILE)["task"],
        "head": description["head"],
        "head_kwargs": description["head_kwargs"],
        "checkpoints": sorted(manifest.filename for manifest in list_checkpoints(path)[0]),
        "best checkpoint": filename,
        "epoch": manifest.epoch,
        "global_step": manifest.global_step,
        "metrics": dict(manifest.metrics),
        "tensor_model_parallel_size": len(manifest.files),
        "config": description["config"],
    }


def _check_consistent(
    folder: Path, description: Mapping[str, Any], task: Task, encoder: BertConfig
) -> None:
    """Refuse files of a run that do not belong together: nothing else would notice."""
    entries = task.tokenizer.vocab_size
    if entries != encoder.vocab_size:
        raise CheckpointError(
            f"{folder / TOKENIZER_FOLDER}: its vocabulary has {entries} entries, but the model was "
            f"trained with {encoder.vocab_size}; restore the file"
        )
    wanted, found = task.head_kwargs().get("num_labels"), description["head_kwargs"]
    if wanted is not None and wanted != found["num_labels"]:
        raise CheckpointError(
            f"{folder}: {TASK_FILE} has {wanted} labels, but {MODEL_FILE} a head of "
            f"{found['num_labels']}; restore the file"
        )
