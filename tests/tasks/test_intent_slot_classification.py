"""Intents and slots: NeMo's folder good and bad, the weighted loss, windows, prediction files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tpcore.models.heads import IGNORE_INDEX
from tpcore.models.output import BertOutput
from tpcore.tasks import DataError, IntentSlotClassification
from tpcore.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer
from tpcore.train.config import config_class

TOKENIZER = WordPieceTokenizer((*SPECIAL_TOKENS, "set", "alarm", "for", "six", "##ty", "am", "no"))
TEXT = "sentence\tlabel\nset alarm for sixty am\t1\nno alarm\t0\n"
SLOTS = "2 2 2 0 1\n2 2\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "dict.intents.csv").write_text("cancel\nset\n")
    (tmp_path / "dict.slots.csv").write_text("B-time\nI-time\nO\n")
    (tmp_path / "train.tsv").write_text(TEXT)
    (tmp_path / "train_slots.tsv").write_text(SLOTS)
    return tmp_path


def _create(folder: Path, **dataset) -> IntentSlotClassification:
    config = config_class("intent_slot_classification")().model
    config.data_dir = str(folder)
    for key, value in dataset.items():
        setattr(config.dataset, key, value)
    return IntentSlotClassification.create(config, TOKENIZER, config.source("train_ds"))


def test_files(folder):
    task = _create(folder)
    assert (task.intents.names, task.scheme) == (("cancel", "set"), "IOB2")
    dataset = task.load(folder / "train.tsv")
    first, second = dataset.records
    assert (first.intent, first.sentence.labels) == ("set", ("O", "O", "O", "B-time", "I-time"))
    assert (second.line, second.intent) == (3, "cancel")
    none = IGNORE_INDEX
    assert dataset.examples[0].labels == ([1, *[none] * 7], [none, 2, 2, 2, 0, none, 1, none])
    decoded = [(1, [(0, 2), (1, 2), (2, 2), (3, 0), (4, 1)]), (1, [(0, 2), (1, 0)])]
    one, two = predictions = task.predictions(dataset, decoded)
    assert one["slots"] == [{"slot": "time", "start": 14, "end": 22, "text": "sixty am"}]
    assert (two["intent"], two["labels"]) == ("set", ["O", "B-time"])
    assert task.metrics(dataset, predictions) == pytest.approx(
        {"joint_accuracy": 0.5, "intent_accuracy": 0.5, "intent_f1": 1 / 3,
         "slot_precision": 0.5, "slot_recall": 1.0, "slot_f1": 2 / 3}
    )  # fmt: skip
    task.write_predictions(folder / "out.tsv", dataset, predictions)
    assert (folder / "out.tsv").read_text() == TEXT.replace("no alarm\t0", "no alarm\t1")
    assert (folder / "out_slots.tsv").read_text() == "2 2 2 0 1\n2 0\n"
    again = task.load(folder / "out.tsv")
    assert [u.intent for u in again.records] == ["set", "set"]
    copy = IntentSlotClassification.from_config(json.loads(json.dumps(task.to_config())), TOKENIZER)
    assert copy.to_config() == task.to_config()
    (folder / "new.tsv").write_text("set alarm\nno\n")
    assert [u.sentence.words for u in task.load(folder / "new.tsv", labelled=False).records] == [
        ["set", "alarm"],
        ["no"],
    ]


def test_loss_is_weighted(folder):
    task = _create(folder)
    batch = task.collate(task.load(folder / "train.tsv").examples)
    logits = torch.randn(len(batch.packed), 5, generator=torch.Generator().manual_seed(0))
    sums = task.loss_sums(BertOutput(logits, logits=logits), batch)
    assert task.label_counts(batch) == (2.0, 7.0)
    starts = [0, len(batch.examples[0])]
    intent = F.cross_entropy(logits[starts, :2], torch.tensor([1, 0]), reduction="sum")
    kept = batch.labels["slot"] >= 0
    slot = F.cross_entropy(logits[kept, 2:], batch.labels["slot"][kept], reduction="sum")
    torch.testing.assert_close(sums, torch.stack([0.6 * intent, 0.4 * slot]))


def test_the_first_window_says_the_intent(folder):
    (folder / "long.tsv").write_text(f"{'set alarm ' * 20}\t1\n")
    (folder / "long_slots.tsv").write_text("2 " * 40)
    task = _create(folder, max_seq_length=12)
    dataset = task.load(folder / "long.tsv")
    assert len(dataset.examples) > 3
    assert [e.labels[0][0] for e in dataset.examples] == [1] + [IGNORE_INDEX] * (
        len(dataset.examples) - 1
    )
    decoded = [
        (int(number == 0), [(word, 2) for _, _, word in example.words])
        for number, example in enumerate(dataset.examples)
    ]
    assert task.predictions(dataset, decoded)[0]["intent"] == "set"


@pytest.mark.parametrize(
    ("text", "slots", "message"),
    [
        (TEXT, "2 2 2 0 1\n", r"train.tsv has 2 sentences, but .*train_slots.tsv has 1 lines"),
        (TEXT, "2 2 2 0\n2 2\n", r"train_slots.tsv:1: 4 slots for the 5 words of .*train.tsv:2"),
        (TEXT, "2 2 2 0 1\n2 7\n", r"train_slots.tsv:2: '7'; dict.slots.csv names .* 0 to 2"),
        (TEXT.replace("\t0", "\t9"), SLOTS, r"train.tsv:3: '9'; dict.intents.csv names .* 0 to 1"),
        (TEXT.replace("alarm\t0", "alarm"), SLOTS, r"train.tsv:3: 1 column\(s\); expected"),
        (TEXT.replace("no alarm", " "), SLOTS, r"train.tsv:3: the sentence is empty"),
        ("sentence\tlabel\n", "\n2\n", r"train.tsv has 0 sentences, but"),
    ],
)
def test_bad_files(folder, text, slots, message):
    task = _create(folder)
    (folder / "train.tsv").write_text(text)
    (folder / "train_slots.tsv").write_text(slots)
    with pytest.raises(DataError, match=message):
        task.load(folder / "train.tsv")


def test_slots_need_a_label_for_none(folder):
    (folder / "dict.slots.csv").write_text("B-time\nI-time\n")
    with pytest.raises(DataError, match=r"dict.slots.csv names no O"):
        _create(folder)
