"""Text classification: one label for each text or pair of texts.

    head        sequence classification: one linear layer on the pooled first token
    loss        sum of cross entropies -log softmax(logits)[label] in fp32, each with the weight of
                its class (1 without class balancing)
    decoding    the most probable label
    metrics     accuracy, macro-F1, precision / recall / F1 of each class

Files are tables (tab-separated, .csv, or .jsonl) with a text and its label in columns of any order,
with or without a header (see `columns`): `ham<TAB>See you at five`, or NeMo's `a fine film<TAB>1`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore.models.output import BertOutput
from tpcore.tasks.columns import ColumnSettings, Layout, Row, find_layout, read_rows
from tpcore.tasks.labels import NUM_SHOWN, Labels
from tpcore.tasks.metrics import ClassificationScores, score_classification
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


class TextPrediction(TypedDict):
    """The label of one text; JSON as it is."""

    label: str
    probabilities: dict[str, float]


class TextClassification:
    """See the module.

    Args:
        tokenizer: of the encoder.
        labels: the classes.
        max_seq_length: longer texts are cut to so many tokens, special ones included.
        class_weights: a positive weight for each label; None: 1.
        dropout: before the classifier; None: the encoder's hidden dropout.
        columns: what is known of the columns of data files.
        layout: that of the training file; decides where another file alone does not.
    """

    name: ClassVar[str] = "text_classification"
    head_name: ClassVar[str] = "sequence_classification"
    monitor: ClassVar[Monitor] = Monitor("accuracy", "max")

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        labels: Labels,
        *,
        max_seq_length: int = 256,
        class_weights: Sequence[float] | None = None,
        dropout: float | None = None,
        columns: ColumnSettings = ColumnSettings(),  # noqa: B008  (frozen)
        layout: Layout | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.labels = labels
        self.max_seq_length = max_seq_length
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self.dropout = dropout
        self.columns = columns
        self.layout = layout
        if self.class_weights is not None and len(self.class_weights) != len(self.labels):
            raise ValueError(
                f"{len(self.class_weights)} class weights for {len(self.labels)} labels"
            )

    @classmethod
    def create(
        cls,
        config: Any,
        tokenizer: WordPieceTokenizer,
        train_path: Source | None,
    ) -> TextClassification:
        """A task for a new run.

        The labels are those of `class_labels.class_labels_file` (one a line, in the order of their
        ids), else those of the training file: in numerical order when all are integers, else in
        the order of their code points. With `dataset.num_classes` n and integer labels below n
        they are 0 .. n-1, whether the training file has them all or not.

        Args:
            config: the `model` section: dataset.{num_classes, max_seq_length, class_balancing,
                text_column, label_column, header}, class_labels.class_labels_file and
                classifier_head.fc_dropout.
            tokenizer: of the encoder.
            train_path: the training file; may be None when a label file is given.

        Raises:
            ValueError: labels and num_classes do not fit; DataError when a file cannot be used.
        """
        data, labels_file = config.dataset, config.class_labels.class_labels_file
        columns = ColumnSettings(data.text_column, data.label_column, data.header, data.pair_column)
        labels = None if labels_file is None else Labels.from_file(labels_file)
        weights = layout = None
        if train_path is None:
            if labels is None:
                raise ValueError(
                    "no labels: give a training file, or model.class_labels.class_labels_file"
                )
            if data.class_balancing:
                raise ValueError("class balancing counts labels in a training file; give one")
        else:
            assert not isinstance(train_path, tuple)
            rows, _ = read_rows(train_path)
            is_known = None if labels is None else labels.is_known
            layout = find_layout(rows, train_path, columns, is_known_label=is_known)
            assert layout.label is not None
            cells = _label_cells(rows[layout.has_header :], layout.label, train_path)
            if labels is None:
                labels = Labels.of_cells([cell for _, cell in cells], data.num_classes, train_path)
            if data.class_balancing:
                weights = labels.balanced_weights([labels.id_of(cell, at) for at, cell in cells])
        if data.num_classes is not None and data.num_classes != len(labels):
            raise ValueError(
                f"model.dataset.num_classes={data.num_classes}, but {labels_file or train_path} "
                f"has {len(labels)} labels ({labels}); remove num_classes or correct it"
            )
        return cls(
            tokenizer,
            labels,
            max_seq_length=data.max_seq_length,
            class_weights=weights,
            dropout=config.classifier_head.fc_dropout,
            columns=columns,
            layout=layout,
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer
    ) -> TextClassification:
        """The task that `to_config` wrote down."""
        values = dict(config)
        labels, columns = Labels(values.pop("labels")), values.pop("columns")
        layout = values.pop("layout")
        return cls(
            tokenizer,
            labels,
            **values,
            columns=ColumnSettings(**columns),
            layout=None if layout is None else Layout(**layout),
        )

    def to_config(self) -> dict[str, Any]:
        return {
            "labels": list(self.labels.names),
            "max_seq_length": self.max_seq_length,
            "class_weights": None if self.class_weights is None else list(self.class_weights),
            "dropout": self.dropout,
            "columns": asdict(self.columns),
            "layout": None if self.layout is None else asdict(self.layout),
        }

    def head_kwargs(self) -> dict[str, Any]:
        return {"num_labels": len(self.labels), "dropout": self.dropout}

    def load(self, path: Source, *, num_samples: int = -1, labelled: bool = True) -> Dataset:
        """Read a table; without labels, also one text a line.

        Raises:
            DataError: the file cannot be used.
        """
        assert not isinstance(path, tuple)

        def parse(cell: str, where: str) -> str:
            return self.labels.names[self.labels.id_of(cell, where)]

        records, notes = load_texts(
            path,
            self.columns,
            self.layout,
            parse,
            num_samples=num_samples,
            labelled=labelled,
            is_known_label=self.labels.is_known,
        )
        if labelled:
            notes[1:1] = class_notes(str(path), [record.label for record in records])
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
        """Packed tokens and, where all examples have one, `labels["label"]`: int64 [b]."""
        return collate_texts(examples, device, torch.int64)

    def label_counts(self, batch: TaskBatch) -> tuple[float, ...]:
        if self.class_weights is None:
            return (float(len(batch.examples)),)
        return (sum(self.class_weights[example.labels] for example in batch.examples),)

    def loss_sums(self, output: BertOutput, batch: TaskBatch) -> Tensor:
        assert output.logits is not None
        logits = output.logits.float()
        weight = None
        if self.class_weights is not None:
            weight = torch.tensor(self.class_weights, dtype=torch.float32, device=logits.device)
        loss = F.cross_entropy(logits, batch.labels["label"], weight=weight, reduction="sum")
        return loss.reshape(1)

    def decode(self, output: BertOutput, batch: TaskBatch) -> list[Any]:
        """The probabilities of the labels, for each example."""
        assert output.logits is not None
        rows: list[list[float]] = output.logits.float().softmax(dim=-1).tolist()
        return rows

    def predictions(self, dataset: Dataset, decoded: Sequence[Any]) -> list[TextPrediction]:
        assert len(decoded) == len(dataset.records)
        return [
            TextPrediction(
                label=self.labels.names[max(range(len(row)), key=row.__getitem__)],
                probabilities=dict(zip(self.labels, row, strict=True)),
            )
            for row in decoded
        ]

    def metrics(self, dataset: Dataset, predictions: Sequence[TextPrediction]) -> dict[str, float]:
        return self._score(dataset, predictions).to_metrics()

    def report(self, dataset: Dataset, predictions: Sequence[TextPrediction]) -> str:
        return self._score(dataset, predictions).to_table()

    def write_predictions(
        self,
        path: str | PathLike[str],
        dataset: Dataset,
        predictions: Sequence[TextPrediction],
    ) -> None:
        """One line for each text: JSON in a .json or .jsonl file, else tab-separated.

        The columns are line, prediction, probability, label (empty where unknown) and text, in
        which tabs and line ends become blanks.
        """
        pairs = list(zip(dataset.records, predictions, strict=True))
        if str(path).endswith((".json", ".jsonl")):
            lines = [
                json.dumps(
                    {
                        "line": record.line,
                        "prediction": prediction["label"],
                        "probabilities": prediction["probabilities"],
                        "label": record.label,
                        "text": record.text,
                        **({} if record.pair is None else {"pair": record.pair}),
                    },
                    ensure_ascii=False,
                )
                for record, prediction in pairs
            ]
        else:
            has_pairs = any(record.pair is not None for record in dataset.records)
            lines = ["line\tprediction\tprobability\tlabel\ttext" + "\tpair" * has_pairs]
            for record, prediction in pairs:
                label = prediction["label"]
                probability = f"{prediction['probabilities'][label]:.6f}"
                texts = [record.text] if record.pair is None else [record.text, record.pair]
                text = "\t".join(part.translate({9: " ", 10: " ", 13: " "}) for part in texts)
                lines.append(f"{record.line}\t{label}\t{probability}\t{record.label or ''}\t{text}")
        write_whole(path, "".join(f"{line}\n" for line in lines))

    def _encode(self, source: str, records: list[TextRecord], notes: list[str]) -> Dataset:
        targets = [None if r.label is None else self.labels.find(r.label) for r in records]
        return encode_texts(source, records, targets, notes, self.tokenizer, self.max_seq_length)

    def _score(
        self, dataset: Dataset, predictions: Sequence[TextPrediction]
    ) -> ClassificationScores:
        unlabelled = [record.line for record in dataset.records if record.label is None]
        if unlabelled:
            raise ValueError(
                f"{dataset.source}: line {unlabelled[0]} has no label to compare with; load the "
                "file with labelled=True"
            )
        return score_classification(
            [record.label for record in dataset.records],
            [prediction["label"] for prediction in predictions],
            self.labels.names,
        )


def class_notes(source: str, labels: Sequence[str]) -> list[str]:
    """The classes of a file with their counts, and what looks like a slip among them."""
    counts = Counter(labels)
    shown = [f"{name} {count}" for name, count in sorted(counts.items())[:NUM_SHOWN]]
    more = f" and {len(counts) - NUM_SHOWN} more" if len(counts) > NUM_SHOWN else ""
    notes = [f"{source}: {len(counts)} class(es): {', '.join(shown)}{more}"]
    single = [name for name, count in sorted(counts.items()) if count == 1]
    if single:
        notes.append(
            f"warning: {source}: only one example of {', '.join(map(repr, single[:NUM_SHOWN]))}"
        )
    alike: dict[str, list[str]] = {}
    for name in sorted(counts):
        key = "".join(name.casefold().replace('"', "").replace("'", "").split())
        alike.setdefault(key, []).append(name)
    for names in alike.values():
        if len(names) > 1:
            notes.append(
                f"warning: {source}: {', '.join(map(repr, names))} differ only in case, quotation "
                "marks or blanks, and are different classes"
            )
    return notes


def _label_cells(
    rows: Sequence[Row], column: int, path: str | PathLike[str]
) -> list[tuple[str, str]]:
    """(place, cell) of each row's label.

    Raises:
        DataError: one is empty.
    """
    cells = [(f"{path}:{row.line}", row.cell(column, path, "label").strip()) for row in rows]
    for place, cell in cells:
        if not cell:
            raise DataError(f"{place}: the label is empty; fill it in or remove the line")
    return cells
