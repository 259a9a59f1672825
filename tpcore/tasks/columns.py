"""Which column of a tab-separated file is the text, which the label, and is there a header.

Named columns and settings decide; without them only what is beyond doubt is decided, and the rest
is an error that names the setting to make.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tpcore.tasks.labels import is_integer
from tpcore.tasks.task import DataError
from tpcore.tasks.text_file import read_lines

TEXT_NAMES = frozenset({"sentence", "text", "message", "content", "comment", "review"})
LABEL_NAMES = frozenset({"label", "labels", "class", "category", "target"})
INDEX_NAMES = frozenset({"index", "idx", "id"})


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    line: int
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Where things stand in a table."""

    num_columns: int
    text: int
    label: int | None
    has_header: bool

    def __str__(self) -> str:
        label = "" if self.label is None else f", labels in column {self.label}"
        header = "a header" if self.has_header else "no header"
        return f"texts in column {self.text}{label}, {header}"


@dataclass(frozen=True)
class ColumnSettings:
    """What the user said; None: found from the file."""

    text_column: str | None = None
    label_column: str | None = None
    header: bool | None = None


def read_rows(path: str | os.PathLike[str]) -> tuple[list[Row], int]:
    """(the rows of a tab-separated file, the number of blank lines left out).

    There is no quoting: a quotation mark is a character like others.

    Raises:
        DataError: as `read_lines`, or a row has another number of columns than most.
    """
    lines = read_lines(path)
    rows = [Row(line.number, tuple(line.text.split("\t"))) for line in lines if line.text.strip()]
    counts = Counter(len(row.cells) for row in rows)
    num_columns = counts.most_common(1)[0][0]
    for row in rows:
        if len(row.cells) != num_columns:
            raise DataError(
                f"{path}:{row.line}: {_columns(len(row.cells))}, while {counts[num_columns]} "
                f"of {len(rows)} lines have {num_columns}; a tab separates columns and can stand "
                "nowhere else"
            )
    return rows, len(lines) - len(rows)


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
    first = [cell.strip().casefold() for cell in rows[0].cells]
    usual = {"text": _only(first, TEXT_NAMES), "label": _only(first, LABEL_NAMES)}
    wanted = {"text": settings.text_column, "label": settings.label_column}
    wants_names = any(name is not None and not name.isdecimal() for name in wanted.values())

    has_header = settings.header
    if has_header is None:
        others = [cell for index, cell in enumerate(first) if index != usual["text"]]
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
    column: dict[str, int | None] = {"text": None, "label": None}
    for kind in needed:
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

    if num_columns == 1 and labelled:
        raise DataError(
            f"{path}:{rows[0].line}: 1 column, no tab; expected a label and a text in each line, "
            "separated by a tab"
        )
    if num_columns == 1:
        column["text"] = 0
    elif num_columns == 2:
        if column == {"text": None, "label": None}:
            column["label"] = _label_of_two(body, is_known_label, like)
        for kind, other in (("text", "label"), ("label", "text")):
            if column[kind] is None and (index := column[other]) is not None:
                column[kind] = 1 - index
    elif like is not None and num_columns == like.num_columns:
        column["text"] = like.text if column["text"] is None else column["text"]
        column["label"] = like.label if column["label"] is None else column["label"]

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
    if settings.header is None and not has_header and label is not None:
        has_header = _is_unnamed_header(body, label, path, ask=is_known_label is None)
    return Layout(num_columns, text, label, has_header)


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
