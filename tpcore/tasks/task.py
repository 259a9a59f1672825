"""What the trainer asks of a task; nothing in train/ knows one task from another.

Three kinds of things go through a task:

    record      what a data file holds: a text with its label, a question, a sentence of words
    example     one input of the model; a long record becomes several (overlapping windows)
    prediction  what a user wants to know about one record

and they go through it like this:

    task = SomeTask.create(config, tokenizer, train_path)       labels are found here
    dataset = task.load(path)                                   records and examples
    batch = task.collate(some of dataset.examples)              tensors
    output = model.forward_packed(batch.packed, seed=seed)
    loss = (task.loss_sums(output, batch) / counts).sum()       counts: see `loss_sums`
    decoded[example.index] = task.decode(output, batch)[i]      plain Python, for each example
    predictions = task.predictions(dataset, decoded)            windows are joined here
    task.metrics(dataset, predictions)

Evaluation gathers `decoded` over data-parallel ranks by `Example.index`, so each example counts
exactly once however many ranks there are and however the batches were cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tpcore.models.output import BertOutput
from tpcore.models.packing import PackedBatch, pack_sequences
from tpcore.tasks.sections import Source
from tpcore.tokenizer import WordPieceTokenizer

Path = str | PathLike[str]


class DataError(ValueError):
    """A data file that cannot be used: file, line, what is there, and what to do about it."""


@dataclass(frozen=True, slots=True)
class Example:
    """One input of the model."""

    index: int
    """Place in `Dataset.examples`: it keys the example's dropout and its decoded output."""
    input_ids: Sequence[int]
    type_ids: Sequence[int]
    labels: Any = None
    """What the task learns from it, in a form of its own; None where that is unknown."""
    record: int = 0
    """Place in `Dataset.records` of what it was made from; windows of one record share it."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Dataset:
    """One data file, read, checked and tokenised; records and examples in the file's order."""

    source: str
    """The file's path, for messages."""
    records: Sequence[Any]
    """Of the task's own type; each knows its line and, where there is one, its label."""
    examples: Sequence[Example]
    notes: tuple[str, ...] = ()
    """What a user should hear about it: lines skipped, texts cut. One sentence each."""


@dataclass(frozen=True)
class TaskBatch:
    """Examples as tensors on one device."""

    examples: tuple[Example, ...]
    packed: PackedBatch
    labels: Mapping[str, Tensor]
    """By names of the task's own; empty when the examples have no labels."""
    head_labels: Any = None
    """What the head itself is called with; None: the task computes everything from its output."""


def pack_examples(
    examples: Sequence[Example], device: torch.device | str | None = None
) -> PackedBatch:
    """The tokens of examples; their dropout is keyed by their places in the dataset."""
    return pack_sequences(
        [example.input_ids for example in examples],
        [example.type_ids for example in examples],
        sample_ids=[example.index for example in examples],
        device=device,
    )


def label_columns(
    examples: Sequence[Example], names: Sequence[str], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Labels by name, int64 [t], of examples that hold a list for each; {} if one has none.

    For tasks that label every token once for each of their heads.
    """
    if any(example.labels is None for example in examples):
        return {}
    columns = {}
    for column, name in enumerate(names):
        flat = [label for example in examples for label in example.labels[column]]
        columns[name] = torch.tensor(flat, dtype=torch.int64, device=device)
    return columns


def numbered_texts(inputs: Iterable[Any]) -> Iterator[tuple[int, str]]:
    """The inputs, which must be texts, with numbers from 1.

    Raises:
        TypeError: an input is no string.
    """
    for number, text in enumerate(inputs, start=1):
        if not isinstance(text, str):
            raise TypeError(f"input {number} is a {type(text).__name__}; expected a text")
        yield number, text


def sample_limit(num_samples: int) -> int | None:
    """The end of a slice of records that takes `num_samples` of them, or all for -1.

    Raises:
        ValueError: any other number below 1.
    """
    if num_samples < 1 and num_samples != -1:
        raise ValueError(f"num_samples={num_samples}; expected a positive number, or -1: all")
    return None if num_samples == -1 else num_samples


class Monitor(NamedTuple):
    """The metric that decides which checkpoint is the best, and its better direction."""

    metric: str
    mode: Literal["max", "min"]


class Task(Protocol):
    """A downstream task: data, head, loss, decoding, metrics, prediction files.

    A task holds settings, labels and the tokenizer; no weights and no data.
    """

    name: ClassVar[str]
    """As in the configuration's `task:`."""
    head_name: ClassVar[str]
    """Of `tpcore.models.heads.HEADS`."""
    tokenizer: WordPieceTokenizer

    @property
    def monitor(self) -> Monitor:
        """One of the keys of `metrics`."""
        ...

    @classmethod
    def create(cls, config: Any, tokenizer: WordPieceTokenizer, train_path: Source | None) -> Task:
        """A task for a new run; labels that `config` does not give come from the training file.

        Raises:
            ValueError: settings that cannot be; DataError when the file cannot be used.
        """
        ...

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer) -> Task:
        """The task that `to_config` wrote down, without its training data."""
        ...

    def to_config(self) -> dict[str, Any]:
        """Everything but the tokenizer, as JSON holds it; stored with a run."""
        ...

    def head_kwargs(self) -> dict[str, Any]:
        """Arguments of `build_head(head_name, ...)`."""
        ...

    def load(self, path: Source, *, num_samples: int = -1, labelled: bool = True) -> Dataset:
        """Read a data file.

        Args:
            path: the file, or several that are one only together.
            num_samples: take only the first so many records; -1: all.
            labelled: False: labels are neither needed nor looked at.

        Raises:
            DataError: anything in the file that is not as it should be.
        """
        ...

    def from_inputs(self, inputs: Iterable[Any]) -> Dataset:
        """Unlabelled records that did not come from a file, for predictions."""
        ...

    def parse_line(self, line: str, where: str) -> Any:
        """One of `inputs` of `from_inputs`, from a line of standard input.

        Raises:
            DataError: the line is not of the form that this task wants; `where` is its place.
        """
        ...

    def collate(
        self, examples: Sequence[Example], device: torch.device | str | None = None
    ) -> TaskBatch:
        """A batch of examples of one dataset."""
        ...

    def label_counts(self, batch: TaskBatch) -> tuple[float, ...]:
        """How much each term of `loss_sums` counts: labels, or the sum of their weights."""
        ...

    def loss_sums(self, output: BertOutput, batch: TaskBatch) -> Tensor:
        """The loss terms, each summed over the labels of the batch: fp32 [k].

        A task has one term, or several that are averages over different things (intents and
        slots). The loss of an optimizer step is

            sum_k  (sum of loss_sums_k) / (sum of label_counts_k)

        with both sums over all micro-batches and data-parallel ranks of the step, so it does not
        depend on how the step was cut. Relative weights of terms are inside `loss_sums`.
        """
        ...

    def decode(self, output: BertOutput, batch: TaskBatch) -> list[Any]:
        """What `predictions` needs of each example of the batch; plain Python that pickles."""
        ...

    def predictions(self, dataset: Dataset, decoded: Sequence[Any]) -> list[Any]:
        """One prediction a record, from the decoded outputs of `dataset.examples`, in order."""
        ...

    def metrics(self, dataset: Dataset, predictions: Sequence[Any]) -> dict[str, float]:
        """Scores of a labelled dataset.

        Raises:
            ValueError: a record has no label.
        """
        ...

    def report(self, dataset: Dataset, predictions: Sequence[Any]) -> str:
        """The same for reading, in lines: tables, per class. May be empty."""
        ...

    def write_predictions(self, path: Path, dataset: Dataset, predictions: Sequence[Any]) -> None:
        """Write a file that users and other programs can read; it appears whole or not at all."""
        ...


@runtime_checkable
class VariesByEpoch(Protocol):
    """A task whose training examples are made anew in every epoch."""

    def examples_at(self, dataset: Dataset, seed: int, epoch: int) -> Sequence[Example]:
        """As many examples as the dataset has: a function of the arguments and nothing else."""
        ...
