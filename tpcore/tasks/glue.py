"""The GLUE tasks from their official folders, with their metrics and files for their server.

Each is text classification, sts-b text regression; what differs is where things stand in the files:

    task      texts          label   metrics                      classes
    cola      3 (no header)  1       mcc                          0 1
    sst-2     0              1       accuracy                     0 1
    mrpc      3, 4           0       accuracy, f1                 0 1
    sts-b     7, 8           last    pearson, spearman            a number
    qqp       3, 4           5       accuracy, f1                 0 1
    mnli      8, 9           last    accuracy                     contradiction entailment neutral
    qnli rte  1, 2           last    accuracy                     entailment not_entailment
    wnli      1, 2           last    accuracy                     0 1

Columns count from 0; a first line is the header, but for cola's labelled files. Test files have an
index before their texts instead of a label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tpcore.models.output import BertOutput
from tpcore.tasks.labels import Labels
from tpcore.tasks.sections import Source
from tpcore.tasks.task import DataError, Dataset, Example, Monitor, TaskBatch, sample_limit
from tpcore.tasks.text_classification import TextClassification
from tpcore.tasks.text_file import read_lines, write_whole
from tpcore.tasks.text_regression import TextRegression, parse_number
from tpcore.tasks.texts import TextRecord, parse_texts
from tpcore.tokenizer import WordPieceTokenizer


@dataclass(frozen=True)
class _Format:
    """Where things stand in the labelled files of one task, and in its test file."""

    texts: tuple[int, ...]
    label: int
    test_texts: tuple[int, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    has_header: bool = True
    short_rows: bool = False
    """Rows with too few columns are part of the data, and are left out and counted."""


_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("contradiction", "entailment", "neutral")
FORMATS = {
    "cola": _Format((3,), 1, (1,), _BINARY, ("mcc",), has_header=False),
    "sst-2": _Format((0,), 1, (1,), _BINARY, ("accuracy",)),
    "mrpc": _Format((3, 4), 0, (3, 4), _BINARY, ("f1", "accuracy")),
    "sts-b": _Format((7, 8), -1, (7, 8), (), ("pearson", "spearman")),
    "qqp": _Format((3, 4), 5, (1, 2), _BINARY, ("f1", "accuracy"), short_rows=True),
    "mnli": _Format((8, 9), -1, (8, 9), _MNLI, ("accuracy",)),
    "qnli": _Format((1, 2), -1, (1, 2), _ENTAILMENT, ("accuracy",)),
    "rte": _Format((1, 2), -1, (1, 2), _ENTAILMENT, ("accuracy",)),
    "wnli": _Format((1, 2), -1, (1, 2), _BINARY, ("accuracy",)),
}


class Glue:
    """See the module.

    Args:
        tokenizer: of the encoder.
        task_name: one of `FORMATS`.
        max_seq_length: longer texts are cut to so many tokens, special ones included.
        dropout: before the classifier; None: the encoder's hidden dropout.
    """

    name: ClassVar[str] = "glue"
    head_name: ClassVar[str] = "sequence_classification"

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        *,
        task_name: str,
        max_seq_length: int = 128,
        dropout: float | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.task_name = task_name
        self.format = FORMATS[task_name]
        self.max_seq_length = max_seq_length
        self.dropout = dropout
        options: dict[str, Any] = {"max_seq_length": max_seq_length, "dropout": dropout}
        self.inner: TextClassification | TextRegression
        if self.format.classes:
            self.inner = TextClassification(tokenizer, Labels(self.format.classes), **options)
        else:
            self.inner = TextRegression(tokenizer, **options)
        # sst-2 and others have one metric; of two the first of GLUE's table decides.
        self.monitor = Monitor(self.format.metrics[0], "max")

    @classmethod
    def create(cls, config: Any, tokenizer: WordPieceTokenizer, train_path: Source | None) -> Glue:
        """A task for a new run, from `task_name`, `dataset` and `classifier_head` of `model`."""
        return cls(
            tokenizer,
            task_name=config.task_name,
            max_seq_length=config.dataset.max_seq_length,
            dropout=config.classifier_head.fc_dropout,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer) -> Glue:
        """The task that `to_config` wrote down."""
        values = {key: value for key, value in config.items() if key != "labels"}
        return cls(tokenizer, **values)

    def to_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "task_name": self.task_name,
            "max_seq_length": self.max_seq_length,
            "dropout": self.dropout,
        }
        return config | ({"labels": list(self.format.classes)} if self.format.classes else {})

    def head_kwargs(self) -> dict[str, Any]:
        return self.inner.head_kwargs()

    def load(self, path: Source, *, num_samples: int = -1, labelled: bool = True) -> Dataset:
        """Read train.tsv, dev.tsv (dev_matched, dev_mismatched) or, without labels, test.tsv.

        Raises:
            DataError: the file cannot be used.
        """
        end = sample_limit(num_samples)
        assert not isinstance(path, tuple)
        spec = self.format
        found = read_lines(path)
        lines = [line for line in found if line.text.strip()]
        num_blank = len(found) - len(lines)
        is_test = not labelled and Path(path).name.startswith("test")
        header = lines.pop(0).text.split("\t") if spec.has_header or is_test else []
        texts = spec.test_texts if is_test else spec.texts
        if len(header) == 2 and len(texts) == 1 and not is_test:
            texts = (0,)
        label = spec.label if labelled else 0
        width = len(header) or max(*texts, label) + 1
        needed = max(*texts, label % width) + 1
        records: list[TextRecord] = []
        num_short = 0
        for line in lines:
            cells = line.text.split("\t")
            if len(cells) < max(needed, width if label < 0 else 0):
                if spec.short_rows:
                    num_short += 1
                    continue
                raise DataError(
                    f"{path}:{line.number}: {len(cells)} column(s); {self.task_name} has texts in "
                    f"{' and '.join(map(str, texts))}{' and the label there' if labelled else ''}; "
                    "check model.task_name"
                )
            if label < 0 and len(cells) > width:
                raise DataError(
                    f"{path}:{line.number}: {len(cells)} columns, while the header has {width}; a "
                    "tab separates columns and can stand nowhere else"
                )
            if not all(cells[index].strip() for index in texts):
                raise DataError(f"{path}:{line.number}: a text is empty; remove the line")
            pair = cells[texts[1]] if len(texts) > 1 else None
            where = f"{path}:{line.number}"
            value = self._label(cells[label].strip(), where) if labelled else None
            records.append(TextRecord(line.number, cells[texts[0]], value, pair))
            if len(records) == end:
                break
        if not records:
            raise DataError(
                f"{path}: no line has the columns of {self.task_name}; check model.task_name"
            )
        notes = [f"{path}: {num_blank} blank line(s) left out"] if num_blank else []
        if num_short:
            notes.append(f"{path}: {num_short} line(s) with too few columns left out")
        return self.inner._encode(str(path), records, notes)

    def _label(self, cell: str, where: str) -> Any:
        if isinstance(self.inner, TextRegression):
            return parse_number(cell, where)
        if cell not in self.format.classes:
            raise DataError(
                f"{where}: label {cell!r}; {self.task_name} has {', '.join(self.format.classes)}: "
                "check model.task_name"
            )
        return cell

    def from_inputs(self, inputs: Iterable[Any]) -> Dataset:
        """Texts as strings, or pairs of them, as the task has it."""
        return self.inner.from_inputs(inputs)

    def parse_line(self, line: str, where: str) -> Any:
        return parse_texts(line, where, pairs=len(self.format.texts) > 1)

    def collate(
        self, examples: Sequence[Example], device: torch.device | str | None = None
    ) -> TaskBatch:
        return self.inner.collate(examples, device)

    def label_counts(self, batch: TaskBatch) -> tuple[float, ...]:
        return self.inner.label_counts(batch)

    def loss_sums(self, output: BertOutput, batch: TaskBatch) -> Tensor:
        return self.inner.loss_sums(output, batch)

    def decode(self, output: BertOutput, batch: TaskBatch) -> list[Any]:
        return self.inner.decode(output, batch)

    def predictions(self, dataset: Dataset, decoded: Sequence[Any]) -> list[Any]:
        return list(self.inner.predictions(dataset, decoded))

    def metrics(self, dataset: Dataset, predictions: Sequence[Any]) -> dict[str, float]:
        """GLUE's metrics of the task; mcc is Matthews' correlation, f1 that of class 1."""
        from sklearn.metrics import f1_score, matthews_corrcoef

        scores = self.inner.metrics(dataset, predictions)
        if self.format.classes:
            true = [record.label for record in dataset.records]
            found = [prediction["label"] for prediction in predictions]
            scores["mcc"] = float(matthews_corrcoef(true, found))
            if self.format.classes == _BINARY:
                scores["f1"] = float(f1_score(true, found, pos_label="1", zero_division=0))
        first = {name: scores[name] for name in self.format.metrics}
        if len(first) > 1:
            first["average"] = sum(first.values()) / len(first)
        return first

    def report(self, dataset: Dataset, predictions: Sequence[Any]) -> str:
        return self.inner.report(dataset, predictions)

    def write_predictions(
        self, path: str | PathLike[str], dataset: Dataset, predictions: Sequence[Any]
    ) -> None:
        """In a .tsv file what GLUE's server takes: index and prediction; else as the inner task.

        The server wants names such as `SST-2.tsv`, `MNLI-m.tsv` and `MNLI-mm.tsv`.
        """
        if Path(path).suffix != ".tsv":
            self.inner.write_predictions(path, dataset, predictions)
            return
        lines = ["index\tprediction"]
        for index, prediction in enumerate(predictions):
            value = prediction["label"] if "label" in prediction else _within(prediction["value"])
            lines.append(f"{index}\t{value}")
        write_whole(path, "".join(f"{line}\n" for line in lines))


def _within(value: float) -> str:
    """A similarity, which the server wants to be from 0 to 5."""
    return f"{min(5.0, max(0.0, value)):.3f}"
