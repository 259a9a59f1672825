"""What the configuration sections of all tasks have in common; no torch here."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

Source = str | os.PathLike[str] | tuple[str | os.PathLike[str], ...]
"""A data file, or the files that are one only together: texts, and the labels of their words."""

Rule = tuple[bool, str, str]
"""(whether a value is as it should be, its key below `model`, what is expected)."""

_IN_MEMORY = "data is held in memory and nothing is loaded in the background"
_ONE_LAYER = "the head is one linear layer"
NO_MEANING = {
    **{
        f"{part}.{key}": _IN_MEMORY
        for part in ("dataset", "train_ds", "validation_ds", "test_ds")
        for key in ("num_workers", "pin_memory", "drop_last")
    },
    "validation_ds.shuffle": "evaluation has no order",
    "test_ds.shuffle": "evaluation has no order",
    "dataset.use_cache": "data is encoded in less time than a cache would save",
    "dataset.do_lower_case": "case follows the vocabulary; model.tokenizer.do_lower_case changes "
    "that",
    "optim.sched.max_steps": "set trainer.max_steps or trainer.max_epochs",
    "language_model.max_seq_length": "set model.dataset.max_seq_length",
    "nemo_path": "a run is written to exp_manager.exp_dir",
    "library": "there is one encoder",
    "save_model": "a run is written to exp_manager.exp_dir",
    "target": "the task decides that",
    "nemo_version": "it says what wrote the file",
    "tokenizer.tokenizer_model": "the tokenizer is WordPiece, from model.tokenizer.vocab_file",
    "tokenizer.special_tokens": "they are those of BERT",
    "optim.sched.last_epoch": "a schedule starts at step 0",
    "optim.sched.monitor": "set exp_manager.checkpoint_callback_params.monitor",
    "optim.sched.reduce_on_plateau": "the schedule is a function of the step",
}
"""Keys of NeMo's files that change nothing here: below `model`, with the reason why."""


def head_keys(section: str, *keys: str) -> dict[str, str]:
    """Keys of a head that NeMo has and this one, a single layer, has not, for `no_meaning`."""
    names = (*keys, "activation", "log_softmax", "use_transformer_init")
    return {f"{section}.{key}": _ONE_LAYER for key in names}


def expect(ok: bool, key: str, expected: str) -> Rule:
    """A rule, for `TaskSections.rules`."""
    return ok, key, expected


def one_of(key: str, value: Any, choices: Sequence[Any]) -> Rule:
    """The rule that `value` is one of `choices`, with the nearest of them."""
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    shown = ", ".join("null" if choice is None else str(choice) for choice in choices)
    return value in choices, key, f"one of {shown}{hint}"


@dataclass
class DatasetConfig:
    """model.dataset: what all data files have in common."""

    max_seq_length: int = 256
    """Longer texts are cut to so many tokens, special ones included."""


@dataclass
class DataConfig:
    """model.validation_ds and model.test_ds: data to evaluate on."""

    batch_size: int = 32
    """Examples of one batch, over all data-parallel ranks together; never cut by their number."""
    max_tokens_per_batch: int | None = None
    """Fill each batch with examples of similar length up to so many tokens, in place of
    batch_size; null: batch_size examples."""
    num_samples: int = -1
    """Use only the first so many examples; -1: all."""


@dataclass
class TrainDataConfig(DataConfig):
    """model.train_ds: data to learn from."""

    shuffle: bool = True
    """A new order in every epoch, decided by the seed alone."""


@dataclass
class FileConfig(DataConfig):
    """The same, in one file."""

    file_path: str | None = None
    """The data file."""


@dataclass
class TrainFileConfig(TrainDataConfig, FileConfig):
    """model.train_ds: data to learn from, in one file."""


@dataclass
class TaskSections:
    """What the sections of every task have in common.

    A task overrides the sections that have keys of its own, and adds its head's.
    """

    no_meaning: ClassVar[Mapping[str, str]] = MappingProxyType(NO_MEANING)
    """Keys that NeMo knows and that change nothing here, with the reason why."""
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Dotted keys of the whole configuration whose default this task changes."""
    file_key: ClassVar[str] = "file_path"
    """Of the parts of the data: what to set."""

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    train_ds: TrainDataConfig = field(default_factory=TrainDataConfig)
    validation_ds: DataConfig = field(default_factory=DataConfig)
    test_ds: DataConfig = field(default_factory=DataConfig)

    def source(self, part: str) -> Source | None:
        """The data of `train_ds`, `validation_ds` or `test_ds`; None: there is none."""
        path = getattr(getattr(self, part), self.file_key)
        return path or None

    def rules(self) -> Iterator[Rule]:
        """What values must be; the first that fails becomes an error."""
        for part in ("train_ds", "validation_ds", "test_ds"):
            data: DataConfig = getattr(self, part)
            yield expect(data.batch_size > 0, f"{part}.batch_size", "a positive number of examples")
            yield expect(
                data.max_tokens_per_batch is None or data.max_tokens_per_batch > 0,
                f"{part}.max_tokens_per_batch",
                "a positive number of tokens, or null",
            )
            yield expect(
                data.num_samples > 0 or data.num_samples == -1,
                f"{part}.num_samples",
                "a positive number of examples, or -1 for all",
            )
        yield expect(
            self.dataset.max_seq_length >= 3, "dataset.max_seq_length", "at least 3 tokens"
        )


@dataclass
class ClassLabelsConfig:
    """model.class_labels: names of the classes."""

    class_labels_file: str | None = None
    """File with one label a line, in the order of their ids; null: sorted as in the data."""


def is_dropout(key: str, value: float | None) -> Rule:
    """The rule that `value` can be a dropout probability."""
    return expect(value is None or 0 <= value < 1, key, "a probability below 1")
