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

from tpcore.tasks.masked_settings import MaskedLMSections
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
from tpcore.tasks.word_settings import (
    IntentSlotSections,
    PunctuationSections,
    TokenClassificationSections,
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
    use_cache: bool = False
    """Keep the tokens of each data file in a file beside it, and read them from there again."""


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
        {key: reason for key, reason in NO_MEANING.items() if key != "dataset.use_cache"}
        | head_keys("token_classifier", "num_layers", "dropout", "num_classes")
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
    "intent_slot_classification": IntentSlotSections,
    "question_answering": QuestionAnsweringSections,
    "relation_extraction": RelationExtractionSections,
    "masked_lm": MaskedLMSections,
}
"""By the name that a configuration's `task:` has."""
