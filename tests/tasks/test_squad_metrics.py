"""SQuAD's scores, written down once more from their definition, on made and on real predictions."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tasks import tiny_data
from tests.train import tiny
from tpcore import load_run
from tpcore.tasks import QuestionAnswering
from tpcore.tasks.squad_metrics import best_over_references, best_threshold, score_answers
from tpcore.tokenizer import WordPieceTokenizer
from tpcore.train.finetune import finetune
from tpcore.train.read_config import load_config

TOKENIZER = WordPieceTokenizer(tiny.VOCABULARY)
SQUAD = Path(__file__).parents[2] / "examples/squad/dev-v2.0.json"


def _tokens(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~""")
    return re.sub(r"\b(?:the|an|a)\b", " ", kept).split()


def _official(references: list[str], answer: str) -> tuple[float, float]:
    golds = [r for r in references if _tokens(r)] or [""]
    exact = f1 = 0.0
    for gold in golds:
        true, given = _tokens(gold), _tokens(answer)
        exact = max(exact, float(true == given))
        same = sum(min(true.count(word), given.count(word)) for word in set(true))
        if not true or not given:
            f1 = max(f1, float(true == given))
        elif same:
            f1 = max(f1, 2 * same / (len(true) + len(given)))
    return exact, f1


TEXTS = st.text(st.sampled_from("ab the.An,'-\u2019\u00e9 "), max_size=12)


@given(st.lists(TEXTS, max_size=4), TEXTS)
def test_exact_match_and_f1(references, answer):
    assert best_over_references(references, answer) == pytest.approx(_official(references, answer))


def test_exact_match_and_f1_by_hand():
    assert best_over_references(["The New-York"], "newyork") == (1.0, 1.0)
    assert best_over_references(["a b c", "b c d"], "c d") == (0.0, pytest.approx(0.8))
    assert best_over_references(["b b c"], "b") == (0.0, 0.5)
    assert best_over_references([], "") == (1.0, 1.0)
    assert best_over_references([], "x") == (0.0, 0.0)
    assert best_over_references(["the"], "") == (1.0, 1.0)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.integers(-3, 3)), min_size=1, max_size=12)
)
def test_threshold_is_the_best_of_all(rows):
    """By trying each threshold, ties among the questions included."""
    answerable = [has for has, _, _ in rows]
    scores = [score if has else 0.0 for has, score, _ in rows]
    odds = [float(odd) for _, _, odd in rows]

    def mean(threshold):
        values = [
            (score if odd <= threshold else float(not has))
            for has, score, odd in zip(answerable, scores, odds, strict=True)
        ]
        return 100 * sum(values) / len(values)

    best, threshold = best_threshold(scores, odds, answerable)
    tries = [min(odds) - 1, *sorted(set(odds))]
    assert best == pytest.approx(max(map(mean, tries)))
    assert mean(threshold) == pytest.approx(best)


def test_scores_of_real_predictions():
    """Answers near the truth for the shipped part of SQuAD v2.0, scored both ways."""
    task = QuestionAnswering(TOKENIZER, version_2_with_negative=True)
    records = task.load(SQUAD).records
    draw = random.Random(0)
    references, answers, non_empty, odds = [], [], [], []
    for question in records:
        texts = [answer.text for answer in question.answers]
        words = (draw.choice(texts) if texts else question.context[:60]).split()
        cut = draw.randint(0, len(words) - 1)
        given = " ".join(words[cut:]) if draw.random() < 0.5 else " ".join(words)
        references.append(texts)
        non_empty.append(given)
        odds.append(draw.gauss(0.0 if texts else 1.0, 1.0))
        answers.append("" if odds[-1] > 0.3 else given)
    found = score_answers(references, answers, non_empty, odds).to_metrics()
    pairs = [_official(r, a) for r, a in zip(references, answers, strict=True)]
    for part, wanted in (("", None), ("HasAns_", True), ("NoAns_", False)):
        rows = [p for p, r in zip(pairs, references, strict=True) if wanted in (None, bool(r))]
        for name, column in (("exact", 0), ("f1", 1)):
            key = "exact_match" if (part, name) == ("", "exact") else f"{part}{name}"
            mean = 100 * sum(row[column] for row in rows) / len(rows)
            assert found[key] == pytest.approx(mean), key
            assert 5 < mean < 99
    assert (found["HasAns_total"], found["NoAns_total"]) == (202, 175)
    # SQuAD's search walks the questions in order of their odds and keeps the best running sum.
    for name, column in (("exact", 0), ("f1", 1)):
        running = best = sum(not r for r in references)
        at = None
        for index in sorted(range(len(odds)), key=odds.__getitem__):
            score = _official(references[index], non_empty[index])[column]
            running += score if references[index] else -1
            if running > best:
                best, at = running, odds[index]
        assert found[f"best_{name}"] == pytest.approx(100 * best / len(odds))
        assert found[f"best_{name}_thresh"] == at
        assert found[f"best_{name}"] > found["exact_match" if name == "exact" else "f1"]
    table = score_answers(references, answers, non_empty, odds).to_table()
    assert "not the one in use" in table


def test_perfect_answers_have_perfect_scores():
    task = QuestionAnswering(TOKENIZER, version_2_with_negative=True)
    dataset = task.load(SQUAD)
    predictions = [
        {"answer": q.answers[-1].text if q.answers else "", "null_score_diff": 0.0, "nbest": []}
        for q in dataset.records
    ]
    metrics = task.metrics(dataset, predictions)
    assert metrics["exact_match"] == metrics["f1"] == metrics["NoAns_f1"] == 100.0


def _search(records, answers, odds, column):
    """SQuAD's own search: (best score in percent, threshold), walking questions by their odds."""
    running = best = sum(not question.answers for question in records)
    at = min(odds) - 1  # SQuAD's script says 0.0 where nothing is gained, which need not be so
    for index in sorted(range(len(odds)), key=odds.__getitem__):
        texts = [answer.text for answer in records[index].answers]
        if texts:
            running += _official(texts, answers[index])[column]
        else:
            running -= 1 if answers[index] else 0
        if running > best:
            best, at = running, odds[index]
    return 100 * best / len(odds), at


def test_scores_of_what_a_model_answers(tmp_path):
    """Files of a trained model, read back as SQuAD's script reads them."""
    overrides = tiny_data.overrides("question_answering", tmp_path, trainer__max_epochs=4)
    config = load_config(None, overrides)
    run = load_run(finetune(config).path, which="last")
    dataset = run.load()
    evaluation = run.evaluate_dataset(dataset)
    run.task.write_predictions(tmp_path / "predictions.json", dataset, evaluation.predictions)
    answers, odds, nbest = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("predictions", "null_odds", "nbest")
    )
    records = dataset.records
    ids = [question.id for question in records]
    assert list(answers) == list(odds) == list(nbest) == ids
    for part, wanted in (("", None), ("HasAns_", True), ("NoAns_", False)):
        rows = [
            _official([answer.text for answer in question.answers], answers[question.id])
            for question in records
            if wanted in (None, bool(question.answers))
        ]
        for name, column in (("exact_match" if not part else "exact", 0), ("f1", 1)):
            mean = 100 * sum(row[column] for row in rows) / len(rows)
            assert evaluation.metrics[f"{part}{name}"] == pytest.approx(mean), (part, name)
    best = [next((e["text"] for e in nbest[key] if e["text"]), "") for key in ids]
    assert all(best)
    for name, column in (("exact", 0), ("f1", 1)):
        score, at = _search(records, best, [odds[key] for key in ids], column)
        assert evaluation.metrics[f"best_{name}"] == pytest.approx(score)
        assert at == pytest.approx(evaluation.metrics[f"best_{name}_thresh"])
        assert (
            evaluation.metrics[f"best_{name}"]
            >= evaluation.metrics["exact_match" if name == "exact" else "f1"] - 1e-9
        )
    for question in records:
        entries = nbest[question.id]
        scores = [entry["start_logit"] + entry["end_logit"] for entry in entries]
        assert scores == sorted(scores, reverse=True)
        weights = [math.exp(score - scores[0]) for score in scores]
        for entry, weight in zip(entries, weights, strict=True):
            assert entry["probability"] == pytest.approx(weight / sum(weights))
        # No answer where its score exceeds that of the best span by more than the threshold, 0.
        given = "" if odds[question.id] > 0 else best[ids.index(question.id)]
        assert answers[question.id] == given
