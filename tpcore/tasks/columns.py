"""Which column of a table is the text, which the label, and is there a header.

Named columns and settings decide; without them only what is beyond doubt is decided, and the rest
is an error that names the setting to make.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tpcore.tasks.json_lines import check_text, kind_of, read_objects
from tpcore.tasks.labels import is_integer
from tpcore.tasks.task import DataError
from tpcore.tasks.text_file import Line, read_lines

TEXT_NAMES = frozenset({"sentence", "text", "message", "content", "comment", "review"})
LABEL_NAMES = frozenset({"label", "labels", "class", "category", "target"})
PAIR_NAMES = {
    "sentence1": "sentence2",
    "question1": "question2",
    "premise": "hypothesis",
    "text_a": "text_b",
}
"""Names of two texts that belong together."""
INDEX_NAMES = frozenset({"index", "idx", "id"})


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    line: int
    cells: tuple[str, ...]
    odd: tuple[tuple[int, str], ...] = ()
    """JSON: (column, kind) of what is neither text nor number: null, array, object."""

    def cell(self, column: int, path: str | os.PathLike[str], name: str) -> str:
        """The text in a column.

        Raises:
            DataError: it is none; `name` is what the message calls it.
        """
        kind = dict(self.odd).get(column)
        if kind is not None:
            raise DataError(
                f"{path}:{self.line}: the {name} is JSON's {kind}; expected a string or a number"
            )
        return self.cells[column]


@dataclass(frozen=True)
class Layout:
    """Where things stand in a table."""

    num_columns: int
    text: int
    label: int | None
    has_header: bool
    pair: int | None = None

    def __str__(self) -> str:
        texts = str(self.text) if self.pair is None else f"{self.text} and {self.pair}"
        label = "" if self.label is None else f", labels in column {self.label}"
        header = "a header" if self.has_header else "no header"
        return f"texts in column {texts}{label}, {header}"


@dataclass(frozen=True)
class ColumnSettings:
    """What the user said; None: found from the file."""

    text_column: str | None = None
    label_column: str | None = None
    header: bool | None = None
    pair_column: str | None = None
    """Of the second text; None: there is none, unless a header has names such as sentence2."""


def read_rows(path: str | os.PathLike[str]) -> tuple[list[Row], int]:
    """(the rows of a table, the number of blank lines left out).

    A .jsonl file gives a header of its keys and a row for each object. A .csv file has commas and
    double quotation marks as RFC 4180 says; its rows have the numbers of their last lines. Any
    other is tab-separated, without quoting: a quotation mark is a character like others.

    Raises:
        DataError: as `read_lines`, or a row has another number of columns than most.
    """
    if Path(path).suffix == ".jsonl":
        return _read_objects(path)
    lines = read_lines(path)
    kind, separator = "tab", "\t"
    if Path(path).suffix == ".csv" and "," in lines[0].text and "\t" not in lines[0].text:
        kind, separator = "comma", ","
        rows, num_blank = _read_csv(path, lines)
    else:
        rows = [
            Row(line.number, tuple(line.text.split("\t"))) for line in lines if line.text.strip()
        ]
        num_blank = len(lines) - len(rows)
    counts = Counter(len(row.cells) for row in rows)
    num_columns = counts.most_common(1)[0][0]
    for row in rows:
        if len(row.cells) != num_columns:
            raise DataError(
                f"{path}:{row.line}: {_columns(len(row.cells))}, while {counts[num_columns]} "
                f"of {len(rows)} lines have {num_columns}; a {kind} separates columns and can "
                f"stand nowhere else{' but in double quotation marks' if separator == ',' else ''}"
            )
    return rows, num_blank


def _read_csv(path: str | os.PathLike[str], lines: Sequence[Line]) -> tuple[list[Row], int]:
    reader = csv.reader((f"{line.text}\n" for line in lines), strict=True)
    csv.field_size_limit(sys.maxsize)
    rows = []
    num_blank = 0
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(Row(reader.line_num, tuple(cells)))
            else:
                num_blank += 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: {error}; a cell with a comma or a quotation mark stands in "
            "double quotation marks, and a quotation mark inside is written twice"
        ) from None
    return rows, num_blank


def _read_objects(path: str | os.PathLike[str]) -> tuple[list[Row], int]:
    objects, num_blank = read_objects(path)
    line, first = objects[0]
    keys = tuple(first)
    rows = [Row(line, keys)]
    for line, value in objects:
        missing = [key for key in keys if key not in value]
        if missing:
            raise DataError(
                f"{path}:{line}: no {missing[0]}; the object has {', '.join(value) or 'no keys'}, "
                f"the first one {', '.join(keys)}"
            )
        cells, odd = [], []
        for column, key in enumerate(keys):
            cell = value[key]
            if cell is None or isinstance(cell, list | dict):
                odd.append((column, kind_of(cell)))
            text = cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)
            cells.append(check_text(text, f"{path}:{line}: {key}"))
        rows.append(Row(line, tuple(cells), tuple(odd)))
    return rows, num_blank


def find_layout(
    rows: Sequence[Row],
    path: str | os.PathLike[str],
    settings: ColumnSettings,
    *,
    labelled: bool = True,
    is_known_label: Callable[[str], bool] | None = None,
    like: Layout | None = None,
) -> Layout:
    """The layout of a file.

    Args:
        rows: all rows of the file, at least one, of equal length.
        path: for messages.
        settings: what the user said.
        labelled: False: only the text is needed; a file of one column is all text.
        is_known_label: whether a cell is one of the task's labels, where those are known.
        like: the layout of the training file; decides where the file itself does not.

    Raises:
        DataError: the file leaves a doubt, or contradicts the settings.
    """
    num_columns = len(rows[0].cells)
    if Path(path).suffix == ".jsonl":
        settings = replace(settings, header=True)  # the keys
    first = [cell.strip().casefold() for cell in rows[0].cells]
    usual = {"text": _only(first, TEXT_NAMES), "label": _only(first, LABEL_NAMES), "pair": None}
    wanted = {
        "text": settings.text_column,
        "label": settings.label_column,
        "pair": settings.pair_column,
    }
    for one, other in PAIR_NAMES.items():
        if one in first and other in first:
            usual |= {"text": first.index(one), "pair": first.index(other)}
    wants_names = any(name is not None and not name.isdecimal() for name in wanted.values())

    has_header = settings.header
    if has_header is None:
        texts = (usual["text"], usual["pair"])
        others = [cell for index, cell in enumerate(first) if index not in texts]
        is_unlabelled_header = not labelled and all(cell in INDEX_NAMES for cell in others)
        names_a_text = usual["text"] is not None
        has_header = wants_names or (
            names_a_text and (usual["label"] is not None or is_unlabelled_header)
        )
    if wants_names and not has_header:
        raise DataError(
            f"{path}: model.dataset.header=false, so columns have numbers, not names; set "
            "model.dataset.text_column and model.dataset.label_column to numbers from 0"
        )
    body = rows[1:] if has_header else rows
    if not body:
        raise DataError(f"{path}: the file has a header but no data; expected one example a line")

    needed = ("text", "label") if labelled else ("text",)
    column: dict[str, int | None] = {"text": None, "label": None, "pair": None}
    for kind in (*needed, "pair"):
        if (name := wanted[kind]) is not None:
            index = int(name) if name.isdecimal() else _only(first, {name.strip().casefold()})
            if index is None or index >= num_columns:
                raise DataError(
                    f"{path}:{rows[0].line}: model.dataset.{kind}_column={name}, but the file has "
                    f"{_columns(num_columns)}: {_shown(rows[0])}"
                )
            column[kind] = index
        elif has_header:
            column[kind] = usual[kind]

    has_pair = column["pair"] is not None
    if num_columns == 1 and labelled:
        raise DataError(
            f"{path}:{rows[0].line}: 1 column, no tab; expected a label and a text in each line, "
            "separated by a tab"
        )
    if num_columns == 1:
        column["text"] = 0
    elif num_columns == 2 and not has_pair:
        if column["text"] is None and column["label"] is None:
            column["label"] = _label_of_two(body, is_known_label, like)
        for kind, other in (("text", "label"), ("label", "text")):
            if column[kind] is None and (index := column[other]) is not None:
                column[kind] = 1 - index
    elif like is not None and num_columns == like.num_columns:
        for kind in ("text", "label", "pair"):
            column[kind] = getattr(like, kind) if column[kind] is None else column[kind]
    if num_columns == 3 and column["pair"] is not None:
        rest = {0, 1, 2} - set(column.values())
        if column["label"] is None and column["text"] is not None and len(rest) == 1:
            column["label"] = rest.pop()

    missing = [kind for kind in needed if column[kind] is None]
    if missing:
        raise DataError(
            f"{path}:{rows[0].line}: cannot tell which of the {num_columns} columns is the "
            f"{missing[0]} ({_shown(rows[0])}); set model.dataset.text_column and "
            "model.dataset.label_column to their numbers (from 0) or names"
        )
    text, label = column["text"], column["label"] if labelled else None
    assert text is not None
    if text == label:
        raise DataError(f"{path}: column {text} cannot be both the text and the label")
    pair = column["pair"]
    if pair is not None and pair in (text, label):
        raise DataError(f"{path}: column {pair} cannot be the second text and another one")
    if settings.header is None and not has_header and label is not None:
        has_header = _is_unnamed_header(body, label, path, ask=is_known_label is None)
    return Layout(num_columns, text, label, has_header, pair)


def _only(cells: Sequence[str], names: Collection[str]) -> int | None:
    """The index of the one cell that is among `names`; None when none or several are."""
    indices = [index for index, cell in enumerate(cells) if cell in names]
    return indices[0] if len(indices) == 1 else None


def _label_of_two(
    rows: Sequence[Row], is_known_label: Callable[[str], bool] | None, like: Layout | None
) -> int | None:
    """Which of two columns is the label: 0, 1, or None when that is not beyond doubt."""
    columns = [[row.cells[index].strip() for row in rows] for index in (0, 1)]
    if is_known_label is not None:
        known = [sum(map(is_known_label, column)) for column in columns]
        if known[0] != known[1]:
            return known.index(max(known))
        return like.label if like is not None and like.num_columns == 2 else None
    # Labels repeat and texts do not; in a file too small to show that, texts have blanks.
    repeats = [2 * len(set(column)) <= len(column) for column in columns]
    if repeats[0] != repeats[1]:
        return repeats.index(True)
    single_words = [
        all(len(cell.split()) <= 1 for cell in column)
        and (len(set(column)) < len(column) or len(column) < 4)  # else it numbers the lines
        for column in columns
    ]
    if single_words[0] != single_words[1]:
        return single_words.index(True)
    return None


def _is_unnamed_header(
    rows: Sequence[Row], label: int, path: str | os.PathLike[str], *, ask: bool
) -> bool:
    """Whether the first row's label is of another kind than all others.

    A line without an integer label among integers is a header, as in NeMo. Where labels are yet
    unknown (`ask`), a label that occurs once, in the first line, among labels that all repeat, is
    an error: it may be a header, and would become a class.
    """
    first, *others = (row.cells[label].strip() for row in rows)
    counts = Counter(others)
    if not others or first in counts:
        return False
    if all(map(is_integer, counts)) and not is_integer(first):
        return True
    if ask and min(counts.values()) > 1:
        raise DataError(
            f"{path}:{rows[0].line}: the label {first!r} occurs only here; if this line is a "
            "header set model.dataset.header=true, if not model.dataset.header=false"
        )
    return False


def _columns(count: int) -> str:
    return f"{count} column{'' if count == 1 else 's'}"


def _shown(row: Row) -> str:
    return ", ".join(repr(cell if len(cell) <= 24 else f"{cell[:24]}...") for cell in row.cells)
