"""Files of labelled words: CoNLL columns, NeMo's text and labels, JSON lines; read and written.

CoNLL        a word a line with its columns, tabs or blanks between them; a blank line ends a
             sentence; -DOCSTART- lines and comments are kept aside
text, labels two files of equally many lines: words, and as many labels, separated by blanks
JSON lines   {"tokens": [...], "labels": [...]}, or {"text": "...", "entities": [{"start": 0,
             "end": 5, "type": "person"}]} with characters counted from 0 and ends exclusive
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcore.tasks.json_lines import check_text, get_text, kind_of, read_objects
from tpcore.tasks.sections import Source
from tpcore.tasks.task import DataError
from tpcore.tasks.text_file import Line, read_lines

CONLL, TEXT_LABELS, JSON_LINES = "conll", "text_labels", "jsonl"
_WORD_KEYS = ("tokens", "words")
_LABEL_KEYS = ("labels", "tags", "ner_tags")
_ENTITY_KEYS = ("entities", "spans")
_BLANKS = re.compile(r"[ \t]+")


@dataclass(frozen=True, slots=True)
class Span:
    """An entity by the characters of its text, `end` exclusive."""

    type: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class RawSentence:
    """One sentence as its file has it."""

    line: int
    """The number of its first line."""
    words: tuple[str, ...] | None
    """None: `text` is yet to be split."""
    labels: tuple[str, ...] | None = None
    text: str | None = None
    """What `words` are parts of, where the file says so."""
    spans: tuple[Span, ...] | None = None
    """Instead of labels."""
    lines: tuple[str, ...] = ()
    """CoNLL: the lines of its words. JSON lines: its object."""
    before: tuple[str, ...] = ()
    """CoNLL: lines before it that are no words, blank ones too."""

    def place(self, path: str, word: int = 0) -> str:
        """Where a word stands, for messages."""
        return f"{path}:{self.line + (word if len(self.lines) > 1 else 0)}"


@dataclass(frozen=True)
class SentenceFile:
    """A data file, read."""

    path: str
    format: str
    sentences: list[RawSentence]
    labels_path: str
    """Where the labels stand; `path`, but for a pair."""
    after: tuple[str, ...] = ()
    """CoNLL: lines behind the last sentence."""
    separator: str = "\t"
    """CoNLL: what is between columns."""
    notes: tuple[str, ...] = ()


def read_sentences(
    source: Source,
    *,
    labelled: bool,
    token_column: str | None = None,
    label_column: str | None = None,
) -> SentenceFile:
    """Read a file, or a pair of text and labels.

    A single file is JSON lines if its name ends in .jsonl or .json; the text of a pair if its name
    has `text` where a neighbour has `labels`; else CoNLL, or, without labels, one sentence a line
    if its lines differ in their number of words.

    Raises:
        DataError: anything that is not as it should be, with its line.
    """
    if isinstance(source, tuple):
        text, labels = source
        return _read_pair(text, labels if labelled else None)
    if Path(source).suffix in (".jsonl", ".json"):
        return _read_json(source, labelled)
    partner = Path(source).with_name(Path(source).name.replace("text", "labels", 1))
    if partner.name != Path(source).name and partner.is_file():
        return _read_pair(source, partner if labelled else None)
    return _read_conll(source, labelled, token_column, label_column)


def _read_pair(
    text_path: str | os.PathLike[str], labels_path: str | os.PathLike[str] | None
) -> SentenceFile:
    texts = read_lines(text_path)
    labels: Sequence[Line | None] = [None] * len(texts)
    if labels_path is not None:
        labels = read_lines(labels_path)
        if len(texts) != len(labels):
            raise DataError(
                f"{text_path} has {len(texts)} lines, but {labels_path} has {len(labels)}; "
                "expected the labels of a sentence in the line of its words"
            )
    sentences = []
    num_blank = 0
    for text, label in zip(texts, labels, strict=True):
        words = tuple(text.text.split())
        tags = None if label is None else tuple(label.text.split())
        if not words and not tags:
            num_blank += 1
            continue
        if tags is not None and len(tags) != len(words):
            raise DataError(
                f"{labels_path}:{text.number}: {len(tags)} labels for the {len(words)} words of "
                f"{text_path}:{text.number}; expected one for each word"
            )
        sentences.append(RawSentence(text.number, words, tags))
    notes = [f"{text_path}: {num_blank} blank line(s) left out"] if num_blank else []
    return SentenceFile(
        str(text_path), TEXT_LABELS, sentences, str(labels_path or text_path), notes=tuple(notes)
    )


def _read_conll(
    path: str | os.PathLike[str],
    labelled: bool,
    token_column: str | None,
    label_column: str | None,
) -> SentenceFile:
    lines = read_lines(path)
    tabs = any("\t" in line.text.strip() for line in lines)

    def cells_of(text: str) -> list[str]:
        return text.split("\t") if tabs else _BLANKS.split(text.strip())

    counts = Counter(len(cells_of(line.text)) for line in lines if _is_word(line.text))
    if not counts:
        raise DataError(f"{path}: no line holds a word; expected one in each, with its label")
    if not labelled and not tabs and token_column is None and len(counts) > 1:
        sentences = [
            RawSentence(line.number, None, text=line.text) for line in lines if line.text.strip()
        ]
        num_blank = len(lines) - len(sentences)
        notes = [f"{path}: {num_blank} blank line(s) left out"] if num_blank else []
        return SentenceFile(str(path), TEXT_LABELS, sentences, str(path), notes=tuple(notes))
    width = counts.most_common(1)[0][0]
    if labelled and width < 2:
        line = next(line for line in lines if _is_word(line.text))
        raise DataError(
            f"{path}:{line.number}: 1 column; expected a word and its label in each line, with a "
            "tab or a blank between them"
        )
    token_index = _column(token_column, "token_column", width, 0, path)
    label_index = _column(label_column, "label_column", width, width - 1, path)
    if labelled and token_index == label_index:
        raise DataError(
            f"{path}: column {token_index} cannot be both the word and its label; set "
            "model.dataset.token_column and model.dataset.label_column"
        )

    sentences = []
    aside: list[str] = []  # lines that are no words
    current: list[tuple[Line, list[str]]] = []
    num_comments = num_documents = 0

    def finish() -> None:
        if current:
            sentences.append(
                RawSentence(
                    line=current[0][0].number,
                    words=tuple(cells[token_index] for _, cells in current),
                    labels=tuple(cells[label_index].strip() for _, cells in current)
                    if labelled
                    else None,
                    lines=tuple(line.text for line, _ in current),
                    before=tuple(aside),
                )
            )
            aside.clear()
            current.clear()

    for line in lines:
        cells = cells_of(line.text)
        if not line.text.strip():
            finish()
            aside.append(line.text)
        elif line.text.startswith("-DOCSTART-"):
            finish()
            aside.append(line.text)
            num_documents += 1
        elif not current and line.text.startswith("# ") and len(cells) != width:
            aside.append(line.text)
            num_comments += 1
        elif len(cells) != width:
            kind = "tab" if tabs else "blank"
            raise DataError(
                f"{path}:{line.number}: {len(cells)} column(s), while {counts[width]} of "
                f"{counts.total()} lines have {width}; expected as many in each, with one {kind} "
                "between them and a blank line after each sentence"
            )
        else:
            if not cells[token_index].strip():
                raise DataError(f"{path}:{line.number}: the word is empty; remove the line")
            if labelled and not cells[label_index].strip():
                raise DataError(f"{path}:{line.number}: the label is empty; write O for none")
            current.append((line, cells))
    finish()
    notes = []
    if num_documents:
        notes.append(f"{path}: {num_documents} -DOCSTART- line(s) left out")
    if num_comments:
        notes.append(f"{path}: {num_comments} comment line(s) left out")
    separator = "\t" if tabs else " "
    return SentenceFile(
        str(path), CONLL, sentences, str(path), tuple(aside), separator, tuple(notes)
    )


def _is_word(text: str) -> bool:
    return bool(text.strip()) and not text.startswith("-DOCSTART-")


def _column(
    setting: str | None, key: str, width: int, default: int, path: str | os.PathLike[str]
) -> int:
    index = default if setting is None else int(setting)
    if not -width <= index < width:
        raise DataError(
            f"{path}: model.dataset.{key}={index}, but the lines have {width} columns; use 0 to "
            f"{width - 1}"
        )
    return index % width


def _read_json(path: str | os.PathLike[str], labelled: bool) -> SentenceFile:
    objects, num_blank = read_objects(path)
    sentences = []
    num_empty = 0
    for line, value in objects:
        sentence = _json_sentence(value, line, f"{path}:{line}", labelled)
        if sentence.words == () or (sentence.text is not None and not sentence.text.strip()):
            num_empty += 1
        else:
            sentences.append(sentence)
    notes = [f"{path}: {num_blank} blank line(s) left out"] if num_blank else []
    if num_empty:
        notes.append(f"{path}: {num_empty} sentence(s) without words left out")
    return SentenceFile(str(path), JSON_LINES, sentences, str(path), notes=tuple(notes))


def _json_sentence(value: dict[str, Any], line: int, where: str, labelled: bool) -> RawSentence:
    raw = (json.dumps(value, ensure_ascii=False),)
    if not any(key in value for key in _WORD_KEYS):
        text = get_text(value, ("text", "sentence"), where)
        spans = _json_spans(value, text, where) if labelled else None
        return RawSentence(line, None, text=text, spans=spans, lines=raw)
    words = _strings(value, _WORD_KEYS, where)
    labels = None
    if labelled:
        labels = _strings(value, _LABEL_KEYS, where)
        if len(labels) != len(words):
            raise DataError(
                f"{where}: {len(labels)} labels for {len(words)} words; expected one for each"
            )
    for word in words:
        if not word.strip():
            raise DataError(f"{where}: a word is empty; remove it and its label")
    return RawSentence(line, words, labels, lines=raw)


def _strings(value: dict[str, Any], keys: Sequence[str], where: str) -> tuple[str, ...]:
    key = next((key for key in keys if key in value), None)
    if key is None:
        raise DataError(
            f"{where}: no {' or '.join(keys)}; the object has {', '.join(value) or 'no keys'}"
        )
    if not isinstance(value[key], list) or not all(isinstance(v, str) for v in value[key]):
        raise DataError(f"{where}: {key} is no array of strings")
    return tuple(check_text(text, f"{where}: {key}") for text in value[key])


def _json_spans(value: dict[str, Any], text: str, where: str) -> tuple[Span, ...]:
    key = next((key for key in _ENTITY_KEYS if key in value), None)
    if key is None:
        raise DataError(
            f"{where}: no entities; expected "
            '"entities": [{"start": 0, "end": 5, "type": "person"}], an empty array for none'
        )
    if not isinstance(value[key], list):
        raise DataError(f"{where}: {key} is a {kind_of(value[key])}; expected an array")
    spans = []
    for item in value[key]:
        if not isinstance(item, dict):
            raise DataError(f"{where}: an entity is a {kind_of(item)}; expected an object")
        kind = get_text(item, ("type", "label"), f"{where}: entity")
        start, end = item.get("start"), item.get("end")
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
            raise DataError(
                f"{where}: entity {kind!r} from {start} to {end} is not inside the text of "
                f"{len(text)} characters; expected 0 <= start < end <= {len(text)}"
            )
        spans.append(Span(kind, start, end))
    spans.sort(key=lambda span: span.start)
    for one, other in itertools.pairwise(spans):
        if other.start < one.end:
            raise DataError(
                f"{where}: entities {one.type!r} and {other.type!r} overlap at character "
                f"{other.start}; a word has one label: keep one of them"
            )
    return tuple(spans)


def format_sentences(file: SentenceFile, labels: Sequence[Sequence[str]]) -> str:
    """`labels` in the file's own format.

    CoNLL: its lines with one more column. Text and labels: a labels file, with the blank lines of
    the text. JSON lines: its objects with one more key, `predicted_labels`.
    """
    lines: list[str] = []
    for sentence, of_sentence in zip(file.sentences, labels, strict=True):
        if file.format == CONLL:
            lines += sentence.before
            for line, label in zip(sentence.lines, of_sentence, strict=True):
                lines.append(f"{line.rstrip()}{file.separator}{label}")
        elif file.format == JSON_LINES:
            value = json.loads(sentence.lines[0])
            value["predicted_labels"] = list(of_sentence)
            lines.append(json.dumps(value, ensure_ascii=False))
        else:
            lines += [""] * (sentence.line - 1 - len(lines))
            lines.append(" ".join(of_sentence))
    lines += file.after
    return "".join(f"{line}\n" for line in lines)
