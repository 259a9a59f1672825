"""A finished model as one `.nemo` file: weights, head, labels, vocabulary, task and configuration.

NeMo finds what it knows; what else tpcore needs is JSON under one key of model_config.yaml. Files
that NeMo itself has written are read too, see `nemo_settings`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from tpcore import checkpoint
from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.formats import nemo
from tpcore.models.bert import BertModel
from tpcore.models.heads import build_head
from tpcore.parallel.group import TensorParallelGroup
from tpcore.tasks import Task, task_class
from tpcore.tokenizer import WordPieceTokenizer
from tpcore.train.config import TrainConfig
from tpcore.train.nemo_settings import read_nemo
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


def rebuild(
    model: BertModel, task: Task, state: Mapping[str, Tensor], dtype: torch.dtype
) -> BertModel:
    """A model of plain tensors, as `model` was before something took its parameters over.

    Args:
        model: says sizes and ranks.
        task: says the head.
        state: its weights, of this tensor-parallel rank.
        dtype: of the parameters.
    """
    device = next(iter(state.values())).device
    plain = BertModel(model.config, tp=model.tp, device=device, dtype=dtype)
    head = build_head(
        task.head_name, model.config, tp=model.tp, device=device, dtype=dtype, **task.head_kwargs()
    )
    plain.head = head
    plain.load_state_dict(state)
    return plain


def load_nemo(path: Path, tp: TensorParallelGroup) -> NemoRun:
    """Load a file that `save_nemo` or NeMo wrote, at the size of `tp`.

    Raises:
        CheckpointError: it does not say what it is for, or is damaged.
    """
    config, task = describe_nemo(path)
    model = checkpoint.load(
        path,
        tp=tp,
        head=task.head_name,
        head_kwargs=task.head_kwargs(),
        vocab_size=task.tokenizer.vocab_size,
    )
    return NemoRun(config, task, model.float())


def describe_nemo(path: Path) -> tuple[TrainConfig, Task]:
    """The configuration and the task of a file that `save_nemo` or NeMo wrote; reads no weights.

    Raises:
        CheckpointError: it does not say what it is for, or is damaged.
    """
    contents = nemo.contents(path)
    text = contents.config.get(KEY)
    if text is None:
        return read_nemo(contents, path)
    try:
        if not isinstance(text, str) or contents.vocabulary is None:
            raise ValueError("no text beside a vocabulary")
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
    return config, task
