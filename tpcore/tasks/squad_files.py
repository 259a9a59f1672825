"""Questions on texts: SQuAD v1.1 and v2.0 JSON, and one question a line as JSON.

    SQuAD        {"data": [{"paragraphs": [{"context": "...", "qas": [{"id": "...",
                 "question": "...", "answers": [{"text": "...", "answer_start": 0}],
                 "is_impossible": false}]}]}]}
    JSON lines   {"id": "...", "question": "...", "context": "...", "answers": [...]}

Answers stand in their context, character for character; a question without any has no answer there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcore.tasks.json_lines import check_text, get_text, kind_of, load_json, read_objects
from tpcore.tasks.task import DataError
from tpcore.tasks.text_file import read_lines


@dataclass(frozen=True, slots=True)
class Answer:
    """Characters from `start` of a context."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """One question on one context."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None = None
    """References, all of them right; empty: the context has no answer; None: unknown."""


def read_questions(
    path: str | os.PathLike[str], *, labelled: bool
) -> tuple[list[Question], list[str]]:
    """All questions of a file, and what to tell of it; JSON lines if its name ends in .jsonl.

    Args:
        path: the file.
        labelled: False: answers are neither needed nor looked at.

    Raises:
        DataError: anything that is not as it should be, with its place.
    """
    if Path(path).suffix == ".jsonl":
        objects, num_blank = read_objects(path)
        found = [
            (f"{path}:{line}", _question(value, value, f"{path}:{line}", labelled, str(line)))
            for line, value in objects
        ]
        notes = [f"{path}: {num_blank} blank line(s) left out"] if num_blank else []
        return _distinct(found), notes
    text = "\n".join(line.text for line in read_lines(path))
    try:
        found = list(_read_squad(path, text, labelled))
        questions = _distinct(found)
    except DataError as error:
        message, start = str(error), f"{path}:1: data["
        if not message.startswith(start):
            raise
        place = message.removeprefix(f"{path}:1: ")
        raise DataError(f"{path}:{line_of(text, place)}: {place}") from None
    if not questions:
        raise DataError(f"{path} holds no questions; expected SQuAD's data, paragraphs, qas")
    return questions, []


def _distinct(found: Sequence[tuple[str, Question]]) -> list[Question]:
    """The questions, no two of which have one id."""
    places: dict[str, str] = {}
    for place, question in found:
        if question.id in places:
            raise DataError(
                f"{place}: id {question.id!r} is that of {places[question.id]} already; "
                "predictions are found by it: give each question its own"
            )
        places[question.id] = place
    return [question for _, question in found]


def line_of(text: str, place: str) -> int:
    """The line of a JSON text, from 1, at which a value begins.

    Args:
        text: valid JSON.
        place: keys and numbers from 0 that lead there, `data[0].paragraphs[2]`; what comes
            behind them does not matter.
    """
    decode = json.JSONDecoder().raw_decode
    leads = re.match(r"(?:\.?\w+\[\d+\])*", place)
    assert leads is not None
    at = _skip(text, 0)
    for key, number in re.findall(r"(\w+)\[(\d+)\]", leads[0]):
        at = _skip(text, at + 1)  # {
        while True:
            found, at = decode(text, at)
            at = _skip(text, _skip(text, at) + 1)  # :
            if found == key:
                break
            at = _skip(text, _skip(text, decode(text, at)[1]) + 1)  # its value and ,
        at = _skip(text, at + 1)  # [
        for _ in range(int(number)):
            at = _skip(text, _skip(text, decode(text, at)[1]) + 1)
    return text.count("\n", 0, at) + 1


def _skip(text: str, at: int) -> int:
    """The next character that is no blank."""
    while text[at] in " \t\r\n":
        at += 1
    return at


def _read_squad(
    path: str | os.PathLike[str], text: str, labelled: bool
) -> Iterator[tuple[str, Question]]:
    try:
        content = load_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at character {error.colno} of the line; "
            "expected a SQuAD file (one question a line belongs into a .jsonl file)"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}:1: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}:1: a JSON {kind_of(content)}; expected an object with data")
    for place, article in _list(content, "data", f"{path}:1"):
        for where, paragraph in _list(article, "paragraphs", place):
            for spot, qa in _list(paragraph, "qas", where):
                yield spot, _question(qa, paragraph, spot, labelled, "")


def _list(value: dict[str, Any], key: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of the objects under `key`."""
    if key not in value:
        keys = ", ".join(value) or "no keys"
        raise DataError(f"{where}: no {key}; the object has {keys}")
    if not isinstance(value[key], list):
        raise DataError(f"{where}: {key} is a {kind_of(value[key])}; expected an array")
    separator = ": " if key == "data" else "."
    for index, item in enumerate(value[key]):
        place = f"{where}{separator}{key}[{index}]"
        if not isinstance(item, dict):
            raise DataError(f"{place} is a {kind_of(item)}; expected an object")
        yield place, item


def _question(
    qa: dict[str, Any], paragraph: dict[str, Any], where: str, labelled: bool, default_id: str
) -> Question:
    """A question of `qa` on the context of `paragraph`."""
    key = qa.get("id", default_id)
    if type(key) is int:
        key = str(key)
    if not isinstance(key, str) or not key:
        raise DataError(f"{where}: no id; predictions are found by it: give each question one")
    question = get_text(qa, ("question",), where)
    context = get_text(paragraph, ("context",), where)
    for name, text in (("question", question), ("context", context)):
        if not text.strip():
            raise DataError(f"{where}: the {name} is empty; remove the question or fill it in")
    answers = _answers(qa, context, where) if labelled else None
    return Question(check_text(key, f"{where}: id"), question, context, answers)


def _answers(qa: dict[str, Any], context: str, where: str) -> tuple[Answer, ...]:
    is_impossible = qa.get("is_impossible", False)
    if not isinstance(is_impossible, bool):
        raise DataError(f"{where}: is_impossible is a {kind_of(is_impossible)}; expected a boolean")
    if is_impossible and qa.get("answers"):
        raise DataError(
            f"{where}: answers is not empty, and is_impossible is true; correct one of them"
        )
    if is_impossible:
        return ()
    if "answers" not in qa:
        raise DataError(
            f"{where}: no answers; expected them for training and evaluation: to predict without, "
            "use `tpcore predict`"
        )
    found = qa["answers"]
    if isinstance(found, dict):  # as columns: {"text": [...], "answer_start": [...]}
        texts, starts = found.get("text"), found.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(f"{where}: answers has no text and answer_start of equal lengths")
        found = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
    if not isinstance(found, list):
        raise DataError(f"{where}: answers is a {kind_of(found)}; expected an array")
    if not found and "is_impossible" in qa:
        raise DataError(
            f"{where}: answers is empty, and is_impossible is false; correct one of them"
        )
    return tuple(_answer(item, context, where) for item in found)


def _answer(item: Any, context: str, where: str) -> Answer:
    if not isinstance(item, dict):
        raise DataError(f"{where}: an answer is a {kind_of(item)}; expected an object")
    text = get_text(item, ("text",), f"{where}: answer")
    start = item.get("answer_start")
    if type(start) is not int:
        shown = start if isinstance(start, float) else f"a {kind_of(start)}"
        raise DataError(f"{where}: answer_start is {shown}; expected a whole number")
    if not text.strip():
        raise DataError(f"{where}: an answer is empty; set is_impossible for a question without")
    if start < 0 or not context.startswith(text, start):
        there = context.find(text)
        hint = f"it stands at {there}" if there >= 0 else "it stands nowhere in it"
        raise DataError(
            f"{where}: the answer {_short(text)!r} is not at character {start} of the context; "
            f"{hint}: correct answer_start"
        )
    return Answer(text, start)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
