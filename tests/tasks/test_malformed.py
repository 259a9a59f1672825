"""What no task's data file may hold, in every file that each task reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tasks import tiny_data
from tpcore.tasks import DataError
from tpcore.train.prepare import prepare
from tpcore.train.read_config import load_config

FILES = {
    "intent_slot_classification": ("train.tsv", "train_slots.tsv", "dict.slots.csv"),
    "punctuation_capitalization": ("text_train.txt", "labels_train.txt"),
    "text_classification": ("train.tsv",),
    "text_regression": ("train.csv",),
    "glue": ("train.tsv",),
    "relation_extraction": ("train.jsonl",),
    "token_classification": ("train.conll",),
    "masked_lm": ("train.txt",),
    "question_answering": ("train.json",),
}
CASES = [(task, name) for task, names in FILES.items() for name in names]
BY_LINES = [case for case in CASES if case[0] != "question_answering"]


def _second_line(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    lines = content.split(b"\n")
    if len(lines) == 1:  # one JSON value
        return change(content)
    return b"\n".join([lines[0], change(lines[1]), *lines[2:]])


UNREADABLE = {
    "empty": (lambda content: b"", "is empty; expected at least one line of data"),
    "blank": (lambda content: b" \n\n\t\n", "is empty; expected at least one line of data"),
    "nul": (
        lambda content: _second_line(content, lambda line: line[:1] + b"\0" + line[1:]),
        "the line holds a NUL byte; a text file has none: remove it",
    ),
    "latin-1": (
        lambda content: _second_line(content, lambda line: line[:1] + b"\xe9" + line[1:]),
        "byte 0xe9 is not UTF-8; if the file is in Latin-1, convert it with `iconv",
    ),
    "utf-16": (lambda content: content.decode().encode("utf-16"), "is UTF-16; expected UTF-8"),
}


def _change(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _arguments(task: str, folder: Path) -> list[str]:
    return tiny_data.overrides(task, folder)


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize(("task", "name"), CASES, ids=[f"{t}-{n}" for t, n in CASES])
def test_unreadable_files_are_one_line(task: str, name: str, kind: str, tmp_path: Path) -> None:
    arguments = _arguments(task, tmp_path)
    path = tmp_path / name
    change, message = UNREADABLE[kind]
    _change(path, change)
    with pytest.raises(DataError) as caught:
        prepare(load_config(None, arguments))
    text = str(caught.value)
    line = 1 if task == "question_answering" else 2
    where = f"{path}:{line}: " if kind in ("nul", "latin-1") else f"{path} "
    assert text.startswith(where + message), text
    assert "\n" not in text


Change = Callable[[str], str]


def _of_line(number: int, change: Change) -> Change:
    """A change of one line, its number from 1."""

    def of_text(text: str) -> str:
        lines = text.split("\n")
        lines[number - 1] = change(lines[number - 1])
        return "\n".join(lines)

    return of_text


def _cells(change: Callable[[list[str]], list[str]], separator: str = "\t") -> Change:
    return lambda line: separator.join(change(line.split(separator)))


def _json(change: Callable[[dict[str, Any]], Any]) -> Change:
    return lambda text: json.dumps(change(json.loads(text)))


def _answer_elsewhere(content: dict[str, Any]) -> dict[str, Any]:
    content["data"][0]["paragraphs"][1]["qas"][0]["answers"][0]["answer_start"] += 4000
    return content


_ONE = '{"tokens": ["day"], "labels": ["O"]}\n'
_TEXT = '{"label": "pos", "text": "the day"}\n{"label": "neg", "text": "bad"}\n'
_VALUE = '{"score": 1, "sentence1": "the day", "sentence2": "bad"}\n'
_SEMEVAL = '1\t"The <e1>day</e1> was <e2>good</e2>."\nlikes(e1,e2)\n\n2\t"<e1>a</e1> <e2>b</e2>"\n'
_ASKED = '{"id": "1", "question": "the book", "context": "the day", "answers": []}\n'

# Task, validation file, the name that it gets (its format), change, line, what is said of it.
MALFORMED = {
    "words: unknown label": (
        "token_classification",
        "validation.conll",
        _of_line(2, lambda x: x.split("\t")[0] + "\tB-ORG"),
        2,
        r"unknown label 'B-ORG' \(did you mean 'B-PER'\?\); .*",
    ),
    "words: missing column": (
        "token_classification",
        "validation.conll",
        _of_line(2, lambda x: x.split("\t")[0]),
        2,
        r"1 column\(s\), while \d+ of \d+ lines have 2; expected as many in each",
    ),
    "words: empty label": (
        "token_classification",
        "validation.conll",
        _of_line(2, lambda x: x.split("\t")[0] + "\t "),
        2,
        "the label is empty; write O for none",
    ),
    "words: label without a type": (
        "token_classification",
        "validation.conll",
        _of_line(2, lambda x: x.split("\t")[0] + "\tB-"),
        2,
        "label 'B-' names no type; write one behind it",
    ),
    "words, JSON: bad": (
        "token_classification",
        "validation.jsonl",
        lambda _: _ONE + '{"tokens": [}\n',
        2,
        "not JSON: .*; expected one object",
    ),
    "words, JSON: count": (
        "token_classification",
        "validation.jsonl",
        lambda _: _ONE + _ONE.replace('"day"', '"a", "day"'),
        2,
        "1 labels for 2 words; expected",
    ),
    "words, JSON: unknown label": (
        "token_classification",
        "validation.jsonl",
        lambda _: _ONE + _ONE.replace('"O"', '"B-X"'),
        2,
        "unknown label 'B-X'.*;",
    ),
    "words, JSON: entity outside": (
        "token_classification",
        "validation.jsonl",
        lambda _: '{"text": "day", "entities": [{"start": 1, "end": 9, "type": "PER"}]}',
        1,
        "entity 'PER' from 1 to 9 is not inside the text of 3 characters",
    ),
    "text: unknown label": (
        "text_classification",
        "validation.tsv",
        _of_line(2, _cells(lambda c: ["post", c[1]])),
        2,
        r"unknown label 'post' \(did you mean 'pos'\?\); the labels are neg, pos; ",
    ),
    "text: missing column": (
        "text_classification",
        "validation.tsv",
        _of_line(2, _cells(lambda c: c[:1])),
        2,
        "1 column, while 12 of 13 lines have 2;",
    ),
    "text, CSV: quotation mark": (
        "text_classification",
        "validation.csv",
        lambda _: 'pos,"the "day"\nneg,bad\n',
        1,
        ".*quotation mark inside is written twice",
    ),
    "text, JSON: bad": (
        "text_classification",
        "validation.jsonl",
        lambda _: _TEXT + "{'text'}\n",
        3,
        "not JSON: .*; expected one object",
    ),
    "text, JSON: key twice": (
        "text_classification",
        "validation.jsonl",
        lambda _: _TEXT + '{"label": "pos", "text": "the day", "text": "bad"}\n',
        3,
        "an object has the key 'text' twice; keep one of them",
    ),
    "text, JSON: long number": (
        "text_classification",
        "validation.jsonl",
        lambda _: _TEXT + f'{{"label": {"1" * 5000}, "text": "the day"}}\n',
        3,
        "a number of 5000 digits; expected at most 300",
    ),
    "text, JSON: missing key": (
        "text_classification",
        "validation.jsonl",
        lambda _: _TEXT + '{"label": "pos"}\n',
        3,
        "no text; the object has label",
    ),
    "text, JSON: unknown label": (
        "text_classification",
        "validation.jsonl",
        lambda _: _TEXT.replace("neg", "nag"),
        2,
        r"unknown label 'nag' \(did you mean 'neg'",
    ),
    "number: none": (
        "text_regression",
        "validation.csv",
        _of_line(3, lambda x: f"much,{x.split(',', 1)[1]}"),
        3,
        "'much' is no number; correct or remove the line",
    ),
    "number: missing column": (
        "text_regression",
        "validation.csv",
        _of_line(3, lambda x: x.split(",")[0]),
        3,
        "1 column, while 13 of 14 lines have 3; a comma",
    ),
    "number, JSON: bad": (
        "text_regression",
        "validation.jsonl",
        lambda _: _VALUE + "[1]\n",
        2,
        "a JSON array; expected an object",
    ),
    "number, JSON: none": (
        "text_regression",
        "validation.jsonl",
        lambda _: _VALUE + _VALUE.replace("1,", "null,", 1),
        2,
        "the label is JSON's null; expected a string or a number",
    ),
    "GLUE: unknown label": (
        "glue",
        "dev.tsv",
        _of_line(3, _cells(lambda c: [*c[:3], "maybe"])),
        3,
        "label 'maybe'; rte has entailment, not_entailment: check model.task_name",
    ),
    "GLUE: missing column": (
        "glue",
        "dev.tsv",
        _of_line(3, _cells(lambda c: c[:2])),
        3,
        r"2 column\(s\); rte has texts in 1 and 2 .*; check",
    ),
    "GLUE: a tab too many": (
        "glue",
        "dev.tsv",
        _of_line(3, _cells(lambda c: [*c[:2], "", *c[2:]])),
        3,
        "5 columns, while the header has 4; a tab separates columns",
    ),
    "GLUE: empty text": (
        "glue",
        "dev.tsv",
        _of_line(3, _cells(lambda c: [c[0], " ", *c[2:]])),
        3,
        "a text is empty; remove the line",
    ),
    "relation: unknown label": (
        "relation_extraction",
        "validation.jsonl",
        _of_line(2, _json(lambda v: v | {"label": "loves"})),
        2,
        "unknown label 'loves'.*; ",
    ),
    "relation: bad JSON": (
        "relation_extraction",
        "validation.jsonl",
        _of_line(2, lambda x: x[:-1]),
        2,
        "not JSON: .*; expected one object",
    ),
    "relation: missing key": (
        "relation_extraction",
        "validation.jsonl",
        _of_line(2, _json(lambda v: {"text": v["text"]})),
        2,
        "no label or relation; the object has text",
    ),
    "relation, table: missing column": (
        "relation_extraction",
        "validation.tsv",
        lambda _: "the @GENE$ was @DISEASE$\tlikes\n@GENE$\n",
        2,
        "1 column, while .*; a tab",
    ),
    "relation, table: unknown label": (
        "relation_extraction",
        "validation.tsv",
        lambda _: "the @GENE$ was @DISEASE$\tlikes\n@GENE$ a @DISEASE$\tlove\n",
        2,
        "unknown label 'love'.*;",
    ),
    "relation, SemEval: no relation": (
        "relation_extraction",
        "validation.txt",
        lambda _: _SEMEVAL.replace("(e1,e2)", ""),
        4,
        "no relation; expected it in the line below",
    ),
    "relation, SemEval: unknown label": (
        "relation_extraction",
        "validation.txt",
        lambda _: _SEMEVAL + "Other\n",
        1,
        r"unknown label 'likes\(e1,e2\)'.*;",
    ),
    "intent: unknown": (
        "intent_slot_classification",
        "validation.tsv",
        _of_line(3, _cells(lambda c: [c[0], "7"])),
        3,
        "'7'; dict.intents.csv names the numbers 0 to 1",
    ),
    "intent: missing column": (
        "intent_slot_classification",
        "validation.tsv",
        _of_line(3, _cells(lambda c: c[:1])),
        3,
        r"1 column\(s\); expected a sentence and the number",
    ),
    "slots: unknown": (
        "intent_slot_classification",
        "validation_slots.tsv",
        _of_line(2, _cells(lambda c: ["9", *c[1:]], " ")),
        2,
        "'9'; dict.slots.csv names the numbers 0 to 2",
    ),
    "slots: count": (
        "intent_slot_classification",
        "validation_slots.tsv",
        _of_line(2, _cells(lambda c: c[1:], " ")),
        2,
        r"5 slots for the 6 words of .*validation.tsv:3; expected one for each word",
    ),
    "marks: unknown label": (
        "punctuation_capitalization",
        "labels_validation.txt",
        _of_line(2, _cells(lambda c: ["!U", *c[1:]], " ")),
        2,
        "unknown label '!'.*; correct it, or",
    ),
    "marks: no mark": (
        "punctuation_capitalization",
        "labels_validation.txt",
        _of_line(2, _cells(lambda c: ["X", *c[1:]], " ")),
        2,
        "label 'X'; expected a mark, or O",
    ),
    "marks: count": (
        "punctuation_capitalization",
        "labels_validation.txt",
        _of_line(2, _cells(lambda c: c[1:], " ")),
        2,
        r"\d+ labels for the \d+ words of .*text_validation.txt:2; expected one for each word",
    ),
    "question: answer outside": (
        "question_answering",
        "validation.json",
        lambda t: json.dumps(_answer_elsewhere(json.loads(t)), indent=1),
        21,
        r"data\[0\].paragraphs\[1\].qas\[0\]: the answer '\w+' is not at character \d+ .*: correct",
    ),
    "question: bad JSON": (
        "question_answering",
        "validation.json",
        lambda t: t.replace("[{", "[\n{{", 1),
        2,
        "not JSON: .*; expected a SQuAD file",
    ),
    "question, JSON lines: bad": (
        "question_answering",
        "validation.jsonl",
        lambda _: _ASKED + "{\n",
        2,
        "not JSON: .*; expected one object",
    ),
    "question, JSON lines: answer outside": (
        "question_answering",
        "validation.jsonl",
        lambda _: _ASKED.replace("[]", '[{"text": "day", "answer_start": 9}]'),
        1,
        "the answer 'day' is not at character 9 of the context; it stands at 4: correct",
    ),
    "question, lines: missing key": (
        "question_answering",
        "validation.jsonl",
        lambda _: _ASKED + '{"id": "2", "question": "the"}\n',
        2,
        "no context; the object has id, question",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_lines_are_one_line_with_its_number(case: str, tmp_path: Path) -> None:
    task, name, change, line, message = MALFORMED[case]
    arguments = _arguments(task, tmp_path)
    path = tmp_path / name
    (own,) = tmp_path.glob(f"{path.stem}.*") if not path.exists() else (path,)
    path.write_text(change(own.read_text()))
    arguments = [argument.replace(str(own), str(path)) for argument in arguments]
    with pytest.raises(DataError) as caught:
        prepare(load_config(None, arguments))
    text = str(caught.value)
    assert text.startswith(f"{path}:{line}: "), text
    assert re.match(message, text.removeprefix(f"{path}:{line}: ")), text
    assert "\n" not in text


def test_texts_and_labels_of_unequal_numbers(tmp_path: Path) -> None:
    for task, name, message in (
        (
            "punctuation_capitalization",
            "labels_validation.txt",
            "13 lines, but .* has 12; expected",
        ),
        (
            "intent_slot_classification",
            "validation_slots.tsv",
            "13 sentences, but .* has 12 lines;",
        ),
    ):
        arguments = _arguments(task, tmp_path)
        path = tmp_path / name
        path.write_text(path.read_text().rsplit("\n", 1)[0])
        with pytest.raises(DataError, match=message) as caught:
            prepare(load_config(None, arguments))
        assert "\n" not in str(caught.value)


def _mixed(content: bytes) -> bytes:
    """Every second line ends in another way."""
    lines = content.split(b"\n")
    ends = [b"\r\n" if number % 2 else b"\n" for number in range(len(lines))]
    return b"".join(line + end for line, end in zip(lines, ends, strict=True))


@pytest.mark.parametrize("kind", ["byte-order mark", "mixed line ends"])
@pytest.mark.parametrize("task", FILES)
def test_harmless_differences_change_nothing(task: str, kind: str, tmp_path: Path) -> None:
    arguments = _arguments(task, tmp_path)
    expected = prepare(load_config(None, arguments)).train.examples
    for name in FILES[task]:
        _change(tmp_path / name, (lambda c: b"\xef\xbb\xbf" + c) if "mark" in kind else _mixed)
    assert list(prepare(load_config(None, arguments)).train.examples) == list(expected)


@pytest.mark.parametrize(("task", "name"), BY_LINES, ids=[f"{t}-{n}" for t, n in BY_LINES])
def test_a_line_of_100_kb_is_read_or_refused_in_one_line(
    task: str, name: str, tmp_path: Path
) -> None:
    arguments = _arguments(task, tmp_path)
    path = tmp_path / name
    _change(path, lambda c: _second_line(c, lambda line: line[:1] + b"a" * 100_000 + line[1:]))
    text, longest = "", 0
    try:
        longest = max(map(len, prepare(load_config(None, arguments)).train.examples))
    except DataError as error:
        text = str(error)
    assert longest <= 32
    assert (longest > 0) != bool(text)
    assert not text or str(path.parent) in text
    assert "\n" not in text


@pytest.mark.parametrize("task", [t for t in FILES if t not in ("question_answering", "masked_lm")])
def test_blank_lines_are_counted_or_part_of_the_format(task: str, tmp_path: Path) -> None:
    arguments = _arguments(task, tmp_path)
    before = prepare(load_config(None, arguments))
    for name in FILES[task]:
        if not name.startswith("dict"):
            _change(tmp_path / name, lambda c: c.rstrip(b"\n") + b"\n\n \n")
    after = prepare(load_config(None, arguments))
    assert len(after.train.records) == len(before.train.records)
    if task != "token_classification":  # there they end sentences
        assert any("2 blank line(s) left out" in note for note in after.train.notes)
