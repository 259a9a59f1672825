"""Text regression: a number for each text or pair of texts, such as how similar two sentences are.

    head        sequence classification with one output: one linear layer on the pooled first token
    loss        sum of squared errors in fp32
    decoding    the output itself
    metrics     Pearson's and Spearman's correlation, mean squared error

Files are those of text classification, with numbers for labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from tpcore.models.output import BertOutput
from tpcore.tasks.columns import ColumnSettings, Layout, find_layout, read_rows
from tpcore.tasks.metrics import correlations
from tpcore.tasks.sections import Source
from tpcore.tasks.task import DataError, Dataset, Example, Monitor, TaskBatch
from tpcore.tasks.text_file import write_whole
from tpcore.tasks.texts import (
    TextRecord,
    collate_texts,
    encode_texts,
    load_texts,
    parse_texts,
    texts_of_inputs,
)
from tpcore.tokenizer import WordPieceTokenizer


class ValuePrediction(TypedDict):
    """The number of one text; JSON as it is."""

    value: float


class TextRegression:
    """See the module.

    Args:
        tokenizer: of the encoder.
        max_seq_length: longer texts are cut to so many tokens, special ones included.
        dropout: before the output; None: the encoder's hidden dropout.
        columns: what is known of the columns of data files.
        layout: that of the training file; decides where another file alone does not.
    """

    name: ClassVar[str] = "text_regression"
    head_name: ClassVar[str] = "sequence_classification"
    monitor: ClassVar[Monitor] = Monitor("pearson", "max")

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        *,
        max_seq_length: int = 256,
        dropout: float | None = None,
        columns: ColumnSettings = ColumnSettings(),  # noqa: B008  (frozen)
        layout: Layout | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length
        self.dropout = dropout
        self.columns = columns
        self.layout = layout

    @classmethod
    def create(
        cls, config: Any, tokenizer: WordPieceTokenizer, train_path: Source | None
    ) -> TextRegression:
        """A task for a new run, from `dataset` and `classifier_head` of the `model` section.

        Raises:
            DataError: the columns of the training file leave a doubt.
        """
        data = config.dataset
        columns = ColumnSettings(data.text_column, data.label_column, data.header, data.pair_column)
        layout = None
        if train_path is not None:
            assert not isinstance(train_path, tuple)
            rows, _ = read_rows(train_path)
            layout = find_layout(rows, train_path, columns, is_known_label=_is_number)
        return cls(
            tokenizer,
            max_seq_length=data.max_seq_length,
            dropout=config.classifier_head.fc_dropout,
            columns=columns,
            layout=layout,
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer
    ) -> TextRegression:
        """The task that `to_config` wrote down."""
        values = dict(config)
        columns, layout = ColumnSettings(**values.pop("columns")), values.pop("layout")
        layout = None if layout is None else Layout(**layout)
        return cls(tokenizer, **values, columns=columns, layout=layout)

    def to_config(self) -> dict[str, Any]:
        return {
            "max_seq_length": self.max_seq_length,
            "dropout": self.dropout,
            "columns": asdict(self.columns),
            "layout": None if self.layout is None else asdict(self.layout),
        }

    def head_kwargs(self) -> dict[str, Any]:
        return {"num_labels": 1, "regression": True, "dropout": self.dropout}

    def load(self, path: Source, *, num_samples: int = -1, labelled: bool = True) -> Dataset:
        """Read a table with numbers for labels.

        Raises:
            DataError: the file cannot be used.
        """
        assert not isinstance(path, tuple)
        records, notes = load_texts(
            path,
            self.columns,
            self.layout,
            parse_number,
            num_samples=num_samples,
            labelled=labelled,
            is_known_label=_is_number,
        )
        if labelled and records:
            values = [record.label for record in records]
            notes.append(f"{path}: values from {min(values):g} to {max(values):g}")
        return self._encode(str(path), records, notes)

    def from_inputs(self, inputs: Iterable[Any]) -> Dataset:
        """Texts as strings, or pairs of them.

        Raises:
            TypeError: an input is neither.
        """
        return self._encode("input", texts_of_inputs(inputs), [])

    def parse_line(self, line: str, where: str) -> Any:
        has_pairs = self.layout is not None and self.layout.pair is not None
        return parse_texts(line, where, pairs=has_pairs)

    def collate(
        self, examples: Sequence[Example], device: torch.device | str | None = None
    ) -> TaskBatch:
        """Packed tokens and, where all examples have one, `labels["label"]`: fp32 [b]."""
        return collate_texts(examples, device, torch.float32)

    def label_counts(self, batch: TaskBatch) -> tuple[float, ...]:
        return (float(len(batch.examples)),)

    def loss_sums(self, output: BertOutput, batch: TaskBatch) -> Tensor:
        assert output.logits is not None
        difference = output.logits.float().squeeze(-1) - batch.labels["label"]
        return difference.square().sum().reshape(1)

    def decode(self, output: BertOutput, batch: TaskBatch) -> list[Any]:
        """The number of each example."""
        assert output.logits is not None
        values: list[float] = output.logits.float().squeeze(-1).tolist()
        return values

    def predictions(self, dataset: Dataset, decoded: Sequence[Any]) -> list[ValuePrediction]:
        return [ValuePrediction(value=value) for value in decoded]

    def metrics(self, dataset: Dataset, predictions: Sequence[ValuePrediction]) -> dict[str, float]:
        true = []
        for record in dataset.records:
            if record.label is None:
                raise ValueError(
                    f"{dataset.source}: line {record.line} has no value to compare with; load the "
                    "file with labelled=True"
                )
            true.append(record.label)
        return correlations(true, [prediction["value"] for prediction in predictions])

    def report(self, dataset: Dataset, predictions: Sequence[ValuePrediction]) -> str:
        return ""

    def write_predictions(
        self,
        path: str | PathLike[str],
        dataset: Dataset,
        predictions: Sequence[ValuePrediction],
    ) -> None:
        """One line for each text: JSON in a .json or .jsonl file, else tab-separated."""
        as_json = str(path).endswith((".json", ".jsonl"))
        lines = [] if as_json else ["line\tprediction\tlabel\ttext"]
        for record, prediction in zip(dataset.records, predictions, strict=True):
            texts = [record.text] if record.pair is None else [record.text, record.pair]
            if as_json:
                value = {
                    "line": record.line,
                    "prediction": prediction["value"],
                    "label": record.label,
                    "text": record.text,
                    **({} if record.pair is None else {"pair": record.pair}),
                }
                lines.append(json.dumps(value, ensure_ascii=False))
            else:
                known = "" if record.label is None else f"{record.label:g}"
                text = "\t".join(part.translate({9: " ", 10: " ", 13: " "}) for part in texts)
                lines.append(f"{record.line}\t{prediction['value']:.6f}\t{known}\t{text}")
        write_whole(path, "".join(f"{line}\n" for line in lines))

    def _encode(self, source: str, records: list[TextRecord], notes: list[str]) -> Dataset:
        targets = [record.label for record in records]
        return encode_texts(source, records, targets, notes, self.tokenizer, self.max_seq_length)


def parse_number(cell: str, where: str) -> float:
    """The number that a cell holds.

    Raises:
        DataError: it holds none, or one that is not finite.
    """
    if not _is_number(cell):
        raise DataError(
            f"{where}: {cell!r} is no number; correct or remove the line, or set "
            "model.dataset.header=true if it is a header"
        )
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
