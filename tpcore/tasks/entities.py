"""Entities in labels of words: how labels mark them, and scores of whole entities by seqeval.

Schemes: IOB2 begins every entity with B-, IOB1 only one that follows another of its type directly,
IOBES marks the last word E- and a single word S-, IO marks nothing: labels are types themselves.
In the first three a mark may stand without a type.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from tpcore.tasks.task import DataError

SCHEMES = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES", "IO": ""}
"""Name -> the marks that its labels begin with."""
NO_TYPE = "_"
"""The type of an entity whose labels have marks only, as seqeval has it."""


class Entity(NamedTuple):
    """Words `first` to `last`, both included."""

    type: str
    first: int
    last: int


Places: TypeAlias = Callable[[int], str]
"""Where a word of a sentence stands in its file."""


def find_scheme(sentences: Iterable[tuple[Places, Sequence[str]]], outside: str) -> str:
    """The scheme of labelled sentences.

    Args:
        sentences: (places in the file, labels of the words) of each.
        outside: the label of words outside of all entities.

    Raises:
        DataError: some labels begin with a mark and others do not, or name no type behind it.
    """
    marks: set[str] = set()
    unmarked: tuple[str, str] | None = None
    has_needless_b = has_bare_i = False
    for places, labels in sentences:
        previous = outside
        for word, label in enumerate(labels):
            if label != outside:
                mark, kind = _split(label)
                if mark:
                    marks.add(mark)
                elif unmarked is None:
                    unmarked = places(word), label
                continues = previous != outside and _split(previous)[1] == kind
                has_needless_b |= mark == "B" and not continues
                has_bare_i |= mark == "I" and not continues
            previous = label
    if not marks:
        return "IO"
    if unmarked is not None:
        place, label = unmarked
        shown = label if len(label) <= 60 else f"{label[:57]}..."
        if label in ("B-", "I-", "E-", "S-"):
            raise DataError(f"{place}: label {label!r} names no type; write one behind it")
        raise DataError(
            f"{place}: label {shown!r} begins with none of B-, I-, E-, S-, while others do, and is "
            f"not {outside!r}; correct it, or set model.dataset.scheme=IO"
        )
    if marks & {"E", "S"}:
        return "IOBES"
    return "IOB1" if has_bare_i and not has_needless_b else "IOB2"


def find_entities(labels: Sequence[str], scheme: str, outside: str) -> list[Entity]:
    """The entities of one sentence.

    An I- or E- that nothing begins begins an entity itself, as conlleval has it.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    return [Entity(*entity) for entity in get_entities(_for_seqeval(labels, scheme, outside))]


def label_entities(
    entities: Iterable[Entity], num_words: int, scheme: str, outside: str
) -> list[str]:
    """The labels that mark `entities`, which do not overlap and are in order."""
    labels = [outside] * num_words
    previous: Entity | None = None
    for entity in entities:
        follows = previous is not None and previous.last + 1 == entity.first
        touches = follows and previous is not None and previous.type == entity.type
        for word in range(entity.first, entity.last + 1):
            mark = "I"
            if scheme == "IOBES" and entity.first == entity.last:
                mark = "S"
            elif scheme == "IOBES" and word == entity.last:
                mark = "E"
            elif word == entity.first and (scheme != "IOB1" or touches):
                mark = "B"
            if scheme == "IO":
                labels[word] = entity.type
            else:
                labels[word] = mark if entity.type == NO_TYPE else f"{mark}-{entity.type}"
        previous = entity
    return labels


def all_labels(labels: Iterable[str], scheme: str, outside: str) -> list[str]:
    """`outside`, then in order every label that the scheme has for the types that occur."""
    kinds = {_split(label)[1] if scheme != "IO" else label for label in labels if label != outside}
    if scheme == "IO":
        return [outside, *sorted(kinds)]
    return [
        outside,
        *sorted(f"{mark}-{kind}" if kind else mark for mark in SCHEMES[scheme] for kind in kinds),
    ]


@dataclass(frozen=True)
class EntityScores:
    """Scores of whole entities: right when type, first and last word are."""

    precision: float
    recall: float
    f1: float
    types: dict[str, tuple[float, float, float, int]]
    """Type -> precision, recall, F1, and how many there are."""

    def to_metrics(self) -> dict[str, float]:
        """Flat, for logs: `precision`, `recall`, `f1`, and `f1/<type>` and so on."""
        metrics = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        for kind, (precision, recall, f1, _) in self.types.items():
            metrics[f"precision/{kind}"] = precision
            metrics[f"recall/{kind}"] = recall
            metrics[f"f1/{kind}"] = f1
        return metrics

    def to_table(self) -> str:
        """The same in lines."""
        width = max(len("micro average"), *map(len, self.types)) if self.types else 13
        lines = [f"{'entity':<{width}}  precision  recall      f1  support"]
        total = sum(support for *_, support in self.types.values())
        rows = [
            *self.types.items(),
            ("micro average", (self.precision, self.recall, self.f1, total)),
        ]
        for kind, (precision, recall, f1, support) in rows:
            lines.append(
                f"{kind:<{width}}  {precision:>9.4f}  {recall:>6.4f}  {f1:>6.4f}  {support:>7}"
            )
        return "\n".join(lines)


def score_entities(
    true: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    scheme: str,
    outside: str,
) -> EntityScores:
    """Compare the labels of sentences, entity by entity; 0 / 0 is 0."""
    from seqeval.metrics import classification_report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ratios without anything below the line
        report = classification_report(
            [_for_seqeval(labels, scheme, outside) for labels in true],
            [_for_seqeval(labels, scheme, outside) for labels in predicted],
            output_dict=True,
            zero_division=0,
        )
    averages = {"micro avg", "macro avg", "weighted avg"}
    scores = {
        kind: (float(v["precision"]), float(v["recall"]), float(v["f1-score"]), int(v["support"]))
        for kind, v in report.items()
    }
    precision, recall, f1, _ = scores["micro avg"]
    types = {kind: values for kind, values in scores.items() if kind not in averages}
    return EntityScores(precision, recall, f1, types)


def _split(label: str) -> tuple[str, str]:
    """(mark, type) of a label that is not the outside one; no mark: ("", the label)."""
    if label in ("B", "I", "E", "S"):
        return label, ""
    if label[:2] in ("B-", "I-", "E-", "S-") and len(label) > 2:
        return label[0], label[2:]
    return "", label


def _for_seqeval(labels: Sequence[str], scheme: str, outside: str) -> list[str]:
    marked = (label if scheme != "IO" else f"I-{label}" for label in labels)
    return ["O" if label == outside else text for label, text in zip(labels, marked, strict=True)]
