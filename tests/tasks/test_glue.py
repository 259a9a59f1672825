"""GLUE's folders, metrics and server files; tables with pairs, commas, JSON; regression."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from sklearn import metrics

from tpcore.models.output import BertOutput
from tpcore.tasks import DataError, Glue, TextClassification, TextRegression
from tpcore.tasks.settings import GLUE_TASKS
from tpcore.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer
from tpcore.train.config import config_class
from tpcore.train.read_config import load_config

SHARED = Path(__file__).parents[3] / "shared" / "data"
WORDS = ("one", "two", "three", "four", "film", "a", ",", '"')
TOKENIZER = WordPieceTokenizer((*SPECIAL_TOKENS, *WORDS))
FILES = {  # task -> (header, row, test header, test row)
    "cola": ("", "gj04\t1\t*\tone two", "index\tsentence", "0\tone two"),
    "sst-2": ("sentence\tlabel", "one two\t1", "index\tsentence", "0\tone two"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tone two\tthree",
             "index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t7\t8\tone two\tthree"),
    "sts-b": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\ts1\ts2\tscore",
              "0\ta\tb\tc\td\te\tf\tone two\tthree\t3.25",
              "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
              "0\ta\tb\tc\td\te\tf\tone two\tthree"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "7\t1\t2\tone two\tthree\t1",
            "id\tquestion1\tquestion2", "0\tone two\tthree"),
    "mnli": ("\t".join("abcdefgh") + "\tsentence1\tsentence2\tlabel1\tgold_label",
             "\t".join("abcdefgh") + "\tone two\tthree\tneutral\tentailment",
             "\t".join("abcdefgh") + "\tsentence1\tsentence2",
             "\t".join("abcdefgh") + "\tone two\tthree"),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tone two\tthree\tentailment",
             "index\tquestion\tsentence", "0\tone two\tthree"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tone two\tthree\tentailment",
            "index\tsentence1\tsentence2", "0\tone two\tthree"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\tone two\tthree\t1",
             "index\tsentence1\tsentence2", "0\tone two\tthree"),
}  # fmt: skip
LABELS = {"sts-b": 3.25, "mnli": "entailment", "qnli": "entailment", "rte": "entailment"}


@pytest.fixture
def write(tmp_path):
    def write_file(content: str | bytes, name: str = "dev.tsv") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_folders_of_glue(write, name):
    header, row, test_header, test_row = FILES[name]
    task = Glue(TOKENIZER, task_name=name)
    lines = [line for line in (header, row, row.replace("two", "four")) if line]
    dataset = task.load(write("\n".join(lines) + "\n"))
    first, second = dataset.records
    is_pair = name not in ("cola", "sst-2")
    assert (first.text, first.pair) == ("one two", "three" if is_pair else None)
    assert (first.label, second.text) == (LABELS.get(name, "1"), "one four")
    tokens = [TOKENIZER.vocabulary[i] for i in dataset.examples[0].input_ids]
    pair = ["three", "[SEP]"] if is_pair else []
    assert tokens == ["[CLS]", "one", "two", "[SEP]", *pair]
    assert dataset.examples[0].type_ids == [0] * 4 + [1] * len(pair)
    assert dataset.examples[0].labels == {"sts-b": 3.25, "mnli": 1}.get(
        name, 0 if name in LABELS else 1
    )
    test = task.load(write(f"{test_header}\n{test_row}\n", "test.tsv"), labelled=False)
    assert [(r.text, r.pair, r.label) for r in test.records] == [(first.text, first.pair, None)]
    unlabelled = task.load(write("\n".join(lines) + "\n"), labelled=False)
    assert [r.text for r in unlabelled.records] == ["one two", "one four"]
    assert len(task.load(write("\n".join(lines) + "\n"), num_samples=1).records) == 1
    # A file of another task is told by its columns or its labels.
    with pytest.raises(DataError, match=r"dev.tsv:.* check model.task_name"):
        task.load(write("a\tb\nx\n"))
    again = Glue.from_config(json.loads(json.dumps(task.to_config())), TOKENIZER)
    assert again.to_config() == task.to_config()


def test_short_rows_of_qqp_are_counted(write):
    header, row, *_ = FILES["qqp"]
    dataset = Glue(TOKENIZER, task_name="qqp").load(write(f"{header}\n{row}\n7\t1\n{row}\n"))
    assert len(dataset.records) == 2
    assert any("1 line(s) with too few columns left out" in note for note in dataset.notes)


def test_settings_of_glue():
    overrides = ["task=glue", "model.task_name=sst-2", "model.dataset.data_dir=d",
                 "model.train_ds.ds_item=train.tsv"]  # fmt: skip
    config = load_config(None, overrides)
    assert config.model.source("train_ds") == "d/train.tsv"
    assert config.model.source("validation_ds") is None
    assert Glue.create(config.model, TOKENIZER, None).monitor.metric == "accuracy"
    with pytest.raises(ValueError, match="did you mean sst-2"):
        load_config(None, ["task=glue", "model.task_name=sst2"])


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_metrics_of_glue(write, name):
    header, row, *_ = FILES[name]
    task, draw = Glue(TOKENIZER, task_name=name), random.Random(0)
    classes = task.format.classes or tuple(f"{draw.random() * 5:.2f}" for _ in range(40))
    old = f"{LABELS.get(name, '1')}"
    true = [draw.choice(classes) for _ in range(40)]
    at = task.format.label
    lines = [header] if header else []
    for label in true:
        cells = row.split("\t")
        assert cells[at] == old
        cells[at] = label
        lines.append("\t".join(cells))
    dataset = task.load(write("\n".join(lines)))
    if name == "sts-b":
        numbers = [float(label) for label in true]
        found = [number + draw.gauss(0, 1) for number in numbers]
        scores = task.metrics(dataset, [{"value": value} for value in found])
        expected = {
            "pearson": stats.pearsonr(numbers, found).statistic,
            "spearman": stats.spearmanr(numbers, found).statistic,
        }
    else:
        found = [label if draw.random() < 0.7 else draw.choice(classes) for label in true]
        scores = task.metrics(dataset, [{"label": label} for label in found])
        expected = {"accuracy": metrics.accuracy_score(true, found)}
        if name == "cola":
            expected = {"mcc": metrics.matthews_corrcoef(true, found)}
        if name in ("mrpc", "qqp"):
            expected["f1"] = metrics.f1_score(true, found, pos_label="1")
    average = scores.pop("average", None)
    assert scores == pytest.approx(expected)
    if len(expected) == 2:
        assert average == pytest.approx(sum(expected.values()) / 2)


def test_files_for_the_server(write, tmp_path):
    header, row, *_ = FILES["rte"]
    task = Glue(TOKENIZER, task_name="rte")
    dataset = task.load(write(f"{header}\n{row}\n{row}\n"))
    labels = [{"label": "entailment"}, {"label": "not_entailment"}]
    task.write_predictions(tmp_path / "RTE.tsv", dataset, labels)
    assert (tmp_path / "RTE.tsv").read_text() == (
        "index\tprediction\n0\tentailment\n1\tnot_entailment\n"
    )
    header, row, *_ = FILES["sts-b"]
    task = Glue(TOKENIZER, task_name="sts-b")
    dataset = task.load(write(f"{header}\n{row}\n{row}\n"))
    task.write_predictions(tmp_path / "STS-B.tsv", dataset, [{"value": 5.2}, {"value": 1.5}])
    assert (tmp_path / "STS-B.tsv").read_text() == "index\tprediction\n0\t5.000\n1\t1.500\n"


@pytest.mark.parametrize(
    ("name", "folder", "train", "dev"),
    [("rte", "rte", 2490, 277), ("sst-2", "sst2", 67349, 872), ("sts-b", "stsb", None, None)],
)
def test_the_real_files(name, folder, train, dev):
    if not (SHARED / folder).is_dir():
        pytest.skip("the corpus is not here")
    task = Glue(TOKENIZER, task_name=name)
    for file, count in (("train.tsv", train), ("dev.tsv", dev)):
        num = -1 if count is not None and count < 3000 else 1000
        dataset = task.load(SHARED / folder / file, num_samples=num)
        assert len(dataset.records) == (count if num == -1 else min(1000, count or 1000))
        assert len({record.label for record in dataset.records}) > 1


# --- tables ---------------------------------------------------------------------------------------


def _classification(path: Path, **dataset: Any) -> TextClassification:
    config = config_class("text_classification")().model
    for key, value in dataset.items():
        setattr(config.dataset, key, value)
    return TextClassification.create(config, TOKENIZER, path)


CSV = 'label,sentence1,sentence2\nx,"one, ""two""",three\ny,"four\nfilm",one\nx,two,two\n'
JSONL = "".join(
    json.dumps({"sentence1": one, "sentence2": two, "label": label, "more": [1]}) + "\n"
    for one, two, label in (('one, "two"', "three", "x"), ("four\nfilm", "one", "y"),
                            ("two", "two", "x"))
)  # fmt: skip


@pytest.mark.parametrize(("content", "name"), [(CSV, "d.csv"), (JSONL, "d.jsonl")])
def test_pairs_in_csv_and_json_lines(write, content, name, tmp_path):
    path = write(content, name)
    task = _classification(path)
    dataset = task.load(path)
    assert [(r.text, r.pair, r.label) for r in dataset.records] == [
        ('one, "two"', "three", "x"),
        ("four\nfilm", "one", "y"),
        ("two", "two", "x"),
    ]
    assert dataset.records[2].line == (5 if name == "d.csv" else 3)
    assert dataset.examples[2].type_ids == [0, 0, 0, 1, 1]
    assert task.from_inputs([("two", "two")]).examples[0].input_ids == dataset.examples[2].input_ids
    predictions = [{"label": "x", "probabilities": {"x": 1.0}}] * 3
    task.write_predictions(tmp_path / "out.tsv", dataset, predictions)
    assert (tmp_path / "out.tsv").read_text().splitlines()[2].endswith("\tfour film\tone")
    with pytest.raises(TypeError, match="input 2 is unlike the first"):
        task.from_inputs(["one", ("two", "three")])


def test_columns_of_pairs_by_number(write):
    content = "".join(f"{i}\tone {i}\ttwo\t{'xy'[i % 2]}\n" for i in range(4))
    path = write(content)
    task = _classification(path, text_column="1", pair_column="2", label_column="3")
    assert [(r.text, r.pair, r.label) for r in task.load(path).records][1] == ("one 1", "two", "y")
    with pytest.raises(DataError, match="column 1 cannot be the second text and another"):
        _classification(path, text_column="1", pair_column="1", label_column="3")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ('a,b\n"x,y\n', "d.csv", r"d.csv:\d: .*quotation mark"),
        ("label,text\nx,one\ny\n", "d.csv", r"d.csv:3: 1 column, while 2 of 3 .* comma separates"),
        ('{"text": "one", "label": "x"}\n{"text": "two"}\n', "d.jsonl", r"d.jsonl:2: no label"),
        ('{"text": "one", "label": "x"}\n[]\n', "d.jsonl", r"d.jsonl:2: a JSON array"),
        ('{"text": "o\\u0000", "label": "x"}\n', "d.jsonl", r"d.jsonl:1: text holds a NUL"),
        ('{"text": null, "label": "x"}\n', "d.jsonl", r"d.jsonl:1: the text is JSON's null"),
        (
            '{"text": "one", "label": "x"}\n{"text": "two", "label": ["x"]}\n',
            "d.jsonl",
            r"d.jsonl:2: the label is JSON's array; expected a string or a number",
        ),
        ("label\tsentence1\tsentence2\nx\tone\t \n", "d.tsv", r"d.tsv:2: the second text is empty"),
    ],
)
def test_bad_tables(write, content, name, message):
    good = write("label\tsentence1\tsentence2\nx\tone\ttwo\ny\ttwo\tone\n", "good.tsv")
    with pytest.raises(DataError, match=message) as caught:
        _classification(good).load(write(content, name))
    assert "\n" not in str(caught.value)


# --- regression -----------------------------------------------------------------------------------


def _regression(path: Path, **dataset: Any) -> TextRegression:
    config = config_class("text_regression")().model
    for key, value in dataset.items():
        setattr(config.dataset, key, value)
    return TextRegression.create(config, TOKENIZER, path)


def test_regression(write, tmp_path):
    path = write("one two\t3.5\nthree\t-1e0\nfour\t2\n")
    task = _regression(path)
    dataset = task.load(path)
    assert [r.label for r in dataset.records] == [3.5, -1.0, 2.0]
    assert any("values from -1 to 3.5" in note for note in dataset.notes)
    batch = task.collate(dataset.examples)
    output = BertOutput(torch.zeros(0), logits=torch.tensor([[3.0], [0.0], [4.0]]))
    assert task.loss_sums(output, batch).tolist() == [0.25 + 1 + 4]
    assert task.label_counts(batch) == (3.0,)
    predictions = task.predictions(dataset, task.decode(output, batch))
    scores = task.metrics(dataset, predictions)
    assert scores["mse"] == pytest.approx(5.25 / 3)
    assert scores["pearson"] == pytest.approx(stats.pearsonr([3.5, -1, 2], [3, 0, 4]).statistic)
    assert task.metrics(dataset, [{"value": 1.0}] * 3)["pearson"] == 0.0
    for name in ("out.tsv", "out.jsonl"):
        task.write_predictions(tmp_path / name, dataset, predictions)
        assert "3.0" in (tmp_path / name).read_text()
    again = TextRegression.from_config(json.loads(json.dumps(task.to_config())), TOKENIZER)
    assert again.to_config() == task.to_config()
    for bad in ("nan", "x", "inf", "1,5"):
        with pytest.raises(DataError, match=rf"dev.tsv:3: '{bad}' is no number"):
            task.load(write(f"one two\t3.5\nthree\t1\nfour\t{bad}\n"))
