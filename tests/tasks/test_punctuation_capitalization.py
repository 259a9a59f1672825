"""Punctuation and capitalisation: files good and bad, two losses, restored texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from tpcore.models.heads import IGNORE_INDEX
from tpcore.models.output import BertOutput
from tpcore.tasks import DataError, PunctuationCapitalization
from tpcore.tasks.punctuation_capitalization import restore
from tpcore.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer
from tpcore.train.config import config_class

WORDS = ("yes", "we", "can", "##not", "go", "now", "where")
TOKENIZER = WordPieceTokenizer((*SPECIAL_TOKENS, *WORDS))
TEXT = "yes we cannot go\nwhere\n\nwe can now\n"
LABELS = ",U OO OO .O\n?U\n\nOU OO .O\n"


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    text, labels = tmp_path / "text_train.txt", tmp_path / "labels_train.txt"
    text.write_text(TEXT)
    labels.write_text(LABELS)
    return text, labels


def _create(source: Any, **dataset: Any) -> PunctuationCapitalization:
    config = config_class("punctuation_capitalization")().model
    for key, value in dataset.items():
        setattr(config.dataset, key, value)
    return PunctuationCapitalization.create(config, TOKENIZER, source)


def test_files(files, tmp_path):
    task = _create(files)
    assert task.marks.names == ("O", ",", ".", "?")
    assert task.head_kwargs()["num_labels"] == 6
    dataset = task.load(files)
    assert [len(record.words) for record in dataset.records] == [4, 1, 3]
    assert any("1 blank line(s) left out" in note for note in dataset.notes)
    example, none = dataset.examples[0], IGNORE_INDEX
    assert [TOKENIZER.vocabulary[i] for i in example.input_ids[1:-1]] == [
        "yes", "we", "can", "##not", "go",
    ]  # fmt: skip
    assert example.labels == ([none, 1, 0, 0, none, 2, none], [none, 1, 0, 0, none, 0, none])
    exact = [[(w, l1, l2) for (_, _, w), l1, l2 in zip(
        e.words, [i for i in e.labels[0] if i >= 0], [i for i in e.labels[1] if i >= 0],
        strict=True)] for e in dataset.examples]  # fmt: skip
    predictions = task.predictions(dataset, exact)
    assert [p["text"] for p in predictions] == ["Yes, we cannot go.", "Where?", "We can now."]
    task.write_predictions(tmp_path / "out.txt", dataset, predictions)
    assert (tmp_path / "out.txt").read_text() == LABELS
    metrics = task.metrics(dataset, predictions)
    assert metrics["f1"] == metrics["punct_f1"] == metrics["capit_recall"] == 1.0
    again = PunctuationCapitalization.from_config(
        json.loads(json.dumps(task.to_config())), TOKENIZER
    )
    assert again.to_config() == task.to_config()


def test_loss_has_two_terms(files):
    task = _create(files)
    batch = task.collate(task.load(files).examples)
    logits = torch.randn(len(batch.packed), 6, generator=torch.Generator().manual_seed(0))
    sums = task.loss_sums(BertOutput(logits, logits=logits), batch)
    assert task.label_counts(batch) == (8.0, 8.0)
    for term, name, part in ((0, "mark", logits[:, :4]), (1, "capital", logits[:, 4:])):
        kept = batch.labels[name] >= 0
        assert int(kept.sum()) == 8
        expected = F.cross_entropy(part[kept], batch.labels[name][kept], reduction="sum")
        torch.testing.assert_close(sums[term], expected)


def test_scores_are_those_of_scikit_learn(files):
    task = _create(files)
    dataset = task.load(files)
    found = [[",U", "OO", ".O", ".O"], [".O"], ["OU", "OO", "?U"]]
    metrics = task.metrics(dataset, [{"labels": labels} for labels in found])
    true = [label for record in dataset.records for label in record.labels]
    flat = [label for labels in found for label in labels]
    for name, at in (("punct", 0), ("capit", 1)):
        pair = [label[at] for label in true], [label[at] for label in flat]
        assert metrics[f"{name}_f1"] == pytest.approx(
            f1_score(*pair, average="macro", zero_division=0)
        )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (",U OO OO\n?U\n\nOU OO .O\n", r"labels.txt:1: 3 labels for the 4 words"),
        (",U OO OO .O\n?X\n\nOU OO .O\n", r"labels.txt:2: label '\?X'; expected a mark"),
        (",U OO OO .O\nU\n\nOU OO .O\n", r"labels.txt:2: label 'U'; expected a mark"),
        (",U OO OO !O\n?U\n\nOU OO .O\n", r"labels.txt:1: unknown label '!'"),
        ("OU OO OO OO\n", r"has 4 lines, but .*labels.txt has 1"),
    ],
)
def test_bad_labels(files, tmp_path, labels, message):
    task = _create(files)
    path = tmp_path / "labels.txt"
    path.write_text(labels)
    with pytest.raises(DataError, match=message):
        task.load((files[0], path))


def test_texts_alone(files, tmp_path):
    task = _create(files)
    path = tmp_path / "new.txt"
    path.write_text("we can\ngo now\n")  # columns of equal number, and yet sentences
    assert [r.words for r in task.load(path, labelled=False).records] == [
        ["we", "can"],
        ["go", "now"],
    ]
    assert task.from_inputs(["we  can"]).records[0].words == ["we", "can"]
    with pytest.raises(TypeError, match="input 1 is a int"):
        task.from_inputs([1])
    assert restore(["we", "go"], ["OU", "?O"]) == "We go?"
