"""Files of texts with two marked entities and the relation between them.

JSON lines    {"text": "<< EGFR >> inhibitors such as [[ gefitinib ]] ...", "label": "INHIBITOR"}
              (ChemProt)
table         tabs between columns, entities replaced: `@GENE$ in @DISEASE$ ...<TAB>1` (GAD, EU-ADR,
              NeMo's ChemProt with @CHEMICAL$); columns as in text classification
SemEval-2010  task 8: `1<TAB>"The <e1>key</e1> opens the <e2>door</e2>."`, then a line with the
              relation, a line `Comment: ...`, a blank line; a test file has the first alone
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from tpcore.tasks.columns import ColumnSettings, Layout, find_layout, read_rows
from tpcore.tasks.json_lines import get_text, parse_object
from tpcore.tasks.task import DataError
from tpcore.tasks.text_file import Line, read_lines

_SEMEVAL = re.compile(r'(\d+)\t\s*"?(.*?)"?\s*')
_SEMEVAL_MARKERS = ("<e1>", "</e1>", "<e2>", "</e2>")
_BRACKETS = ("<<", ">>", "[[", "]]")
_ANONYMOUS = re.compile(r"@[A-Z][A-Z_-]*\$")


@dataclass(frozen=True, slots=True)
class Relation:
    """One text with its entities, as the file has it."""

    line: int
    text: str
    label: str | None


@dataclass(frozen=True)
class RelationFile:
    """A data file, read."""

    relations: list[Relation]
    notes: list[str]
    layout: Layout | None = None
    """Of a table."""


def read_relations(
    path: str | os.PathLike[str],
    columns: ColumnSettings,
    *,
    labelled: bool,
    is_known_label: Callable[[str], bool] | None = None,
    like: Layout | None = None,
) -> RelationFile:
    """Read a file; which of the three it is is decided by its first line.

    Args:
        path: the file.
        columns: for a table: what the user said.
        labelled: False: labels are neither needed nor looked at.
        is_known_label: for a table: whether a cell is one of the labels, where they are known.
        like: for a table: the layout of the training file.

    Raises:
        DataError: anything that is not as it should be, with its line.
    """
    lines = read_lines(path)
    first = next(line.text for line in lines if line.text.strip())
    if first.lstrip().startswith("{"):
        file = _read_json(path, lines, labelled)
    elif _SEMEVAL.fullmatch(first) and _SEMEVAL_MARKERS[0] in first:
        file = _read_semeval(path, lines, labelled)
    else:
        file = _read_table(path, columns, labelled, is_known_label, like)
    for relation in file.relations:
        if not relation.text.strip():
            raise DataError(f"{path}:{relation.line}: the text is empty; remove it or fill it in")
        if labelled and not relation.label:
            raise DataError(f"{path}:{relation.line}: the label is empty; fill it in")
    return file


def find_markers(texts: list[str]) -> list[str]:
    """The markers that these texts use: brackets and tags that half of them have, and @NAME$."""
    found: list[str] = []
    for group in (_SEMEVAL_MARKERS, _BRACKETS):
        if 2 * sum(all(marker in text for marker in group) for text in texts) >= len(texts):
            found += group
    anonymous = {match for text in texts for match in _ANONYMOUS.findall(text)}
    return [*found, *sorted(anonymous)]


def marked_places(text: str, markers: list[str]) -> tuple[int, int] | None:
    """(first character of the first marker, one past the last of the last); None: there is none.

    Of brackets and tags all four must be there, of @NAME$ two in all.
    """
    places = []
    for group in (_SEMEVAL_MARKERS, _BRACKETS):
        inside = [marker for marker in group if marker in markers]
        if inside and all(marker in text for marker in inside):
            places += [(text.index(marker), text.index(marker) + len(marker)) for marker in inside]
    anonymous = [m for m in _ANONYMOUS.finditer(text) if m.group() in markers]
    if len(anonymous) > 1:
        places += [match.span() for match in anonymous]
    if not places:
        return None
    return min(start for start, _ in places), max(end for _, end in places)


def _read_json(path: str | os.PathLike[str], lines: list[Line], labelled: bool) -> RelationFile:
    relations = []
    for line in lines:
        if not line.text.strip():
            continue
        where = f"{path}:{line.number}"
        value = parse_object(line.text, where)
        text = get_text(value, ("text", "sentence"), where)
        label = get_text(value, ("label", "relation"), where) if labelled else None
        relations.append(Relation(line.number, text, label))
    num_blank = len(lines) - len(relations)
    notes = [f"{path}: {num_blank} blank line(s) left out"] if num_blank else []
    return RelationFile(relations, notes)


def _read_semeval(path: str | os.PathLike[str], lines: list[Line], labelled: bool) -> RelationFile:
    relations: list[Relation] = []
    num_comments = 0
    pending: Line | None = None  # a sentence whose relation is yet to come

    def missing(line: Line) -> DataError:
        return DataError(
            f"{path}:{line.number}: no relation; expected it in the line below the sentence"
        )

    for line in lines:
        sentence = _SEMEVAL.fullmatch(line.text)
        if not line.text.strip():
            continue
        if line.text.startswith("Comment:"):
            num_comments += 1
        elif sentence is not None:
            if pending is not None and labelled:
                raise missing(pending)
            pending = line
            if not labelled:
                relations.append(Relation(line.number, sentence.group(2), None))
        elif pending is not None:
            found = _SEMEVAL.fullmatch(pending.text)
            assert found is not None
            if labelled:
                relations.append(Relation(pending.number, found.group(2), line.text.strip()))
            pending = None
        else:
            raise DataError(
                f"{path}:{line.number}: {line.text[:40]!r} belongs to no sentence; expected "
                'number, tab, "sentence", and its relation in the next line'
            )
    if pending is not None and labelled:
        raise missing(pending)
    notes = [f"{path}: {num_comments} comment(s) left out"] if num_comments else []
    return RelationFile(relations, notes)


def _read_table(
    path: str | os.PathLike[str],
    columns: ColumnSettings,
    labelled: bool,
    is_known_label: Callable[[str], bool] | None,
    like: Layout | None,
) -> RelationFile:
    rows, num_blank = read_rows(path)
    layout = find_layout(
        rows, path, columns, labelled=labelled, is_known_label=is_known_label, like=like
    )
    relations = [
        Relation(
            row.line,
            row.cells[layout.text],
            None if layout.label is None else row.cells[layout.label].strip(),
        )
        for row in rows[layout.has_header :]
    ]
    notes = [f"{path}: {layout}"]
    if num_blank:
        notes.append(f"{path}: {num_blank} blank line(s) left out")
    return RelationFile(relations, notes, layout)
