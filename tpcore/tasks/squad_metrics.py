"""Exact match and F1 of answers, as SQuAD's own evaluation defines them, in percent.

Answers are compared in lower case, without the ASCII punctuation marks, without a, an and the, and
with single blanks. A question without an answer has the empty one. A question's score is the best
over its references.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """What two equal answers have in common."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(reference: str, answer: str) -> float:
    """1 if the answers are equal once normalised, else 0."""
    return float(normalize_answer(reference) == normalize_answer(answer))


def f1(reference: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetitions.

    Where one of them has no word: 1 if both have none, else 0.
    """
    true, given = normalize_answer(reference).split(), normalize_answer(answer).split()
    if not true or not given:
        return float(true == given)
    common = (Counter(true) & Counter(given)).total()
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(true)
    return 2 * precision * recall / (precision + recall)


def best_over_references(references: Sequence[str], answer: str) -> tuple[float, float]:
    """(exact match, F1) of an answer; no reference but empty ones: the right answer is empty."""
    real = [text for text in references if normalize_answer(text)] or [""]
    return max(exact_match(text, answer) for text in real), max(f1(text, answer) for text in real)


def best_threshold(
    scores: Sequence[float], no_answer: Sequence[float], answerable: Sequence[bool]
) -> tuple[float, float]:
    """(best mean score in percent, its threshold) where answers above the threshold are empty.

    Args:
        scores: of each question's best answer that is not empty.
        no_answer: the larger, the less it is an answer; above the threshold none is given.
        answerable: whether each question has an answer; where not, the empty one is right.

    The threshold is one of `no_answer`, or below all of them; of equally good ones the smallest.
    """
    current = float(sum(not has for has in answerable))  # all answers empty
    order = sorted(range(len(scores)), key=lambda index: no_answer[index])
    best, threshold = current, min(no_answer) - 1.0 if no_answer else 0.0
    for place, index in enumerate(order):
        current += scores[index] - (not answerable[index])
        # Questions with the same number fall on the same side of every threshold.
        is_last = place + 1 == len(order) or no_answer[order[place + 1]] > no_answer[index]
        if is_last and current > best:
            best, threshold = current, no_answer[index]
    return 100.0 * best / len(scores), threshold


@dataclass(frozen=True)
class SquadScores:
    """Means over all questions, and over those with and without an answer."""

    parts: Mapping[str, tuple[float, float, int]]
    """"" (all), "HasAns_", "NoAns_" -> exact match, F1, number of questions."""
    best: Mapping[str, float]
    """Scores with the best threshold for this very data, and that threshold; empty: not asked."""

    def to_metrics(self) -> dict[str, float]:
        """`exact_match`, `f1`; with unanswerable questions also splits and best threshold."""
        metrics = {"exact_match": self.parts[""][0], "f1": self.parts[""][1]}
        for part, (exact, score, count) in self.parts.items():
            if part:
                metrics |= {f"{part}exact": exact, f"{part}f1": score, f"{part}total": count}
        return {**metrics, **self.best}

    def to_table(self) -> str:
        """The same in lines."""
        lines = ["questions      exact match       F1   number"]
        names = {"": "all", "HasAns_": "answerable", "NoAns_": "unanswerable"}
        for part, (exact, score, count) in self.parts.items():
            lines.append(f"{names[part]:<12}  {exact:>12.3f}  {score:>7.3f}  {count:>7}")
        if self.best:
            lines.append(
                f"with the best null threshold for this data, not the one in use: exact match "
                f"{self.best['best_exact']:.3f} at {self.best['best_exact_thresh']:.3f}, F1 "
                f"{self.best['best_f1']:.3f} at {self.best['best_f1_thresh']:.3f}"
            )
        return "\n".join(lines)


def score_answers(
    references: Sequence[Sequence[str]],
    answers: Sequence[str],
    non_empty: Sequence[str] | None = None,
    no_answer: Sequence[float] | None = None,
) -> SquadScores:
    """Scores of answers.

    Args:
        references: of each question; none: it has no answer.
        answers: the answer given; empty: none.
        non_empty: the best answer that is not empty, for the search of the threshold.
        no_answer: for the search, see `best_threshold`.
    """
    answerable = [any(map(normalize_answer, texts)) for texts in references]
    scores = [
        best_over_references(texts, answer)
        for texts, answer in zip(references, answers, strict=True)
    ]
    parts = {"": _mean(scores)}
    best: dict[str, float] = {}
    if not all(answerable):
        for part, wanted in (("HasAns_", True), ("NoAns_", False)):
            of_part = [s for s, has in zip(scores, answerable, strict=True) if has == wanted]
            if of_part:
                parts[part] = _mean(of_part)
        if non_empty is not None and no_answer is not None:
            pairs = [
                best_over_references(texts, answer)
                for texts, answer in zip(references, non_empty, strict=True)
            ]
            for name, column in (("exact", 0), ("f1", 1)):
                values = [pair[column] for pair in pairs]
                best[f"best_{name}"], best[f"best_{name}_thresh"] = best_threshold(
                    values, no_answer, answerable
                )
    return SquadScores(parts, best)


def _mean(scores: Sequence[tuple[float, float]]) -> tuple[float, float, int]:
    exact, score = (100.0 * sum(column) / len(scores) for column in zip(*scores, strict=True))
    return exact, score, len(scores)
