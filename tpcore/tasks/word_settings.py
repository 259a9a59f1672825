"""Configuration keys of the tasks that label words, as `settings` has those of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from tpcore.tasks.sections import (
    NO_MEANING,
    ClassLabelsConfig,
    DataConfig,
    DatasetConfig,
    FileConfig,
    Rule,
    Source,
    TaskSections,
    TrainDataConfig,
    expect,
    head_keys,
    is_dropout,
    one_of,
)

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
        NO_MEANING
        | head_keys("head", "num_fc_layers")
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
        return _sentence_source(data, self.dataset.data_dir)

    def labels_file(self) -> str | None:
        """The file of labels, in `data_dir` if it is there.

        NeMo's files name label_ids.csv whether there is one or not: it writes it itself.
        """
        name, folder = self.class_labels.class_labels_file, self.dataset.data_dir
        return _labels_file(name, folder, "label_ids.csv")

    def rules(self) -> Iterator[Rule]:
        """See the base class."""
        yield from super().rules()
        yield from _sentence_rules(self)
        data = self.dataset
        yield one_of("dataset.scheme", data.scheme, (None, "IOB1", "IOB2", "IOBES", "IO"))
        yield one_of("dataset.class_balancing", data.class_balancing, (None, "weighted_loss"))
        for key in ("token_column", "label_column"):
            column = getattr(data, key)
            is_number = column is None or column.removeprefix("-").isdecimal()
            yield expect(is_number, f"dataset.{key}", "the number of a column, from 0")
        yield is_dropout("head.fc_dropout", self.head.fc_dropout)


def _sentence_source(data: TokenFileConfig, folder: str | None) -> Source | None:
    if data.file_path:
        return data.file_path
    if data.text_file and data.labels_file:
        return str(Path(folder or "") / data.text_file), str(Path(folder or "") / data.labels_file)
    return None


def _labels_file(name: str | None, folder: str | None, written_by_nemo: str) -> str | None:
    if name is None:
        return None
    inside = Path(folder or "") / name
    if inside.exists():
        return str(inside)
    return None if name == written_by_nemo and not Path(name).exists() else name


def _sentence_rules(sections: Any) -> Iterator[Rule]:
    """Of the files of sentences, and of their windows."""
    for part in ("train_ds", "validation_ds", "test_ds"):
        files: TokenFileConfig = getattr(sections, part)
        together = bool(files.text_file) == bool(files.labels_file)
        yield expect(together, f"{part}.text_file", f"to be given with {part}.labels_file")
        alone = not (files.file_path and files.text_file)
        yield expect(alone, f"{part}.file_path", f"null where {part}.text_file is given")
    room, stride = sections.dataset.max_seq_length - 2, sections.dataset.doc_stride
    yield expect(
        stride is None or 0 < stride <= room,
        "dataset.doc_stride",
        f"at least 1 and at most max_seq_length - 2 = {room}",
    )


# --- punctuation and capitalisation -------------------------------------------------------------


@dataclass
class PunctuationDatasetConfig(DatasetConfig):
    """model.dataset of punctuation_capitalization."""

    data_dir: str | None = None
    """Folder of text_file and labels_file; null: those are paths of their own."""
    max_seq_length: int = 128
    """Longest window, special tokens included; longer sentences become several."""
    doc_stride: int | None = None
    """Tokens from one window's start to the next; null: half of what fits into one."""


@dataclass
class PunctuationLabelsConfig:
    """model.class_labels of punctuation_capitalization."""

    punct_labels_file: str | None = None
    """File with one mark a line, O first; null: those of the training data."""


@dataclass
class PunctuationSections(TaskSections):
    """Keys of task=punctuation_capitalization."""

    no_meaning: ClassVar[Mapping[str, str]] = MappingProxyType(
        NO_MEANING
        | head_keys("punct_head", "punct_num_fc_layers")
        | head_keys("capit_head", "capit_num_fc_layers")
        | {
            "capit_head.fc_dropout": "marks and capitals have one head; set model.punct_head",
            "class_labels.capit_labels_file": "capitals are O and U",
            "punct_label_ids": "set model.class_labels.punct_labels_file",
            "capit_label_ids": "capitals are O and U",
            "dataset.pad_label": "the label for none is O",
            "dataset.ignore_extra_tokens": "labels stand on the first piece of each word",
            "dataset.ignore_start_end": "[CLS] and [SEP] have no label",
        }
    )

    dataset: PunctuationDatasetConfig = field(default_factory=PunctuationDatasetConfig)
    class_labels: PunctuationLabelsConfig = field(default_factory=PunctuationLabelsConfig)
    train_ds: TrainTokenFileConfig = field(default_factory=TrainTokenFileConfig)
    validation_ds: TokenFileConfig = field(default_factory=TokenFileConfig)
    test_ds: TokenFileConfig = field(default_factory=TokenFileConfig)
    punct_head: TokenHeadConfig = field(default_factory=TokenHeadConfig)

    def source(self, part: str) -> Source | None:
        """As in token classification."""
        data: TokenFileConfig = getattr(self, part)
        return _sentence_source(data, self.dataset.data_dir)

    def labels_file(self) -> str | None:
        """The file of marks, in `data_dir` if it is there; NeMo writes the one that it names."""
        name, folder = self.class_labels.punct_labels_file, self.dataset.data_dir
        return _labels_file(name, folder, "punct_label_ids.csv")

    def rules(self) -> Iterator[Rule]:
        """See the base class."""
        yield from super().rules()
        yield from _sentence_rules(self)
        yield is_dropout("punct_head.fc_dropout", self.punct_head.fc_dropout)


# --- intents and slots --------------------------------------------------------------------------


@dataclass
class UtteranceDatasetConfig(DatasetConfig):
    """model.dataset of intent_slot_classification."""

    max_seq_length: int = 50
    """Longest window, special tokens included; longer sentences become several."""


@dataclass
class PrefixConfig(DataConfig):
    """model.validation_ds and model.test_ds of intent_slot_classification."""

    prefix: str | None = None
    """Start of the names of two files in `data_dir`: <prefix>.tsv and <prefix>_slots.tsv."""


@dataclass
class TrainPrefixConfig(TrainDataConfig, PrefixConfig):
    """model.train_ds of intent_slot_classification."""


@dataclass
class IntentSlotSections(TaskSections):
    """Keys of task=intent_slot_classification."""

    no_meaning: ClassVar[Mapping[str, str]] = MappingProxyType(
        NO_MEANING
        | head_keys("head", "num_output_layers")
        | dict.fromkeys(
            ("class_labels.intent_labels_file", "class_labels.slot_labels_file"),
            "labels are those of dict.intents.csv and dict.slots.csv",
        )
        | dict.fromkeys(
            ("pad_label", "ignore_extra_tokens", "ignore_start_end", "class_balancing"),
            "slots stand on the first piece of each word, all labels weigh alike",
        )
    )
    file_key: ClassVar[str] = "prefix"

    data_dir: str = "."
    """Folder with dict.intents.csv, dict.slots.csv and the data."""
    intent_loss_weight: float = 0.6
    """Weight of the intents in the loss, from 0 to 1; the slots have the rest."""
    dataset: UtteranceDatasetConfig = field(default_factory=UtteranceDatasetConfig)
    train_ds: TrainPrefixConfig = field(default_factory=TrainPrefixConfig)
    validation_ds: PrefixConfig = field(default_factory=PrefixConfig)
    test_ds: PrefixConfig = field(default_factory=PrefixConfig)
    head: TokenHeadConfig = field(default_factory=TokenHeadConfig)

    def source(self, part: str) -> Source | None:
        """The file of sentences; the slots are beside it."""
        prefix = getattr(self, part).prefix
        return str(Path(self.data_dir) / f"{prefix}.tsv") if prefix else None

    def rules(self) -> Iterator[Rule]:
        """See the base class."""
        yield from super().rules()
        weight = self.intent_loss_weight
        yield expect(0 <= weight <= 1, "intent_loss_weight", "a number from 0 to 1")
        yield is_dropout("head.fc_dropout", self.head.fc_dropout)
