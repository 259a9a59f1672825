"""Relation extraction: how two marked entities of a text are related, if at all.

    input       the text with its markers, which are whole tokens if `add_markers` asks for it; a
                text that is too long is cut around its entities
    head, loss  those of text classification: one linear layer on the pooled first token
    metrics     precision, recall and micro-F1 over the positive classes: all but the negative one;
                accuracy, macro-F1 over the positive classes, and scores of each class. Labels with
                directions, as Cause-Effect(e1,e2), also have SemEval's macro-F1 of relations

Files: see `relation_files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from tpcore.tasks.columns import ColumnSettings, Layout
from tpcore.tasks.labels import Labels
from tpcore.tasks.relation_files import find_markers, marked_places, read_relations
from tpcore.tasks.sections import Source
from tpcore.tasks.task import DataError, Dataset, Example, Monitor, sample_limit
from tpcore.tasks.text_classification import TextClassification, TextPrediction, class_notes
from tpcore.tasks.texts import TextRecord
from tpcore.tokenizer import Encoding, WordPieceTokenizer

NEGATIVE_NAMES = frozenset(
    {"other", "false", "none", "no_relation", "no relation", "na", "n/a", "negative", "0"}
)
"""Labels, in lower case, that say that there is no relation."""
_DIRECTED = re.compile(r"(.+)\((e1,e2|e2,e1)\)")


class RelationExtraction(TextClassification):
    """See the module.

    Args:
        tokenizer: of the encoder; with the markers as whole tokens where that is wished.
        labels: the classes.
        markers: what marks entities in texts.
        negative_label: the class that is no relation; None: all are relations.
        settings: those of `TextClassification`.
    """

    name: ClassVar[str] = "relation_extraction"
    monitor: ClassVar[Monitor] = Monitor("micro_f1", "max")

    def __init__(
        self,
        tokenizer: WordPieceTokenizer,
        labels: Labels,
        *,
        markers: Sequence[str] = (),
        negative_label: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(tokenizer, labels, **settings)
        self.markers = list(markers)
        self.negative_label = negative_label
        if negative_label is not None and negative_label not in labels.names:
            raise ValueError(
                f"model.dataset.negative_label={negative_label} is none of the labels: {labels}"
            )

    @classmethod
    def create(
        cls, config: Any, tokenizer: WordPieceTokenizer, train_path: Source | None
    ) -> RelationExtraction:
        """A task for a new run; labels as in text classification.

        Args:
            config: the `model` section, see `settings.RelationExtractionSections`.
            tokenizer: of the encoder.
            train_path: the training file; needed.

        Raises:
            ValueError: settings do not fit; DataError when a file cannot be used.
        """
        data, labels_file = config.dataset, config.class_labels.class_labels_file
        assert train_path is not None
        assert not isinstance(train_path, tuple)
        columns = ColumnSettings(data.text_column, data.label_column, data.header)
        labels = None if labels_file is None else Labels.from_file(labels_file)
        is_known = None if labels is None else labels.is_known
        file = read_relations(train_path, columns, labelled=True, is_known_label=is_known)
        cells = [(f"{train_path}:{r.line}", r.label or "") for r in file.relations]
        if labels is None:
            labels = Labels.of_cells([cell for _, cell in cells], data.num_classes, train_path)
        if data.num_classes is not None and data.num_classes != len(labels):
            raise ValueError(
                f"model.dataset.num_classes={data.num_classes}, but {labels_file or train_path} "
                f"has {len(labels)} labels ({labels}); remove num_classes or correct it"
            )
        weights = None
        if data.class_balancing:
            weights = labels.balanced_weights([labels.id_of(cell, at) for at, cell in cells])
        negative = data.negative_label
        if negative is None:
            names = [name for name in labels if name.lower() in NEGATIVE_NAMES]
            negative = names[0] if len(names) == 1 else None
        markers = list(data.markers or find_markers([r.text for r in file.relations]))
        if data.add_markers and not markers:
            raise DataError(
                f"{train_path}: model.dataset.add_markers=true, but no markers were found; set "
                "model.dataset.markers=[...]"
            )
        return cls(
            tokenizer.with_whole_tokens(markers) if data.add_markers else tokenizer,
            labels,
            markers=markers,
            negative_label=negative,
            max_seq_length=data.max_seq_length,
            class_weights=weights,
            dropout=config.classifier_head.fc_dropout,
            columns=columns,
            layout=file.layout,
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: WordPieceTokenizer
    ) -> RelationExtraction:
        """The task that `to_config` wrote down."""
        values = dict(config)
        layout = values.pop("layout")
        return cls(
            tokenizer,
            Labels(values.pop("labels")),
            **{**values, "columns": ColumnSettings(**values["columns"])},
            layout=None if layout is None else Layout(**layout),
        )

    def to_config(self) -> dict[str, Any]:
        return {
            **super().to_config(),
            "markers": self.markers,
            "negative_label": self.negative_label,
        }

    def load(self, path: Source, *, num_samples: int = -1, labelled: bool = True) -> Dataset:
        """Read a file of texts with marked entities.

        Raises:
            DataError: the file cannot be used.
        """
        end = sample_limit(num_samples)
        assert not isinstance(path, tuple)
        file = read_relations(
            path,
            self.columns,
            labelled=labelled,
            is_known_label=self.labels.is_known,
            like=self.layout,
        )
        relations = file.relations[:end]
        records = []
        for relation in relations:
            label = None
            if relation.label is not None:
                index = self.labels.id_of(relation.label, f"{path}:{relation.line}")
                label = self.labels.names[index]
            records.append(TextRecord(relation.line, relation.text, label))
        notes = list(file.notes)
        if labelled:
            notes += class_notes(str(path), [record.label or "" for record in records])
            notes.append(
                f"{path}: every label is a relation; set model.dataset.negative_label if one is not"
                if self.negative_label is None
                else f"{path}: {self.negative_label!r} means no relation"
            )
        unmarked = [r.line for r in records if marked_places(r.text, self.markers) is None]
        if unmarked:
            notes.append(
                f"warning: {path}: {len(unmarked)} text(s) without marked entities, the first in "
                f"line {unmarked[0]}"
            )
        return self._encode(str(path), records, notes)

    def from_inputs(self, inputs: Iterable[Any]) -> Dataset:
        """Texts with their markers, as strings."""
        return super().from_inputs(inputs)

    def metrics(self, dataset: Dataset, predictions: Sequence[TextPrediction]) -> dict[str, float]:
        from sklearn.metrics import precision_recall_fscore_support

        scores = self._score(dataset, predictions).to_metrics()
        true = [record.label for record in dataset.records]
        predicted = [prediction["label"] for prediction in predictions]
        positive = [name for name in self.labels if name != self.negative_label]
        precision, recall, micro, _ = precision_recall_fscore_support(
            true, predicted, labels=positive, average="micro", zero_division=0
        )
        scores["macro_f1"] = sum(scores[f"f1/{name}"] for name in positive) / len(positive)
        first = {"micro_f1": float(micro), "precision": float(precision), "recall": float(recall)}
        if any(_DIRECTED.fullmatch(name) for name in positive):
            first["relation_macro_f1"] = directed_macro_f1(true, predicted, positive)
        return {**first, **scores}

    def _encode(self, source: str, records: list[TextRecord], notes: list[str]) -> Dataset:
        encodings = self.tokenizer.encode_batch([record.text for record in records])
        examples = []
        num_cut = num_lost = 0
        for index, (record, encoding) in enumerate(zip(records, encodings, strict=True)):
            ids = list(encoding.ids)
            if len(ids) > self.max_seq_length:
                num_cut += 1
                kept, lost = self._around_entities(record.text, encoding)
                num_lost += lost
                ids = [ids[0], *ids[kept.start : kept.stop], ids[-1]]
            label = None if record.label is None else self.labels.find(record.label)
            examples.append(
                Example(
                    index=index,
                    input_ids=ids,
                    type_ids=[0] * len(ids),
                    labels=label,
                    record=index,
                )
            )
        if num_cut:
            notes.append(
                f"{source}: {num_cut} text(s) cut around their entities to model.dataset."
                f"max_seq_length={self.max_seq_length} tokens; {num_lost} of them lost an entity"
            )
        return Dataset(source, records, examples, tuple(notes))

    def _around_entities(self, text: str, encoding: Encoding) -> tuple[range, bool]:
        """(the tokens to keep, whether an entity is not among them)."""
        room = self.max_seq_length - 2
        last = len(encoding) - 1  # [SEP]
        marked = marked_places(text, self.markers)
        if marked is None:
            return range(1, 1 + room), False
        inside = [
            token
            for token, (start, end) in enumerate(encoding.offsets)
            if 0 < token < last and start < marked[1] and marked[0] < end
        ]
        spare = room - len(inside)
        start = max(1, min(inside[0] - max(0, spare) // 2, last - room))
        return range(start, start + room), spare < 0


def directed_macro_f1(
    true: Sequence[str], predicted: Sequence[str], positive: Sequence[str]
) -> float:
    """SemEval-2010 task 8's official score, from 0 to 1.

    The mean over relations, both directions of each together, of F1 where only the right direction
    is right.
    """

    def relation(label: str) -> str:
        match = _DIRECTED.fullmatch(label)
        return label if match is None else match.group(1)

    scores = []
    for name in dict.fromkeys(map(relation, positive)):
        right = sum(t == p and relation(t) == name for t, p in zip(true, predicted, strict=True))
        count = sum(relation(label) == name for label in (*true, *predicted))
        scores.append(2 * right / count if count else 0.0)
    return sum(scores) / len(scores)
