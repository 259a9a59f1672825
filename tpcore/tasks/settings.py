"""Configuration keys of the tasks: each task's own sections of `model`, and their defaults.

The common keys are in `train.config`, which makes a whole configuration of both. Names are those
that users of NeMo have in their files. No torch here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

Source = str | os.PathLike[str] | tuple[str | os.PathLike[str], ...]
"""A data file, or the files that are one only together: texts, and the labels of their words."""

Rule = tuple[bool, str, str]
"""(whether a value is as it should be, its key below `model`, what is expected)."""

_IN_MEMORY = "data is held in memory and nothing is loaded in the background"
_ONE_LAYER = "the head is one linear layer"
_NO_MEANING = {
    **{
        f"{part}.{key}": _IN_MEMORY
        for part in ("dataset", "train_ds", "validation_ds", "test_ds")
        for key in ("num_workers", "pin_memory", "drop_last")
    },
    "validation_ds.shuffle": "evaluation has no order",
    "test_ds.shuffle": "evaluation has no order",
    "dataset.use_cache": "encoded data is never cached on disk",
    "dataset.do_lower_case": "case follows the vocabulary; model.tokenizer.do_lower_case changes "
    "that",
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


def _head_keys(section: str, *keys: str) -> dict[str, str]:
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

    no_meaning: ClassVar[Mapping[str, str]] = MappingProxyType(_NO_MEANING)
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


# --- text classification ------------------------------------------------------------------------


@dataclass
class TextDatasetConfig(DatasetConfig):
    """model.dataset of text_classification."""

    num_classes: int | None = None
    """Number of labels, checked; null: those of the data."""
    text_column: str | None = None
    """Column of the text: its name in the header, or its number from 0; null: found."""
    label_column: str | None = None
    """Column of the label, likewise."""
    header: bool | None = None
    """Whether the first line of a data file names the columns; null: found."""
    class_balancing: str | None = None
    """null, or `weighted_loss`: weigh each class by the inverse of its frequency."""


@dataclass
class ClassifierHeadConfig:
    """model.classifier_head: the new layer on top of the encoder."""

    fc_dropout: float | None = None
    """Dropout before the classifier; null: the hidden dropout of the encoder."""


@dataclass
class TextClassificationSections(TaskSections):
    """Keys of task=text_classification."""

    no_meaning: ClassVar[Mapping[str, str]] = MappingProxyType(
        _NO_MEANING
        | _head_keys("classifier_head", "num_output_layers")
        | {"infer_samples": "`tpcore predict` takes texts from a file or standard input"}
    )

    dataset: TextDatasetConfig = field(default_factory=TextDatasetConfig)
    train_ds: TrainFileConfig = field(default_factory=TrainFileConfig)
    validation_ds: FileConfig = field(default_factory=FileConfig)
    test_ds: FileConfig = field(default_factory=FileConfig)
    class_labels: ClassLabelsConfig = field(default_factory=ClassLabelsConfig)
    classifier_head: ClassifierHeadConfig = field(default_factory=ClassifierHeadConfig)

    def rules(self) -> Iterator[Rule]:
        """See the base class."""
        yield from super().rules()
        data, dropout = self.dataset, self.classifier_head.fc_dropout
        yield one_of("dataset.class_balancing", data.class_balancing, (None, "weighted_loss"))
        yield expect(
            data.num_classes is None or data.num_classes > 1, "dataset.num_classes", "at least 2"
        )
        yield is_dropout("classifier_head.fc_dropout", dropout)


def is_dropout(key: str, value: float | None) -> Rule:
    """The rule that `value` can be a dropout probability."""
    return expect(value is None or 0 <= value < 1, key, "a probability below 1")


# --- token classification -----------------------------------------------------------------------


@dataclass
class TokenDatasetConfig(DatasetConfig):
    """model.dataset of token_classification."""

    data_dir: str | None = None
    """Folder of text_file and labels_file; null: those are paths of their own."""
    max_seq_length: int = 128
    """Longest window, special tokens included; longer sentences become several."""
    doc_stride: int | None = None
    """Tokens from one window's start to the next; null: half of what fits into one."""
    scheme: str | None = None
    """How labels mark entities: IOB1, IOB2, IOBES, IO (no marks); null: found in the labels."""
    token_column: str | None = None
    """Column of the word in a CoNLL file, from 0; null: the first."""
    label_column: str | None = None
    """Column of the label in a CoNLL file, from 0; negative: from the end; null: the last."""
    pad_label: str = "O"
    """The label outside of all entities; first of the labels."""
    ignore_extra_tokens: bool = True
    """Only the first piece of a word has a label; false: all its pieces have the word's."""
    ignore_start_end: bool = True
    """[CLS] and [SEP] have no label; false: they have `pad_label`."""
    class_balancing: str | None = None
    """null, or `weighted_loss`: weigh each label by the inverse of its frequency."""


@dataclass
class TokenFileConfig(FileConfig):
    """model.validation_ds and model.test_ds of token_classification."""

    file_path: str | None = None
    """A CoNLL file, or .jsonl; null: text_file and labels_file."""
    text_file: str | None = None
    """One sentence a line, words separated by blanks."""
    labels_file: str | None = None
    """The labels of the words of `text_file`, likewise."""


@dataclass
class TrainTokenFileConfig(TrainDataConfig, TokenFileConfig):
    """model.train_ds of token_classification."""


@dataclass
class TokenHeadConfig:
    """model.head: the new layer on top of the encoder."""

    fc_dropout: float | None = None
    """Dropout before the classifier; null: the hidden dropout of the encoder."""


@dataclass
class TokenClassificationSections(TaskSections):
    """Keys of task=token_classification."""

    no_meaning: ClassVar[Mapping[str, str]] = MappingProxyType(
        _NO_MEANING
        | _head_keys("head", "num_fc_layers")
        | {"label_ids": "set model.class_labels.class_labels_file"}
    )

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"trainer.max_epochs": 5, "model.optim.sched.warmup_ratio": 0.1}
    )

    dataset: TokenDatasetConfig = field(default_factory=TokenDatasetConfig)
    class_labels: ClassLabelsConfig = field(default_factory=ClassLabelsConfig)
    train_ds: TrainTokenFileConfig = field(default_factory=TrainTokenFileConfig)
    validation_ds: TokenFileConfig = field(default_factory=TokenFileConfig)
    test_ds: TokenFileConfig = field(default_factory=TokenFileConfig)
    head: TokenHeadConfig = field(default_factory=TokenHeadConfig)

    def source(self, part: str) -> Source | None:
        """A file, or text and labels below `data_dir`."""
        data: TokenFileConfig = getattr(self, part)
        folder = Path(self.dataset.data_dir or "")
        if data.file_path:
            return data.file_path
        if data.text_file and data.labels_file:
            return str(folder / data.text_file), str(folder / data.labels_file)
        return None

    def rules(self) -> Iterator[Rule]:
        """See the base class."""
        yield from super().rules()
        data = self.dataset
        for part in ("train_ds", "validation_ds", "test_ds"):
            files: TokenFileConfig = getattr(self, part)
            together = bool(files.text_file) == bool(files.labels_file)
            yield expect(together, f"{part}.text_file", f"to be given with {part}.labels_file")
            alone = not (files.file_path and files.text_file)
            yield expect(alone, f"{part}.file_path", f"null where {part}.text_file is given")
        yield one_of("dataset.scheme", data.scheme, (None, "IOB1", "IOB2", "IOBES", "IO"))
        yield one_of("dataset.class_balancing", data.class_balancing, (None, "weighted_loss"))
        for key in ("token_column", "label_column"):
            column = getattr(data, key)
            is_number = column is None or column.removeprefix("-").isdecimal()
            yield expect(is_number, f"dataset.{key}", "the number of a column, from 0")
        room = data.max_seq_length - 2
        yield expect(
            data.doc_stride is None or 0 < data.doc_stride <= room,
            "dataset.doc_stride",
            f"at least 1 and at most max_seq_length - 2 = {room}",
        )
        yield is_dropout("head.fc_dropout", self.head.fc_dropout)


# --- question answering -------------------------------------------------------------------------


@dataclass
class QuestionDatasetConfig(DatasetConfig):
    """model.dataset of question_answering."""

    version_2_with_negative: bool = False
    """Questions may have no answer, as in SQuAD v2.0."""
    max_seq_length: int = 384
    """Longest input: question, window of the context, special tokens."""
    doc_stride: int = 128
    """Tokens from one window's start to the next."""
    max_query_length: int = 64
    """Longer questions are cut to so many tokens."""
    max_answer_length: int = 30
    """Longest answer, in tokens."""
    n_best_size: int = 20
    """How many of the best answers are kept for each question."""
    null_score_diff_threshold: float = 0.0
    """No answer is given where its score exceeds that of the best answer by more than this."""


@dataclass
class QuestionFileConfig(DataConfig):
    """model.validation_ds and model.test_ds of question_answering."""

    file: str | None = None
    """SQuAD JSON, or one question a line in a .jsonl file."""
    batch_size: int = 24
    """Windows of one batch, over all data-parallel ranks together."""


@dataclass
class TrainQuestionFileConfig(TrainDataConfig, QuestionFileConfig):
    """model.train_ds of question_answering."""

    batch_size: int = 24
    """Windows of one batch, over all data-parallel ranks together."""


@dataclass
class QuestionAnsweringSections(TaskSections):
    """Keys of task=question_answering."""

    no_meaning: ClassVar[Mapping[str, str]] = MappingProxyType(
        _NO_MEANING | _head_keys("token_classifier", "num_layers", "dropout", "num_classes")
    )
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "trainer.max_epochs": 2,
            "model.optim.lr": 3e-5,
            "model.optim.weight_decay": 0.0,
            "model.optim.sched.name": "SquareRootAnnealing",
        }
    )
    file_key: ClassVar[str] = "file"

    dataset: QuestionDatasetConfig = field(default_factory=QuestionDatasetConfig)
    train_ds: TrainQuestionFileConfig = field(default_factory=TrainQuestionFileConfig)
    validation_ds: QuestionFileConfig = field(default_factory=QuestionFileConfig)
    test_ds: QuestionFileConfig = field(default_factory=QuestionFileConfig)

    def rules(self) -> Iterator[Rule]:
        """See the base class."""
        yield from super().rules()
        data = self.dataset
        for key in ("doc_stride", "max_query_length", "max_answer_length", "n_best_size"):
            yield expect(getattr(data, key) > 0, f"dataset.{key}", "a positive number")
        shortest = data.max_query_length + 4
        yield expect(
            data.max_seq_length >= shortest,
            "dataset.max_seq_length",
            f"at least max_query_length + 4 = {shortest}, so that there is room for the context",
        )


SECTIONS: dict[str, type[TaskSections]] = {
    "text_classification": TextClassificationSections,
    "token_classification": TokenClassificationSections,
    "question_answering": QuestionAnsweringSections,
}
"""By the name that a configuration's `task:` has."""
