"""Configuration keys of task=masked_lm; no torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tpcore.tasks.sections import (
    DatasetConfig,
    FileConfig,
    Rule,
    TaskSections,
    TrainFileConfig,
    expect,
    one_of,
)

SENTENCE_LOSSES = (None, "order", "next")


@dataclass
class MaskedDatasetConfig(DatasetConfig):
    """model.dataset of masked_lm."""

    masked_lm_prob: float = 0.15
    """Part of the tokens that is predicted: 80 % of them are masked, 10 % replaced, 10 % kept."""
    whole_word_masking: bool = False
    """Choose whole words, not single pieces of them."""
    sentence_loss: str | None = None
    """`order`: learn too whether two parts of a document stand in their order; `next`: whether the
    second is of the same document; null: neither."""
    top_k: int = 5
    """How many tokens `predict` gives for each [MASK]."""


@dataclass
class MaskedLMSections(TaskSections):
    """Keys of task=masked_lm."""

    dataset: MaskedDatasetConfig = field(default_factory=MaskedDatasetConfig)
    train_ds: TrainFileConfig = field(default_factory=TrainFileConfig)
    validation_ds: FileConfig = field(default_factory=FileConfig)
    test_ds: FileConfig = field(default_factory=FileConfig)

    def rules(self) -> Iterator[Rule]:
        """See the base class."""
        yield from super().rules()
        data = self.dataset
        yield one_of("dataset.sentence_loss", data.sentence_loss, SENTENCE_LOSSES)
        yield expect(
            0 < data.masked_lm_prob < 1, "dataset.masked_lm_prob", "a number between 0 and 1"
        )
        yield expect(data.top_k > 0, "dataset.top_k", "a positive number")
        shortest = 4 if data.sentence_loss is None else 5
        yield expect(
            data.max_seq_length >= shortest,
            "dataset.max_seq_length",
            f"at least {shortest}: special tokens, and something to predict from",
        )
