"""Relation extraction: three formats good and bad, markers, cutting, positive classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from tpcore.tasks import DataError, RelationExtraction
from tpcore.tasks.relation_extraction import directed_macro_f1
from tpcore.tasks.relation_files import find_markers, marked_places
from tpcore.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer
from tpcore.train.config import config_class

WORDS = ("john", "likes", "new", "york", "<", ">", "[", "]", "@", "gene", "disease", "$", "the",
         "in", "e", "##1", "##2", "/", ".")  # fmt: skip
TOKENIZER = WordPieceTokenizer((*SPECIAL_TOKENS, *WORDS))

CHEMPROT = """\
{"text": "<< John >> likes [[ York ]].", "label": "LIKES", "metadata": []}
{"text": "the [[ York ]] in << John >>", "label": "false", "metadata": []}
{"text": "<< John >> the [[ York ]]", "label": "HATES", "metadata": []}
"""
GAD = "the @GENE$ likes @DISEASE$ .\t1\nthe @DISEASE$ in @GENE$\t0\nthe @GENE$ in @DISEASE$ .\t1\n"
SEMEVAL = """\
1\t"The <e1>John</e1> likes <e2>York</e2>."
Likes(e1,e2)
Comment: nothing

2\t"<e1>York</e1> in <e2>John</e2>"
Other
Comment:

3\t"<e1>York</e1> the <e2>John</e2>"
Likes(e2,e1)
"""


@pytest.fixture
def write(tmp_path):
    def write_file(content: str | bytes, name: str = "data.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def _create(path: Path, **dataset: Any) -> RelationExtraction:
    config = config_class("relation_extraction")().model
    for key, value in dataset.items():
        setattr(config.dataset, key, value)
    return RelationExtraction.create(config, TOKENIZER, path)


@pytest.mark.parametrize(
    ("content", "labels", "markers", "negative", "third"),
    [
        (CHEMPROT, ("HATES", "LIKES", "false"), ["<<", ">>", "[[", "]]"], "false",
         "<< John >> the [[ York ]]"),
        (GAD, ("0", "1"), ["@DISEASE$", "@GENE$"], "0", "the @GENE$ in @DISEASE$ ."),
        (SEMEVAL, ("Likes(e1,e2)", "Likes(e2,e1)", "Other"), ["<e1>", "</e1>", "<e2>", "</e2>"],
         "Other", "<e1>York</e1> the <e2>John</e2>"),
    ],
    ids=["chemprot", "gad", "semeval"],
)  # fmt: skip
@pytest.mark.parametrize("crlf", [False, True])
def test_formats(write, content, labels, markers, negative, third, crlf):
    if crlf:
        content = "\ufeff" + content.replace("\n", "\r\n", 2)
    task = _create(write(content))
    assert (task.labels.names, task.markers, task.negative_label) == (labels, markers, negative)
    dataset = task.load(write(content))
    assert len(dataset.records) == 3
    assert dataset.records[2].text == third
    lines = content.split("\n")
    assert all(record.text.rstrip(".") in lines[record.line - 1] or "label" in lines[0]
               for record in dataset.records)  # fmt: skip
    assert any(f"{negative!r} means no relation" in note for note in dataset.notes)
    assert any("2 comment(s) left out" in note for note in dataset.notes) == (content[-2] == ")")
    unlabelled = task.load(write(content), labelled=False)
    assert [r.text for r in unlabelled.records] == [r.text for r in dataset.records]
    assert all(example.labels is None for example in unlabelled.examples)


def test_semeval_test_file(write):
    task = _create(write(SEMEVAL))
    test = '8001\t"The <e1>John</e1> in <e2>York</e2>."\n8002\t"<e1>York</e1> <e2>John</e2>"\n'
    dataset = task.load(write(test), labelled=False)
    assert [record.line for record in dataset.records] == [1, 2]
    assert dataset.records[0].text == "The <e1>John</e1> in <e2>York</e2>."
    with pytest.raises(DataError, match=r"data.txt:1: no relation; expected it in the line below"):
        task.load(write(test))


BAD_FILES = {
    "empty": ("\n", r"is empty"),
    "json": (CHEMPROT + "{\n", r"data.txt:4: not JSON"),
    "no label": ('{"text": "a"}\n', r"data.txt:1: no label or relation; the object has text"),
    "no text": ('{"label": "a"}\n', r"data.txt:1: no text or sentence"),
    "empty text": ('{"text": " ", "label": "LIKES"}\n', r"data.txt:1: the text is empty"),
    "empty label": ('{"text": "a", "label": ""}\n', r"data.txt:1: the label is empty"),
    "unknown label": (CHEMPROT.replace("HATES", "HATS"), r"data.txt:3: unknown label 'HATS' \(did"),
    "last relation": ('1\t"<e1>a</e1> <e2>b</e2>"\n', r"data.txt:1: no relation"),
    "stray line": ('1\t"<e1>a</e1> <e2>b</e2>"\nfalse\nfalse\n', r"data.txt:3: 'false' belongs to"),
    "columns": ("a\tb\nc\n", r"data.txt:2: 1 column"),
    "latin-1": ('{"text": "\xe9"}'.encode("latin-1"), r"data.txt:1: byte 0xe9"),
    "nul": (b"a\0\tb\n", r"data.txt:1: .*NUL"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(write, content, message):
    task = _create(write(CHEMPROT))
    with pytest.raises(DataError, match=message) as caught:
        task.load(write(content))
    assert "\n" not in str(caught.value)


def test_texts_without_entities_are_counted(write):
    task = _create(write(CHEMPROT))
    content = CHEMPROT.replace("[[ York ]].", "York").replace("<< John >> the", "<< John the")
    notes = task.load(write(content)).notes
    assert any("2 text(s) without marked entities, the first in line 1" in note for note in notes)


def test_markers_are_found():
    assert find_markers(["<< a >> [[ b ]]", "c", "<< a >> [[ b ]]"]) == ["<<", ">>", "[[", "]]"]
    assert find_markers(["a << b", "x [[ y ]]"]) == []
    assert find_markers(["@CHEMICAL$ @GENE$ a@b$"]) == ["@CHEMICAL$", "@GENE$"]
    assert marked_places("the << a >> b [[ c ]] d", ["<<", ">>", "[[", "]]"]) == (4, 21)
    assert marked_places("@GENE$ a @GENE$ .", ["@GENE$"]) == (0, 15)
    assert marked_places("@GENE$ a", ["@GENE$"]) is None


def test_markers_as_whole_tokens(write):
    task = _create(write(GAD), add_markers=True)
    assert task.tokenizer.vocabulary[-2:] == ("@DISEASE$", "@GENE$")
    assert task.tokenizer.lowercase
    tokens = task.tokenizer.encode("The @GENE$-likes @DISEASE$.").tokens
    assert tokens == ["[CLS]", "the", "@GENE$", "[UNK]", "likes", "@DISEASE$", ".", "[SEP]"]
    plain = _create(write(GAD))
    assert plain.tokenizer is TOKENIZER
    assert plain.tokenizer.encode("@GENE$").tokens == ["[CLS]", "@", "gene", "$", "[SEP]"]
    with pytest.raises(DataError, match="no markers were found"):
        _create(write("the john\t1\nnew york\t0\nthe york\t1\n"), add_markers=True)


@pytest.mark.parametrize("before", [0, 3, 40])
@pytest.mark.parametrize("after", [0, 40])
def test_long_texts_keep_their_entities(write, before, after):
    text = f"{'the ' * before}<< John >> likes [[ York ]]{' new' * after}"
    task = _create(write(CHEMPROT), add_markers=True, max_seq_length=20)
    dataset = task.load(write(json.dumps({"text": text, "label": "LIKES"})))
    (example,) = dataset.examples
    tokens = [task.tokenizer.vocabulary[i] for i in example.input_ids]
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    wanted = ["<<", "john", ">>", "likes", "[[", "york", "]]"]
    assert [token for token in tokens if token in wanted] == wanted
    cut = before + 7 + after + 2 > 20
    assert len(tokens) == min(before + 9 + after, 20)
    assert any("1 text(s) cut around their entities" in n for n in dataset.notes) == cut


def test_entities_too_far_apart_are_counted(write):
    text = f"<< John >> {'the ' * 50} [[ York ]]"
    task = _create(write(CHEMPROT), max_seq_length=20)
    dataset = task.load(write(json.dumps({"text": text, "label": "LIKES"})))
    assert len(dataset.examples[0]) == 20
    assert any("1 of them lost an entity" in note for note in dataset.notes)


def _prediction(label: str) -> dict[str, Any]:
    return {"label": label, "probabilities": {}}


def test_scores_leave_the_negative_class_out(write):
    labels = ["LIKES", "false", "HATES", "LIKES", "false", "HATES"]
    answers = ["LIKES", "LIKES", "false", "HATES", "false", "HATES"]
    lines = [json.dumps({"text": "<< a >> [[ b ]]", "label": label}) for label in labels]
    task = _create(write(CHEMPROT))
    dataset = task.load(write("\n".join(lines)))
    metrics = task.metrics(dataset, [_prediction(label) for label in answers])
    options = {"labels": ["HATES", "LIKES"], "average": "micro"}
    assert metrics["micro_f1"] == pytest.approx(f1_score(labels, answers, **options)) == 0.5
    assert metrics["precision"] == pytest.approx(precision_score(labels, answers, **options))
    assert metrics["recall"] == pytest.approx(recall_score(labels, answers, **options))
    options["average"] = "macro"
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, answers, **options))
    assert metrics["accuracy"] == 0.5
    assert "relation_macro_f1" not in metrics
    everything = _create(write(CHEMPROT.replace("false", "SEES")))
    assert everything.negative_label is None
    chosen = _create(write(CHEMPROT), negative_label="HATES")
    assert chosen.negative_label == "HATES"
    with pytest.raises(ValueError, match="negative_label=x is none of the labels: HATES"):
        _create(write(CHEMPROT), negative_label="x")


def test_directed_score_by_hand():
    true = ["A(e1,e2)", "A(e2,e1)", "B(e1,e2)", "Other"]
    answers = ["A(e1,e2)", "A(e1,e2)", "Other", "B(e1,e2)"]
    positive = ["A(e1,e2)", "A(e2,e1)", "B(e1,e2)"]
    # A: 1 right of 2 given and 2 true: 0.5; B: 0 of 1 and 1: 0
    assert directed_macro_f1(true, answers, positive) == 0.25
    assert directed_macro_f1(true, true, positive) == 1.0


def test_settings_survive_json(write, tmp_path):
    task = _create(write(GAD), add_markers=True, class_balancing="weighted_loss")
    task.tokenizer.save(tmp_path / "tokenizer")
    tokenizer = WordPieceTokenizer.from_file(tmp_path / "tokenizer")
    again = RelationExtraction.from_config(json.loads(json.dumps(task.to_config())), tokenizer)
    assert again.to_config() == task.to_config()
    text = "john @GENE$ likes @DISEASE$"
    assert again.from_inputs([text]).examples == task.from_inputs([text]).examples
    assert again.tokenizer.whole_tokens == ("@DISEASE$", "@GENE$")
