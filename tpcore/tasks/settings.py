"""Configuration keys of the tasks: each task's own sections of `model`, and their defaults.

The common keys are in `train.config`, which makes a whole configuration of both. Names are those
that users of NeMo have in their files. No torch here.
"""

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
    TrainFileConfig,
    expect,
    head_keys,
    is_dropout,
    one_of,
)

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
    pair_column: str | None = None
    """Column of a second text, likewise; null: none, unless a header has sentence2 or the like."""
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
        NO_MEANING
        | head_keys("classifier_head", "num_output_layers")
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


# --- text regression, GLUE ----------------------------------------------------------------------


@dataclass
class ValueDatasetConfig(DatasetConfig):
    """model.dataset of text_regression."""

    text_column: str | None = None
    """Column of the text: its name in the header, or its number from 0; null: found."""
    label_column: str | None = None
    """Column of the number, likewise."""
    pair_column: str | None = None
    """Column of a second text, likewise; null: none, unless a header has sentence2 or the like."""
    header: bool | None = None
    """Whether the first line of a data file names the columns; null: found."""


@dataclass
class TextRegressionSections(TaskSections):
    """Keys of task=text_regression."""

    no_meaning: ClassVar[Mapping[str, str]] = MappingProxyType(
        NO_MEANING | head_keys("classifier_head", "num_output_layers")
    )

    dataset: ValueDatasetConfig = field(default_factory=ValueDatasetConfig)
    train_ds: TrainFileConfig = field(default_factory=TrainFileConfig)
    validation_ds: FileConfig = field(default_factory=FileConfig)
    test_ds: FileConfig = field(default_factory=FileConfig)
    classifier_head: ClassifierHeadConfig = field(default_factory=ClassifierHeadConfig)

    def rules(self) -> Iterator[Rule]:
        """See the base class."""
        yield from super().rules()
        yield is_dropout("classifier_head.fc_dropout", self.classifier_head.fc_dropout)


GLUE_TASKS = ("cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "qnli", "rte", "wnli")


@dataclass
class GlueDatasetConfig(DatasetConfig):
    """model.dataset of glue."""

    data_dir: str | None = None
    """The task's folder, as GLUE has it; null: `ds_item` is a path of its own."""
    max_seq_length: int = 128
    """Longer texts are cut to so many tokens, special ones included."""


@dataclass
class GlueFileConfig(DataConfig):
    """model.validation_ds and model.test_ds of glue."""

    ds_item: str | None = None
    """File of `data_dir`: train.tsv, dev.tsv, dev_matched.tsv, dev_mismatched.tsv."""


@dataclass
class TrainGlueFileConfig(TrainDataConfig, GlueFileConfig):
    """model.train_ds of glue."""


@dataclass
class GlueSections(TaskSections):
    """Keys of task=glue."""

    no_meaning: ClassVar[Mapping[str, str]] = MappingProxyType(
        NO_MEANING
        | head_keys("classifier_head", "num_output_layers")
        | {"supported_tasks": "model.task_name says which"}
    )
    file_key: ClassVar[str] = "ds_item"

    task_name: str = "mrpc"
    """One of cola, sst-2, mrpc, sts-b, qqp, mnli, qnli, rte, wnli."""
    dataset: GlueDatasetConfig = field(default_factory=GlueDatasetConfig)
    train_ds: TrainGlueFileConfig = field(default_factory=TrainGlueFileConfig)
    validation_ds: GlueFileConfig = field(default_factory=GlueFileConfig)
    test_ds: GlueFileConfig = field(default_factory=GlueFileConfig)
    classifier_head: ClassifierHeadConfig = field(default_factory=ClassifierHeadConfig)

    def source(self, part: str) -> Source | None:
        """A file below `data_dir`."""
        item = getattr(self, part).ds_item
        return str(Path(self.dataset.data_dir or "") / item) if item else None

    def rules(self) -> Iterator[Rule]:
        """See the base class."""
        yield from super().rules()
        yield one_of("task_name", self.task_name, GLUE_TASKS)
        yield is_dropout("classifier_head.fc_dropout", self.classifier_head.fc_dropout)


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


# --- relation extraction ------------------------------------------------------------------------


@dataclass
class RelationDatasetConfig(TextDatasetConfig):
    """model.dataset of relation_extraction."""

    markers: list[str] | None = None
    """What marks entities in the texts; null: found: `<< >> [[ ]]`, `<e1> </e1>`, `@GENE$`."""
    add_markers: bool = False
    """Make each marker a token of its own, with a new row of the word embeddings."""
    negative_label: str | None = None
    """The label that is no relation, left out of micro_f1; null: one such as Other, false or 0."""


@dataclass
class RelationExtractionSections(TextClassificationSections):
    """Keys of task=relation_extraction."""

    dataset: RelationDatasetConfig = field(default_factory=RelationDatasetConfig)


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
        NO_MEANING | head_keys("token_classifier", "num_layers", "dropout", "num_classes")
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
    "text_regression": TextRegressionSections,
    "glue": GlueSections,
    "token_classification": TokenClassificationSections,
    "punctuation_capitalization": PunctuationSections,
    "question_answering": QuestionAnsweringSections,
    "relation_extraction": RelationExtractionSections,
}
"""By the name that a configuration's `task:` has."""
