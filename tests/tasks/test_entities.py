"""Label schemes: found, read, written, scored."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score

from tpcore.tasks.entities import (
    Entity,
    all_labels,
    find_entities,
    find_scheme,
    label_entities,
    score_entities,
)
from tpcore.tasks.task import DataError
from tpcore.tasks.windows import best_windows, cut_windows


@st.composite
def _sentences(draw):
    """(number of words, entities in order without overlap)."""
    entities = []
    start = draw(st.integers(0, 2))
    for _ in range(draw(st.integers(0, 4))):
        length = draw(st.integers(1, 3))
        kind = draw(st.sampled_from(["PER", "LOC", "creative-work"]))
        entities.append(Entity(kind, start, start + length - 1))
        start += length + draw(st.integers(0, 2))
    return start + draw(st.integers(0, 2)), entities


@given(_sentences(), st.sampled_from(["IOB1", "IOB2", "IOBES"]))
def test_labels_and_entities_are_the_same_thing(sentence, scheme):
    num_words, entities = sentence
    labels = label_entities(entities, num_words, scheme, "O")
    assert len(labels) == num_words
    assert find_entities(labels, scheme, "O") == entities
    assert set(labels) <= set(all_labels(labels, scheme, "O"))


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        ("O I-A I-A O I-B", "IOB1"),
        ("O I-A B-A O I-B", "IOB1"),
        ("I-A I-B", "IOB1"),
        ("O B-A I-A O B-B", "IOB2"),
        ("B-A B-A", "IOB2"),
        ("B I O B", "IOB2"),
        ("B-A I-B", "IOB2"),  # a slip, in a file that begins entities with B-
        ("S-A O B-A E-A", "IOBES"),
        ("PER O LOC", "IO"),
        ("O O", "IO"),
    ],
)
def test_schemes_are_recognised(labels, scheme):
    assert find_scheme([(str, labels.split())], "O") == scheme


def test_marks_on_some_labels_only():
    def places(word: int) -> str:
        return f"f:{2 + word}"

    with pytest.raises(DataError, match=r"f:3: label 'L-A' begins with none of .*scheme=IO"):
        find_scheme([(str, ["B-A", "I-A"]), (places, ["O", "L-A"])], "O")
    with pytest.raises(DataError, match=r"f:2: label 'B-' names no type; write one"):
        find_scheme([(str, ["B-A", "I-A"]), (places, ["B-", "O"])], "O")


def test_scheme_without_marks():
    labels = ["PER", "PER", "O", "LOC", "PER"]
    assert find_entities(labels, "IO", "O") == [
        Entity("PER", 0, 1),
        Entity("LOC", 3, 3),
        Entity("PER", 4, 4),
    ]
    assert all_labels(labels, "IO", "O") == ["O", "LOC", "PER"]


def test_outside_label_of_another_name():
    assert find_entities(["X", "B-A", "X"], "IOB2", "X") == [Entity("A", 1, 1)]
    assert score_entities([["X", "B-A"]], [["X", "B-A"]], "IOB2", "X").f1 == 1.0


@given(st.lists(st.tuples(_sentences(), _sentences()), min_size=1, max_size=5))
def test_scores_are_those_of_seqeval(pairs):
    true, predicted = [], []
    for (one, entities), (other, others) in pairs:
        size = max(one, other, 1)
        true.append(label_entities(entities, size, "IOB2", "O"))
        predicted.append(label_entities(others, size, "IOB2", "O"))
    scores = score_entities(true, predicted, "IOB2", "O")
    assert scores.precision == precision_score(true, predicted, zero_division=0)
    assert scores.recall == recall_score(true, predicted, zero_division=0)
    assert scores.f1 == f1_score(true, predicted, zero_division=0)


def test_scores_by_hand():
    true = [["B-A", "I-A", "O", "B-B"], ["B-A", "O"]]
    predicted = [["B-A", "O", "O", "B-B"], ["B-A", "B-B"]]
    scores = score_entities(true, predicted, "IOB2", "O")
    assert scores.types == {"A": (0.5, 0.5, 0.5, 2), "B": (0.5, 1.0, pytest.approx(2 / 3), 1)}
    assert (scores.precision, scores.recall) == (0.5, pytest.approx(2 / 3))
    table = scores.to_table().splitlines()
    assert table[1].split() == ["A", "0.5000", "0.5000", "0.5000", "2"]
    assert table[-1].split()[-1] == "3"


# --- windows ------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_windows_cover_every_token(num_tokens, room, data):
    stride = data.draw(st.integers(1, room))
    windows = cut_windows(num_tokens, room, stride)
    assert windows[0].start == 0
    assert windows[-1].stop == num_tokens
    assert all(len(window) == room for window in windows[:-1])
    assert all(b.start - a.start == stride for a, b in itertools.pairwise(windows))
    best = best_windows(windows, num_tokens)
    for token, number in enumerate(best):
        assert token in windows[number]
        context = [min(token - w.start, w.stop - 1 - token) if token in w else -1 for w in windows]
        assert context[number] == max(context)


def test_windows_by_hand():
    windows = cut_windows(10, 4, 2)
    assert windows == [range(0, 4), range(2, 6), range(4, 8), range(6, 10)]
    assert best_windows(windows, 10) == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_a_stride_that_leaves_tokens_out_is_refused():
    with pytest.raises(ValueError, match="stride=5 with room for 4"):
        cut_windows(10, 4, 5)
