"""Text classification: data files good and bad, labels, loss, predictions, settings."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import build_head
from tpcore.parallel.group import TensorParallelGroup
from tpcore.tasks import DataError, TextClassification, task_class
from tpcore.tasks.labels import Labels
from tpcore.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer
from tpcore.train.config import config_class
from tpcore.train.read_config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = Path(__file__).parents[3] / "shared" / "data"
WORDS = ("good", "bad", "film", "a", "very", "the", "day", "##s", ".")
TOKENIZER = WordPieceTokenizer((*SPECIAL_TOKENS, *WORDS))


@pytest.fixture
def write(tmp_path):
    """A function that writes a data file and returns its path."""

    def write_file(content: str | bytes, name: str = "data.tsv") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def _config(**dataset: Any) -> Any:
    config = config_class("text_classification")().model
    config.class_labels.class_labels_file = dataset.pop("labels_file", None)
    for key, value in dataset.items():
        setattr(config.dataset, key, value)
    return config


def _create(path: Path | None, **dataset: Any) -> TextClassification:
    return TextClassification.create(_config(**dataset), TOKENIZER, path)


def _contents(dataset) -> list[tuple[int, str, str | None]]:
    return [(record.line, record.text, record.label) for record in dataset.records]


GOOD_FILES = {
    "label first": "pos\ta good film\nneg\ta bad film\npos\tvery good\nneg\tthe day\n",
    "text first": "a good film\tpos\na bad film\tneg\nvery good\tpos\nthe day\tneg\n",
    "header": "sentence\tlabel\na good film\tpos\na bad film\tneg\nvery good\tpos\nthe day\tneg\n",
    "header, other case and order": "Label\tText\npos\ta good film\nneg\ta bad film\npos\tvery good"
    "\nneg\tthe day\n",
    "three columns": "index\tsentence\tlabel\n0\ta good film\tpos\n1\ta bad film\tneg\n2\tvery good"
    "\tpos\n3\tthe day\tneg\n",
    "crlf": "pos\ta good film\r\nneg\ta bad film\r\npos\tvery good\r\nneg\tthe day\r\n",
    "mixed line ends, no last one": "pos\ta good film\r\nneg\ta bad film\npos\tvery good\r\nneg\t"
    "the day",
    "bom": "\ufeffpos\ta good film\nneg\ta bad film\npos\tvery good\nneg\tthe day\n",
    "spaces around labels": " pos\ta good film\nneg \ta bad film\npos\tvery good\nneg\tthe day\n",
    "blank lines": "pos\ta good film\n\nneg\ta bad film\npos\tvery good\n  \nneg\tthe day\n\n",
}


@pytest.mark.parametrize("content", GOOD_FILES.values(), ids=GOOD_FILES)
def test_good_files(write, content):
    path = write(content)
    task = _create(path)
    assert task.labels.names == ("neg", "pos")
    dataset = task.load(path)
    assert [(record.text, record.label) for record in dataset.records] == [
        ("a good film", "pos"),
        ("a bad film", "neg"),
        ("very good", "pos"),
        ("the day", "neg"),
    ]
    lines = content.lstrip("\ufeff").split("\n")
    assert all(record.text in lines[record.line - 1] for record in dataset.records)
    for index, example in enumerate(dataset.examples):
        assert (example.index, example.record) == (index, index)
        assert example.input_ids == TOKENIZER.encode(dataset.records[index].text).ids
        assert example.type_ids == [0] * len(example)
        assert example.labels == task.labels.names.index(dataset.records[index].label)
    blanks = sum(not line.strip() for line in lines[:-1])
    assert any(f"{blanks} blank line(s)" in note for note in dataset.notes) == bool(blanks)


def test_nemo_form(write):
    """Sentences with integer labels; a line without an integer is a header."""
    rows = "".join(f"the film {i}\t{i % 12}\n" for i in range(36))
    for header in ("", "sentence\tlabel\n", "words\tsentiment\n"):
        path = write(header + rows)
        task = _create(path, num_classes=12)
        assert task.labels.names == tuple(map(str, range(12)))
        assert len(task.load(path).records) == 36
    assert task.load(write("unseen heading\tx\nthe film\t11\n")).examples[0].labels == 11


def test_integer_labels_are_ordered_as_numbers(write):
    path = write("the\t10\nfilm\t9\nday\t-1\nthe film\t10\n")
    assert _create(path).labels.names == ("-1", "9", "10")


def test_num_classes_covers_labels_that_the_training_file_lacks(write):
    path = write("the film\t0\nthe day\t3\n")
    assert _create(path).labels.names == ("0", "3")
    assert _create(path, num_classes=5).labels.names == ("0", "1", "2", "3", "4")
    with pytest.raises(ValueError, match=r"num_classes=3, but .*data\.tsv has 2 labels \(0, 3\)"):
        _create(path, num_classes=3)


def test_label_file_gives_names_and_order(write):
    labels = write("pos\nneg\nneutral\n", "labels.csv")
    by_name = _create(write("neg\ta bad film\npos\tgood\n"), labels_file=str(labels))
    assert by_name.labels.names == ("pos", "neg", "neutral")
    assert [e.labels for e in by_name.load(write("neg\ta bad film\npos\tgood\n")).examples] == [
        1,
        0,
    ]
    # NeMo: integers in the data, names in the file.
    path = write("a bad film\t1\ngood\t0\n", "integers.tsv")
    by_number = _create(path, labels_file=str(labels), num_classes=3)
    dataset = by_number.load(path)
    assert [example.labels for example in dataset.examples] == [1, 0]
    assert [record.label for record in dataset.records] == ["neg", "pos"]
    # No training file is needed for the labels then.
    assert _create(None, labels_file=str(labels)).labels.names == ("pos", "neg", "neutral")


@pytest.mark.parametrize(
    ("dataset", "content"),
    [
        ({"text_column": "0", "label_column": "2"}, "good\tx\tpos\nbad\ty\tneg\n"),
        (
            {"text_column": "0", "label_column": "2", "header": True},
            "a\tb\tc\ngood\tx\tpos\nbad\ty\tneg\n",
        ),
        (
            {"text_column": "words", "label_column": "MOOD"},
            "x\tmood\twords\n1\tpos\tgood\n2\tneg\tbad\n",
        ),
        ({"text_column": "0"}, "good\tpos\nbad\tneg\n"),
        ({"label_column": "1"}, "good\tpos\nbad\tneg\n"),
        ({"label_column": "0", "header": False}, "label\tsentence\npos\tgood\nneg\tbad\n"),
    ],
    ids=["numbers", "numbers with header", "names", "text only", "label only", "no header"],
)
def test_column_settings(write, dataset, content):
    path = write(content)
    task = _create(path, **dataset)
    contents = [(record.text, record.label) for record in task.load(path).records]
    assert contents[-2:] == [("good", "pos"), ("bad", "neg")]
    assert contents[:-2] == ([("sentence", "label")] if dataset.get("header") is False else [])


def test_other_files_may_have_another_layout(write):
    task = _create(write(GOOD_FILES["text first"]))
    for content in GOOD_FILES.values():
        labels = [record.label for record in task.load(write(content)).records]
        assert labels == ["pos", "neg", "pos", "neg"]


def test_gad_has_a_header_in_one_file_only():
    if not (SHARED / "gad").is_dir():
        pytest.skip("../shared/data/gad is not here")
    task = _create(SHARED / "gad" / "train.tsv")
    assert task.labels.names == ("0", "1")
    assert len(task.load(SHARED / "gad" / "train.tsv").records) == 4796
    test = task.load(SHARED / "gad" / "test.tsv")
    assert len(test.records) == 534
    assert test.records[0].label == "1"
    assert test.records[0].text.startswith("These results suggest")


TRAIN = "pos\ta good film\nneg\ta bad film\npos\tvery good\nneg\tthe day\n"

BAD_FILES = {
    "empty": (b"", "is empty; expected at least one line"),
    "only blank lines": (b"\n \r\n\n", "is empty; expected at least one line"),
    "column count": ("pos\tgood\nneg\tbad\npos\tgood\tfilm\n", ":3: 3 columns, while 2 of 3 lines"),
    "no tab": ("pos good\nneg bad\n", ":1: 1 column, no tab; expected a label and a text"),
    "missing tab": (TRAIN + "pos good\n", ":5: 1 column, while 4 of 5 lines have 2"),
    "nul": (b"pos\tgood\nneg\tb\0ad\n", ":2: the line holds a NUL byte"),
    "latin-1": (
        b"pos\tgood\nneg\tcaf\xe9\n",
        ":2: byte 0xe9 is not UTF-8; if the file is in Latin-1",
    ),
    "utf-16": ("pos\tgood\n".encode("utf-16"), "is UTF-16; expected UTF-8"),
    "old mac": (b"pos\tgood\rneg\tbad\r", r"lines end in \\r alone"),
    "header only": ("sentence\tlabel\n", "has a header but no data"),
    "one label": ("pos\ta good film\npos\ta day\n", "all lines have the label 'pos'"),
    "empty label": (TRAIN + "\tthe film\n", ":5: the label is empty"),
    "unnamed header": ("mood\twords\n" + TRAIN, ":1: the label 'mood' occurs only here; if this"),
    "ambiguous": (
        "a b\tc d\ne f\tg h\n",
        r"which of the 2 columns is the text \('a b', 'c d'\); set",
    ),
    "many columns": ("1\tgood\tpos\n2\tbad\tneg\n", "which of the 3 columns is the text"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_training_files(write, content, message):
    path = write(content)
    with pytest.raises(DataError, match=message) as error:
        _create(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        _create(tmp_path / "absent.tsv")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        _create(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            TRAIN + "pso\tgood\n",
            r":5: unknown label 'pso' \(did you mean 'pos'\?\); the labels are neg",
        ),
        ("Mood\tWords\n" + TRAIN, r":1: unknown label 'Mood'; .* model\.dataset\.header=true"),
        ("x\tgood\ny\tbad\n", ":1: unknown label 'x'"),
        (TRAIN + "neg\t  \n", ":5: the text is empty"),
        ("1\tgood\n0\tbad\n2\tday\n", ":3: unknown label '2'"),
    ],
    ids=["misspelt", "header", "all unknown", "no text", "number beyond the labels"],
)
def test_bad_validation_files(write, content, message):
    task = _create(write(TRAIN))
    path = write(content, "validation.tsv")
    with pytest.raises(DataError, match=re.escape(str(path)) + message):
        task.load(path)


@pytest.mark.parametrize(
    ("content", "dataset", "message"),
    [
        (TRAIN, {"text_column": "body"}, "text_column=body, but the file has 2 columns: 'pos'"),
        (TRAIN, {"label_column": "2"}, "label_column=2, but the file has 2 columns"),
        (TRAIN, {"text_column": "words", "header": False}, "header=false, so columns have numbers"),
        (TRAIN, {"text_column": "1", "label_column": "1"}, "cannot be both the text and the label"),
    ],
)
def test_bad_column_settings(write, content, dataset, message):
    with pytest.raises(DataError, match=message):
        _create(write(content), **dataset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("pos\n", "1 label; a classification needs at least two"),
        ("pos\n\nneg\n", ":2: the line is empty"),
        ("pos\nneg\npos\n", ":3: label 'pos' is in line 1 already"),
    ],
)
def test_bad_label_files(write, content, message):
    labels = write(content, "labels.csv")
    with pytest.raises(DataError, match=message):
        _create(write(TRAIN), labels_file=str(labels))


def test_bad_arguments(write):
    with pytest.raises(ValueError, match="no labels: give a training file"):
        _create(None)
    with pytest.raises(ValueError, match="expected two or more, all different"):
        Labels(["a", "a"])
    with pytest.raises(ValueError, match="1 class weights for 2 labels"):
        TextClassification(TOKENIZER, Labels(["a", "b"]), class_weights=[1.0])
    with pytest.raises(ValueError, match="num_samples=0"):
        _create(write(TRAIN)).load(write(TRAIN), num_samples=0)
    with pytest.raises(TypeError, match="input 2 is a int"):
        _create(write(TRAIN)).from_inputs(["good", 3])
    with pytest.raises(ValueError, match="did you mean text_classification"):
        task_class("text_clasification")
    assert task_class("text_classification") is TextClassification


def test_num_samples(write):
    path = write(TRAIN)
    task = _create(path)
    assert len(task.load(path, num_samples=3).records) == 3
    assert len(task.load(path, num_samples=30).records) == 4


def test_long_texts_are_cut_and_counted(write):
    path = write(TRAIN + "neg\t" + "the film. " * 12_000 + "\n")
    dataset = _create(path, max_seq_length=6).load(path)
    long = dataset.examples[4].input_ids
    assert len(long) == 6
    assert (long[0], long[-1]) == (TOKENIZER.cls_id, TOKENIZER.sep_id)
    [note] = [note for note in dataset.notes if "text(s) cut" in note]
    assert "1 text(s) cut to model.dataset.max_seq_length=6 tokens" in note
    assert note.endswith("the longest has 36002")


def test_reading_is_deterministic(write):
    path = write(TRAIN)
    first, second = _create(path), _create(path)
    assert first.to_config() == second.to_config()
    assert first.load(path) == second.load(path)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("a good film\nthe day\n", ["a good film", "the day"]),
        ("sentence\na good film\n", ["a good film"]),
        ("index\tsentence\n0\ta good film\n1\tbad\n", ["a good film", "bad"]),
        (TRAIN, ["a good film", "a bad film", "very good", "the day"]),
        ("neg\tgood\n?\tbad\n", ["good", "bad"]),
        ("?\tgood\n?\tbad\n", ["good", "bad"]),
    ],
    ids=["one column", "one with header", "glue test file", "labelled", "some labels", "no labels"],
)
def test_files_for_prediction(write, content, texts):
    task = _create(write(TRAIN))
    dataset = task.load(write(content), labelled=False)
    assert [record.text for record in dataset.records] == texts
    assert {record.label for record in dataset.records} == {None}
    assert not task.collate(dataset.examples).labels


def test_inputs_for_prediction(write):
    task = _create(write(TRAIN))
    dataset = task.from_inputs(text for text in ["a\tgood\nfilm", "", "bad"])
    assert [record.text for record in dataset.records] == ["a\tgood\nfilm", "", "bad"]
    assert dataset.examples[0].input_ids == TOKENIZER.encode("a good film").ids
    assert len(dataset.examples[1]) == 2


def _model(task: TextClassification) -> BertModel:
    torch.manual_seed(0)
    tp = TensorParallelGroup.single()
    config = BertConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        init_std=0.5,
    )
    model = BertModel(config, tp=tp).eval()
    model.head = build_head(task.head_name, config, tp=tp, **task.head_kwargs()).eval()
    return model


@pytest.mark.parametrize("balanced", [False, True])
def test_loss_does_not_depend_on_how_a_batch_is_cut(write, balanced):
    path = write("a\tgood film\nb\ta bad day\na\tvery very good\na\tthe\nc\tfilms.\na\ta day\n")
    task = _create(path, class_balancing="weighted_loss" if balanced else None)
    dataset = task.load(path)
    model = _model(task)
    targets = torch.tensor([0, 1, 0, 0, 2, 0])
    weight = torch.tensor([6 / 12, 6 / 3, 6 / 3]) if balanced else None

    def run(*batches):
        sums, counts, grads = torch.zeros(1), 0.0, torch.zeros_like(model.head.classifier.weight)
        for chosen in batches:
            batch = task.collate([dataset.examples[i] for i in chosen])
            terms = task.loss_sums(model.forward_packed(batch.packed), batch)
            assert terms.shape == (1,)
            assert terms.dtype == torch.float32
            [gradient] = torch.autograd.grad(terms.sum(), model.head.classifier.weight)
            [count] = task.label_counts(batch)
            sums, counts, grads = sums + terms.detach(), counts + count, grads + gradient
        return sums / counts, grads / counts

    loss, grads = run([0, 1, 2, 3, 4, 5])
    logits = torch.cat(
        [model.forward_packed(task.collate([e]).packed).logits for e in dataset.examples]
    )
    expected = F.cross_entropy(logits, targets, weight=weight)
    torch.testing.assert_close(loss[0], expected)
    for cut in (([0, 1, 2], [3, 4, 5]), ([5, 1], [0], [2, 4, 3])):
        other_loss, other_grads = run(*cut)
        torch.testing.assert_close(other_loss, loss)
        torch.testing.assert_close(other_grads, grads)


def test_batches(write):
    path = write(TRAIN)
    task = _create(path)
    dataset = task.load(path)
    batch = task.collate([dataset.examples[2], dataset.examples[0]])
    assert batch.packed.input_ids.tolist() == [
        *dataset.examples[2].input_ids,
        *dataset.examples[0].input_ids,
    ]
    assert batch.packed.sequences.lengths == (4, 5)
    # Dropout is keyed by the example, wherever it stands in a batch.
    assert (batch.packed.row_ids >> 20).tolist() == [2] * 4 + [0] * 5
    assert batch.labels["label"].tolist() == [1, 1]
    assert task.label_counts(batch) == (2.0,)


def test_decoding_and_metrics(write):
    path = write(TRAIN)
    task = _create(path)
    dataset = task.load(path)
    batch = task.collate(dataset.examples)
    logits = torch.tensor([[0.0, 3.0], [2.0, -1.0], [1.0, 0.0], [4.0, 4.0]], dtype=torch.bfloat16)
    output = dataclasses.replace(_model(task).forward_packed(batch.packed), logits=logits)
    decoded = task.decode(output, batch)
    assert pickle.loads(pickle.dumps(decoded)) == decoded
    assert decoded[3] == [0.5, 0.5]
    predictions = task.predictions(dataset, decoded)
    assert [prediction["label"] for prediction in predictions] == ["pos", "neg", "neg", "neg"]
    assert json.loads(json.dumps(predictions)) == predictions
    expected = torch.tensor([0.0, 3.0]).softmax(0).tolist()
    assert list(predictions[0]["probabilities"]) == ["neg", "pos"]
    assert list(predictions[0]["probabilities"].values()) == pytest.approx(expected)
    assert task.metrics(dataset, predictions)["accuracy"] == 0.75
    assert task.monitor.metric in task.metrics(dataset, predictions)
    assert "support" in task.report(dataset, predictions)
    with pytest.raises(ValueError, match="line 1 has no label to compare with"):
        task.metrics(task.load(path, labelled=False), predictions)


def test_prediction_files(write, tmp_path):
    path = write(TRAIN)
    task = _create(path)
    dataset = task.load(path)
    predictions = task.predictions(dataset, [[0.25, 0.75], [1.0, 0.0], [0.1, 0.9], [0.9, 0.1]])
    task.write_predictions(tmp_path / "out.tsv", dataset, predictions)
    assert (tmp_path / "out.tsv").read_text().split("\n")[:2] == [
        "line\tprediction\tprobability\tlabel\ttext",
        "1\tpos\t0.750000\tpos\ta good film",
    ]
    task.write_predictions(tmp_path / "out.jsonl", dataset, predictions)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "line": 2,
        "prediction": "neg",
        "probabilities": {"neg": 1.0, "pos": 0.0},
        "label": "neg",
        "text": "a bad film",
    }
    unlabelled = task.from_inputs(["a\tgood\r\nfilm"])
    task.write_predictions(tmp_path / "out.tsv", unlabelled, predictions[:1])
    assert (tmp_path / "out.tsv").read_text().split("\n")[1:] == [
        "1\tpos\t0.750000\t\ta good  film",
        "",
    ]
    with pytest.raises(ValueError, match="cannot be written: No such file"):
        task.write_predictions(tmp_path / "no" / "out.tsv", dataset, predictions)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="cannot be written: Is a directory"):
        task.write_predictions(tmp_path / "folder", dataset, predictions)
    assert sorted(os.listdir(tmp_path)) == ["data.tsv", "folder", "out.jsonl", "out.tsv"]


@pytest.mark.parametrize(
    "dataset", [{}, {"class_balancing": "weighted_loss", "text_column": "1", "max_seq_length": 9}]
)
def test_a_task_comes_back_from_its_settings(write, dataset):
    path = write(TRAIN)
    task = _create(path, **dataset)
    stored = json.loads(json.dumps(task.to_config()))
    again = task_class(task.name).from_config(stored, TOKENIZER)
    assert again.to_config() == task.to_config()
    assert again.load(path) == task.load(path)
    assert again.head_kwargs() == task.head_kwargs() == {"num_labels": 2, "dropout": None}


_texts = st.text(
    st.characters(exclude_characters="\t\n\r\0", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(str.strip)
_rows = st.lists(
    st.tuples(st.sampled_from(["ham", "spam", "a b", "é"]), _texts), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=100)
@given(rows=_rows, swap=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_any_file_with_given_columns_is_read_exactly(tmp_path_factory, rows, swap, end):
    path = tmp_path_factory.mktemp("files") / "data.tsv"
    lines = ["\t".join((text, label) if swap else (label, text)) for label, text in rows]
    path.write_bytes("".join(line + end for line in lines).encode())
    labels = path.with_name("labels.txt")
    labels.write_text("ham\nspam\na b\né\n", encoding="utf-8")
    columns = {"text_column": "0" if swap else "1", "header": False}
    task = _create(path, labels_file=str(labels), **columns)
    assert _contents(task.load(path)) == [
        (number, text, label) for number, (label, text) in enumerate(rows, start=1)
    ]


def test_sms_example(tmp_path):
    """The preparation script: every message is accounted for, and no text is on both sides."""
    script = EXAMPLES / "prepare_sms_spam.py"
    result = subprocess.run(
        [sys.executable, script, tmp_path / "data"], capture_output=True, text=True, check=True
    )
    assert "5574 messages read" in result.stdout
    assert "415 duplicates removed" in result.stdout
    assert "0 messages dropped" in result.stdout
    task = _create(tmp_path / "data" / "train.tsv")
    assert task.labels.names == ("ham", "spam")
    train = task.load(tmp_path / "data" / "train.tsv").records
    validation = task.load(tmp_path / "data" / "validation.tsv").records
    assert Counter(record.label for record in train) == {"ham": 3614, "spam": 514}
    assert Counter(record.label for record in validation) == {"ham": 903, "spam": 128}
    keys = [" ".join(record.text.casefold().split()) for record in (*train, *validation)]
    assert len(set(keys)) == len(keys) == 5574 - 415


def test_sms_preparation_drops_conflicts_and_does_not_depend_on_order(write, tmp_path):
    module = runpy.run_path(str(EXAMPLES / "prepare_sms_spam.py"))
    rows = [("ham" if i % 3 else "spam", f"message number {i}") for i in range(60)]
    extra = [
        ("ham", "Message  NUMBER 1"),
        ("ham", "\uff4dessage number 2"),
        ("ham", "message number 3"),
    ]
    lines = [f"{label}\t{text}" for label, text in rows + extra]

    def prepare(lines):
        messages = module["read_messages"](write("\n".join(lines)))
        kept, conflicts = module["remove_duplicates"](messages)
        parts = module["split"](kept, 20.0)
        return [{(m.label, m.key) for m in part} for part in parts], kept, conflicts

    parts, kept, conflicts = prepare(lines)
    assert [[m.line_number for m in group] for group in conflicts] == [[4, 63]]
    assert [m.line_number for m in kept] == [i for i in range(1, 61) if i != 4]
    assert [len(part) for part in parts] == [47, 12]
    assert prepare(lines[::-1])[0] == parts
    with pytest.raises(ValueError, match=":1: expected label<TAB>text"):
        module["read_messages"](write("no tab here\n"))


def test_sms_configuration():
    config = load_config(EXAMPLES / "sms_spam.yaml")
    assert config.task == TextClassification.name
    assert config.model.train_ds.file_path == "runs/demo/train.tsv"
    assert config.model.validation_ds.file_path == "runs/demo/validation.tsv"


def test_classes_are_listed_and_slips_among_them_named(write):
    path = write('pos\ta film\npos\ta day\nPos\tgood\n"pos"\tgood .\nneg\tbad\nneg\tthe\n')
    notes = _create(path, header=False).load(path).notes
    assert f'{path}: 4 class(es): "pos" 1, Pos 1, neg 2, pos 2' in notes
    [single] = [note for note in notes if "only one example" in note]
    assert single.endswith("of '\"pos\"', 'Pos'")
    [alike] = [note for note in notes if "differ only in case" in note]
    assert "'\"pos\"', 'Pos', 'pos' differ" in alike
    clean = write("pos\ta film\npos\ta day\nneg\tbad\nneg\tthe\n", "clean.tsv")
    assert not any("warning" in note for note in _create(clean).load(clean).notes)
