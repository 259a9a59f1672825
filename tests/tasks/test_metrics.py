"""Classification scores against tables worked by hand and invariants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcore.tasks.metrics import ClassScores, score_classification

LABELS = ("ham", "spam", "unused")


def test_hand_worked_table():
    #        predicted ham  spam
    # true ham          5     1
    # true spam         2     2
    true = ["ham"] * 6 + ["spam"] * 4
    predicted = ["ham"] * 5 + ["spam"] + ["ham"] * 2 + ["spam"] * 2
    scores = score_classification(true, predicted, LABELS)
    assert scores.accuracy == pytest.approx(7 / 10)
    ham_f1, spam_f1 = 2 * 5 / (7 + 6), 2 * 2 / (3 + 4)
    assert scores.classes == (
        ClassScores("ham", pytest.approx(5 / 7), pytest.approx(5 / 6), pytest.approx(ham_f1), 6),
        ClassScores("spam", pytest.approx(2 / 3), pytest.approx(2 / 4), pytest.approx(spam_f1), 4),
        ClassScores("unused", 0.0, 0.0, 0.0, 0),
    )
    # A class that is neither true nor predicted anywhere takes no part in the mean.
    assert scores.macro_f1 == pytest.approx((ham_f1 + spam_f1) / 2)
    assert scores.confusion == ((5, 1, 0), (2, 2, 0), (0, 0, 0))


def test_a_class_that_is_only_predicted_counts_in_the_mean():
    scores = score_classification(["a", "a"], ["a", "b"], ["a", "b", "c"])
    assert scores.macro_f1 == pytest.approx((2 / 3 + 0) / 2)


def test_metrics_are_flat_plain_numbers():
    metrics = score_classification(["ham", "spam"], ["ham", "ham"], LABELS[:2]).to_metrics()
    assert metrics == {
        "accuracy": 0.5,
        "macro_f1": pytest.approx(1 / 3),
        "precision/ham": 0.5,
        "recall/ham": 1.0,
        "f1/ham": pytest.approx(2 / 3),
        "precision/spam": 0.0,
        "recall/spam": 0.0,
        "f1/spam": 0.0,
    }
    assert {type(value) for value in metrics.values()} == {float}


def test_table_is_aligned():
    scores = score_classification(["ham"] * 3 + ["not spam"], ["ham"] * 4, ["ham", "not spam"])
    assert scores.to_table().split("\n") == [
        "label     precision  recall      f1  support",
        "ham          0.7500  1.0000  0.8571        3",
        "not spam     0.0000  0.0000  0.0000        1",
        "",
        "true      predicted",
        "               ham  not spam",
        "ham              3         0",
        "not spam         1         0",
    ]
    many = [f"class {index}" for index in range(11)]
    assert "predicted" not in score_classification(many, many, many).to_table()


@given(pairs=st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1))
def test_invariants(pairs):
    true, predicted = zip(*pairs, strict=True)
    scores = score_classification(true, predicted, LABELS)
    assert scores.accuracy == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert sum(map(sum, scores.confusion)) == len(pairs)
    for index, of_class in enumerate(scores.classes):
        hits, row = scores.confusion[index][index], sum(scores.confusion[index])
        column = sum(line[index] for line in scores.confusion)
        assert of_class.support == row == true.count(of_class.label)
        assert of_class.precision == pytest.approx(hits / column if column else 0)
        assert of_class.recall == pytest.approx(hits / row if row else 0)
        assert of_class.f1 == pytest.approx(2 * hits / (row + column) if row + column else 0)
    present = [c.f1 for c in scores.classes if c.label in true or c.label in predicted]
    assert scores.macro_f1 == pytest.approx(sum(present) / len(present))


@pytest.mark.parametrize(
    ("true", "predicted", "message"),
    [
        ([], [], "0 true and 0 predicted"),
        (["ham"], ["ham", "spam"], "1 true and 2 predicted"),
        (["ham"], ["eggs"], "'eggs' is not among the labels: ham, spam, unused"),
    ],
)
def test_bad_arguments(true, predicted, message):
    with pytest.raises(ValueError, match=message):
        score_classification(true, predicted, LABELS)
