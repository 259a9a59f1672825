"""A tiny encoder, its vocabulary and a learnable data file, made in code."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tpcore import checkpoint
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.tokenizer import SPECIAL_TOKENS
from tpcore.train.checkpoint_files import (
    Manifest,
    StoredFile,
    manifest_path,
    write_json_atomically,
)
from tpcore.train.config import TrainConfig
from tpcore.train.read_config import load_config

GOOD = ("good", "great", "fine", "nice", "lovely")
BAD = ("bad", "awful", "poor", "nasty", "ugly")
OTHER = ("the", "film", "was", "a", "very", "day", "food", "and", "it", "is", "book", "house")
VOCABULARY = (*SPECIAL_TOKENS, *GOOD, *BAD, *OTHER, "##s", "##ly")

CONFIG = BertConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=32,
    init_std=0.2,
)


def write_data(path: Path, count: int, seed: int = 0) -> Path:
    """`label<TAB>text` lines of unequal lengths; one word of each text decides its label."""
    generator = torch.Generator().manual_seed(seed)

    def draw(number: int) -> int:
        return int(torch.randint(number, (1,), generator=generator, device="cpu"))

    lines = []
    for index in range(count):
        label, words = ("pos", GOOD) if index % 2 else ("neg", BAD)
        text = [OTHER[draw(len(OTHER))] for _ in range(2 + draw(12))]
        text.insert(draw(len(text)), words[draw(len(words))])
        lines.append(f"{label}\t{' '.join(text)}\n")
    path.write_text("".join(lines))
    return path


def write_vocabulary(path: Path) -> Path:
    path.write_text("".join(f"{token}\n" for token in VOCABULARY))
    return path


def write_checkpoint(folder: Path, tensor_parallel_size: int = 2) -> Path:
    """A Megatron directory with a vocabulary beside it."""
    torch.manual_seed(0)
    vocabulary = write_vocabulary(folder.with_name("vocab.txt"))
    checkpoint.save(
        BertModel(CONFIG),
        folder,
        tensor_parallel_size=tensor_parallel_size,
        tokenizer_files=[vocabulary],
    )
    return folder


def overrides(folder: Path, **values: Any) -> list[str]:
    """Dotted overrides for a run in `folder` from random weights; `values` with __ for a dot."""
    settings: dict[str, Any] = {
        "task": "text_classification",
        "model.language_model.config": "{hidden_size: 32, num_layers: 2, num_attention_heads: 4, "
        "intermediate_size: 64, max_position_embeddings: 32, init_std: 0.2}",
        "model.tokenizer.vocab_file": folder / "vocab.txt",
        "model.dataset.max_seq_length": 32,
        "model.train_ds.file_path": folder / "train.tsv",
        "model.validation_ds.file_path": folder / "validation.tsv",
        "model.train_ds.batch_size": 4,
        "model.optim.lr": 1e-3,
        "trainer.log_every_n_steps": 1,
        "trainer.peak_tflops": 0.05,  # stated: nothing is measured
        "exp_manager.create_tensorboard_logger": "false",
        "exp_manager.exp_dir": folder / "runs",
        "exp_manager.name": "tiny",
        "exp_manager.version": "v",
    }
    settings |= {key.replace("__", "."): value for key, value in values.items()}
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]


def config(folder: Path, **values: Any) -> TrainConfig:
    return load_config(None, overrides(folder, **values))


def write_inputs(folder: Path, num_train: int = 16, num_validation: int = 10) -> Path:
    """The files that `overrides` names."""
    write_vocabulary(folder / "vocab.txt")
    write_data(folder / "train.tsv", num_train)
    write_data(folder / "validation.tsv", num_validation, seed=1)
    return folder


def write_manifest(run: Path, filename: str, files: Sequence[Path]) -> None:
    """What makes a checkpoint of these files, one for each rank."""
    data = [path.read_bytes() for path in files]
    stored = tuple(StoredFile(len(d), hashlib.sha256(d).hexdigest()) for d in data)
    manifest = Manifest(filename, 0, 1, {}, "val_accuracy", "max", stored)
    write_json_atomically(manifest_path(run, filename), dataclasses.asdict(manifest))
