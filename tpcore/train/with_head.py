"""A checkpoint that has a head of its own, used as it is: no run of tpcore made it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError
from tpcore.models.bert import BertModel
from tpcore.parallel.group import TensorParallelGroup
from tpcore.tasks import Task, task_class
from tpcore.tokenizer import WordPieceTokenizer
from tpcore.train.config import TrainConfig
from tpcore.train.prepare import checkpoint_path, encoder_overrides, find_tokenizer
from tpcore.train.read_config import load_config


class LoadedHead(NamedTuple):
    """What a run needs beside its folder."""

    config: TrainConfig
    task: Task
    model: BertModel


def load_with_head(
    path: str | os.PathLike[str], settings: Sequence[str], tp: TensorParallelGroup
) -> LoadedHead:
    """A checkpoint of any format with the head of a task.

    Args:
        path: the checkpoint, with its vocabulary beside it unless a setting names one.
        settings: `key=value` of a configuration; `task=...` says what the head is for. Labels are
            those of `model.class_labels.class_labels_file`, else those of Hugging Face's
            config.json.
        tp: the size to load at.

    Raises:
        CheckpointError: it has no such head, or another number of labels.
        ConfigError: a setting is wrong.
    """
    own = f"model.language_model.lm_checkpoint={json.dumps(str(path))}"
    config = load_config(None, [*settings, own])
    source = checkpoint_path(config.model)
    assert source is not None
    overrides = encoder_overrides(config.model)
    info = checkpoint.inspect(source, **overrides)
    cls = task_class(config.task)
    if info.head != cls.head_name:
        raise CheckpointError(
            f"{path} has {'no head' if info.head is None else f'the head {info.head}'}, and "
            f"task={config.task} needs {cls.head_name}; give a checkpoint that was fine-tuned for "
            "it, or `tpcore finetune` this one"
        )
    tokenizer = find_tokenizer(config.model, source)
    task = _task(config, info.labels, cls, tokenizer)
    model = checkpoint.load(
        source,
        tp=tp,
        head=cls.head_name,
        head_kwargs=task.head_kwargs(),
        dtype=torch.float32,
        **(overrides | {"vocab_size": tokenizer.vocab_size}),
    )
    return LoadedHead(config, task, model)


def _task(
    config: TrainConfig,
    stored: Sequence[str] | None,
    cls: type[Task],
    tokenizer: WordPieceTokenizer,
) -> Task:
    """The task with the checkpoint's own labels, where the settings name no file of them."""
    model = config.model
    section: Any = getattr(model, "class_labels", None)
    if not hasattr(section, "class_labels_file") or section.class_labels_file or not stored:
        return cls.create(model, tokenizer, None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "labels of the checkpoint"
        file.write_text("".join(f"{label}\n" for label in stored), encoding="utf-8")
        section.class_labels_file = str(file)
        try:
            return cls.create(model, tokenizer, None)
        finally:
            section.class_labels_file = None
