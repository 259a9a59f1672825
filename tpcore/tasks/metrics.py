"""Scores of classifications, by scikit-learn, in a form for logs and one for reading.

scikit-learn and scipy take most of a second to load, so they are loaded by the first score and not
by every rank that starts. That they are there is asked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

if find_spec("sklearn") is None:
    raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")


@dataclass(frozen=True)
class ClassScores:
    """One class against all others; a ratio with nothing below the line is 0."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """How many records have this label."""


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of predicted labels against true ones."""

    accuracy: float
    macro_f1: float
    """Mean F1 of the classes that occur among the true or the predicted labels."""
    classes: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    """[true class][predicted class], in the order of `classes`."""

    def to_metrics(self) -> dict[str, float]:
        """Flat, for logs: `accuracy`, `macro_f1`, and `precision/<label>` and so on."""
        metrics = {"accuracy": self.accuracy, "macro_f1": self.macro_f1}
        for scores in self.classes:
            metrics[f"precision/{scores.label}"] = scores.precision
            metrics[f"recall/{scores.label}"] = scores.recall
            metrics[f"f1/{scores.label}"] = scores.f1
        return metrics

    def to_table(self) -> str:
        """Per-class scores and, up to ten classes, the confusion matrix."""
        labels = [scores.label for scores in self.classes]
        width = max(len("label"), *map(len, labels))
        header = f"{'label':<{width}}  precision  recall      f1  support"
        lines = [header]
        for scores in self.classes:
            lines.append(
                f"{scores.label:<{width}}  {scores.precision:>9.4f}  {scores.recall:>6.4f}  "
                f"{scores.f1:>6.4f}  {scores.support:>7}"
            )
        if len(labels) <= 10:
            cells = max(6, *map(len, labels))
            lines.append("")
            lines.append(f"{'true':<{width}}  predicted")
            lines.append(f"{'':<{width}}  " + "  ".join(f"{label:>{cells}}" for label in labels))
            for label, row in zip(labels, self.confusion, strict=True):
                counts = "  ".join(f"{count:>{cells}}" for count in row)
                lines.append(f"{label:<{width}}  {counts}")
        return "\n".join(lines)


def correlations(true: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation and the mean squared error.

    A correlation is 0 where one side is constant, and undefined therefore.
    """
    from scipy.stats import pearsonr, spearmanr

    pairs = list(zip(true, predicted, strict=True))
    is_constant = len(set(true)) < 2 or len(set(predicted)) < 2
    return {
        "pearson": 0.0 if is_constant else float(pearsonr(true, predicted)[0]),
        "spearman": 0.0 if is_constant else float(spearmanr(true, predicted)[0]),
        "mse": sum((value - other) ** 2 for value, other in pairs) / len(pairs),
    }


def score_classification(
    true: Sequence[str], predicted: Sequence[str], labels: Sequence[str]
) -> ClassificationScores:
    """Compare predicted with true labels.

    Args:
        true: the right label of each record.
        predicted: the label that was predicted for it.
        labels: all classes of the task, in the order of the result.

    Raises:
        ValueError: nothing to compare, lengths differ, or a label is not among `labels`.
    """
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

    if not true or len(true) != len(predicted):
        raise ValueError(
            f"{len(true)} true and {len(predicted)} predicted labels; expected equally many, and "
            "at least one"
        )
    unknown = (set(true) | set(predicted)) - set(labels)
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} is not among the labels: {', '.join(labels)}")
    order = list(labels)
    precision, recall, f1, support = precision_recall_fscore_support(
        true, predicted, labels=order, average=None, zero_division=0
    )
    confusion = confusion_matrix(true, predicted, labels=order)
    columns = zip(order, precision, recall, f1, support, strict=True)
    return ClassificationScores(
        accuracy=float(confusion.trace() / len(true)),
        macro_f1=float(f1_score(true, predicted, average="macro", zero_division=0)),
        classes=tuple(
            ClassScores(label, float(p), float(r), float(f), int(n))
            for label, p, r, f, n in columns
        ),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
    )
