"""A finished model as one `.nemo` file: weights, head, labels, vocabulary, task and configuration.

NeMo finds what it knows; what else tpcore needs is JSON under one key of model_config.yaml.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tpcore import checkpoint
from tpcore.checkpoint import nemo
from tpcore.checkpoint.errors import CheckpointError
from tpcore.models.bert import BertModel
from tpcore.parallel.group import TensorParallelGroup
from tpcore.tasks import Task, task_class
from tpcore.tokenizer import WordPieceTokenizer
from tpcore.train.config import TrainConfig
from tpcore.train.read_config import load_config

KEY = "tpcore"


@dataclass(frozen=True)
class NemoRun:
    """What a file gives back."""

    config: TrainConfig
    task: Task
    model: BertModel


def save_nemo(
    model: BertModel,
    task: Task,
    config: TrainConfig,
    path: Path,
    *,
    tensor_parallel_size: int | None = None,
) -> None:
    """Write a model with its task; every rank of the model's tensor-parallel group calls it.

    Args:
        model: with the head of the task.
        task: its settings and tokenizer.
        config: the run's.
        path: the file, which is replaced.
        tensor_parallel_size: of the file; None: that of the model.

    Raises:
        CheckpointError: it cannot be written.
    """
    settings = {"name": task.name, **task.to_config()}
    own = {
        "task": settings,
        "lowercase": task.tokenizer.lowercase,
        "config": OmegaConf.to_yaml(OmegaConf.structured(config)),
    }
    length = config.model.dataset.max_seq_length
    with tempfile.TemporaryDirectory(prefix="tpcore-nemo-") as folder:
        task.tokenizer.save(Path(folder))
        checkpoint.save(
            model,
            path,
            format="nemo",
            tensor_parallel_size=tensor_parallel_size,
            labels=settings.get("labels"),
            tokenizer_files=sorted(Path(folder).iterdir()),
            nemo_config={KEY: json.dumps(own), "dataset": {"max_seq_length": length}},
            overwrite=True,
        )


def load_nemo(path: Path, tp: TensorParallelGroup) -> NemoRun:
    """Load a file that `save_nemo` wrote, at the size of `tp`.

    Raises:
        CheckpointError: another program's file, or a damaged one.
    """
    contents = nemo.contents(path)
    text = contents.config.get(KEY)
    if not isinstance(text, str) or contents.vocabulary is None:
        raise CheckpointError(
            f"{path} says nothing about a task of tpcore's; fine-tune from it with "
            f"model.language_model.lm_checkpoint={path}, or convert it"
        )
    try:
        own: dict[str, Any] = json.loads(text)
        settings = dict(own["task"])
        with tempfile.TemporaryDirectory(prefix="tpcore-nemo-") as folder:
            (Path(folder) / "config.yaml").write_text(own["config"], encoding="utf-8")
            config = load_config(Path(folder) / "config.yaml")
            vocabulary = Path(folder) / "vocab.txt"
            vocabulary.write_text("".join(f"{t}\n" for t in contents.vocabulary), encoding="utf-8")
            tokenizer = WordPieceTokenizer.from_vocab_file(vocabulary, lowercase=own["lowercase"])
        task = task_class(settings.pop("name")).from_config(settings, tokenizer)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its key {KEY} is damaged: {error}") from error
    model = checkpoint.load(
        path,
        tp=tp,
        head=task.head_name,
        head_kwargs=task.head_kwargs(),
        vocab_size=tokenizer.vocab_size,
    )
    return NemoRun(config, task, model.float())
