"""The records that a model got most wrong, in a form for people: JSON as it is.

Works on the form of predictions and records, which several tasks share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from tpcore.tasks.metrics import score_classification
from tpcore.tasks.squad_metrics import best_over_references
from tpcore.tasks.task import Dataset

MAX_CLASSES = 40
"""A confusion matrix of more is none."""


class Mistake(TypedDict):
    """One record."""

    line: int | None
    text: str
    true: str
    predicted: str
    error: float
    """How wrong, from 0; what it measures is `Review.measure`."""


class Confusion(TypedDict):
    """How often which class was taken for which."""

    labels: list[str]
    counts: list[list[int]]
    """[true class][predicted class]."""


class Review(TypedDict):
    """What to look at in an evaluation."""

    measure: str
    worst: list[Mistake]
    """The most wrong first; right ones are not among them."""
    confusion: Confusion | None


def review(dataset: Dataset, predictions: Sequence[Any], *, num_worst: int = 20) -> Review:
    """The worst records of a labelled dataset and, for one label each, the confusion matrix.

    A record's error is 1 - (probability of its label); for labels of words the fraction of words
    that are wrong, and 1 more for a wrong intent; for answers 1 - F1; for numbers the distance.
    Predictions of another form give an empty review.
    """
    found: list[Mistake] = []
    measure, pairs = "", []
    for record, prediction in zip(dataset.records, predictions, strict=True):
        if not isinstance(prediction, dict):
            continue
        label = getattr(record, "label", None)
        labels = getattr(getattr(record, "sentence", record), "labels", None)
        answers = getattr(record, "answers", None)
        if "probabilities" in prediction and isinstance(label, str):
            measure = "1 - probability of the label"
            true, predicted = label, prediction["label"]
            error = 1 - prediction["probabilities"].get(label, 0.0)
            pairs.append((true, predicted))
            wrong = true != predicted
        elif "value" in prediction and isinstance(label, int | float):
            measure = "distance"
            true, predicted = f"{label:g}", f"{prediction['value']:.4g}"
            error = abs(label - prediction["value"])
            wrong = error > 0
        elif "labels" in prediction and labels:
            measure = "fraction of words with a wrong label"
            words = list(zip(prediction["words"], labels, prediction["labels"], strict=True))
            bad = [(w, t, p) for w, t, p in words if t != p]
            true = ", ".join(f"{word}: {t}" for word, t, _ in bad)
            predicted = ", ".join(f"{word}: {p}" for word, _, p in bad)
            error = len(bad) / len(words)
            intent = getattr(record, "intent", None)
            if intent is not None:
                measure += ", and 1 for a wrong intent"
                pairs.append((intent, prediction["intent"]))
                if intent != prediction["intent"]:
                    error += 1
                    true = "; ".join(filter(None, (f"intent {intent}", true)))
                    predicted = "; ".join(
                        filter(None, (f"intent {prediction['intent']}", predicted))
                    )
            wrong = error > 0
        elif "answer" in prediction and answers is not None:
            measure = "1 - F1"
            references = [answer.text for answer in answers] or [""]
            error = 1 - best_over_references(references, prediction["answer"])[1]
            true = " | ".join(dict.fromkeys(references)) or "(no answer)"
            predicted = prediction["answer"] or "(no answer)"
            wrong = error > 0
        else:
            continue
        if wrong:
            found.append(
                Mistake(
                    line=getattr(record, "line", None),
                    text=_text_of(record),
                    true=true,
                    predicted=predicted,
                    error=float(error),
                )
            )
    found.sort(key=lambda mistake: -mistake["error"])
    return Review(measure=measure, worst=found[:num_worst], confusion=_confusion(pairs))


def _text_of(record: Any) -> str:
    if hasattr(record, "question"):
        return f"{record.question}\n{record.context}"
    record = getattr(record, "sentence", record)
    pair = getattr(record, "pair", None)
    return str(record.text) if pair is None else f"{record.text}\n{pair}"


def _confusion(pairs: Sequence[tuple[str, str]]) -> Confusion | None:
    labels = sorted({label for pair in pairs for label in pair})
    if not 2 <= len(labels) <= MAX_CLASSES:
        return None
    true, predicted = [t for t, _ in pairs], [p for _, p in pairs]
    counts = score_classification(true, predicted, labels).confusion
    return Confusion(labels=labels, counts=[list(row) for row in counts])
