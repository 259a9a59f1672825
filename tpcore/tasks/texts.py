"""Texts and pairs of texts with a label each: read from tables, encoded, batched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpcore.tasks.columns import ColumnSettings, Layout, find_layout, read_rows
from tpcore.tasks.task import DataError, Dataset, Example, TaskBatch, pack_examples, sample_limit
from tpcore.tokenizer import WordPieceTokenizer


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One line of a data file."""

    line: int
    """Its number, from 1."""
    text: str
    label: Any = None
    """The name of a class, or a number; None: unknown."""
    pair: str | None = None
    """The second text, where there are two."""


def load_texts(
    path: str | os.PathLike[str],
    columns: ColumnSettings,
    like: Layout | None,
    parse_label: Callable[[str, str], Any],
    *,
    num_samples: int = -1,
    labelled: bool = True,
    is_known_label: Callable[[str], bool] | None = None,
) -> tuple[list[TextRecord], list[str]]:
    """(the records of a file, what to tell the user about it).

    Args:
        path: the file.
        columns: what the user said of its columns.
        like: the layout of the training file.
        parse_label: (cell, place) -> the label.
        num_samples: only so many; -1: all.
        labelled: False: labels are neither needed nor looked at.
        is_known_label: whether a cell is a label; None: any can be.

    Raises:
        DataError: the file cannot be used.
    """
    end = sample_limit(num_samples)
    rows, num_blank = read_rows(path)
    layout = find_layout(
        rows, path, columns, labelled=labelled, is_known_label=is_known_label, like=like
    )
    rows = rows[layout.has_header :]
    records = []
    for row in rows[:end]:
        where = f"{path}:{row.line}"
        text = row.cell(layout.text, path, "text")
        pair = None if layout.pair is None else row.cell(layout.pair, path, "second text")
        for name, part in (("text", text), ("second text", pair)):
            if part is not None and not part.strip():
                raise DataError(f"{where}: the {name} is empty; remove the line or fill it")
        label = None
        if layout.label is not None:
            label = parse_label(row.cell(layout.label, path, "label").strip(), where)
        records.append(TextRecord(row.line, text, label, pair))
    notes = [f"{path}: {layout}"]
    if num_blank:
        notes.append(f"{path}: {num_blank} blank line(s) left out")
    return records, notes


def texts_of_inputs(inputs: Iterable[Any]) -> list[TextRecord]:
    """Texts as strings, or (text, second text) pairs: all of one kind.

    Raises:
        TypeError: an input is neither, or unlike the first.
    """
    records = []
    for number, value in enumerate(inputs, start=1):
        is_pair = isinstance(value, list | tuple) and len(value) == 2
        parts = list(value) if is_pair else [value]
        if not all(isinstance(part, str) for part in parts):
            raise TypeError(f"input {number} is a {type(value).__name__}; expected a text")
        records.append(TextRecord(number, parts[0], None, parts[1] if is_pair else None))
        if (records[0].pair is None) != (records[-1].pair is None):
            raise TypeError(f"input {number} is unlike the first: texts and pairs do not mix")
    return records


def parse_texts(line: str, where: str, *, pairs: bool) -> str | tuple[str, str]:
    """A text, or two with a tab between them.

    Raises:
        DataError: `pairs`, and there is not one tab.
    """
    if not pairs:
        return line
    parts = line.split("\t")
    if len(parts) != 2:
        raise DataError(
            f"{where}: {len(parts) - 1} tabs; expected two texts with a tab between them"
        )
    return parts[0], parts[1]


def encode_texts(
    source: str,
    records: Sequence[TextRecord],
    targets: Sequence[Any],
    notes: Sequence[str],
    tokenizer: WordPieceTokenizer,
    max_seq_length: int,
) -> Dataset:
    """One example a record, with its target; what is too long is cut, and counted."""
    texts = [record.text for record in records]
    pairs = [record.pair or "" for record in records]
    has_pairs = bool(records) and records[0].pair is not None
    encodings = tokenizer.encode_batch(
        texts, pairs if has_pairs else None, max_length=max_seq_length
    )
    examples = [
        Example(
            index=index,
            input_ids=encoding.ids,
            type_ids=encoding.type_ids,
            labels=target,
            record=index,
        )
        for index, (encoding, target) in enumerate(zip(encodings, targets, strict=True))
    ]
    notes = list(notes)
    num_cut = sum(encoding.num_truncated > 0 for encoding in encodings)
    if num_cut:
        longest = max(len(encoding) + encoding.num_truncated for encoding in encodings)
        notes.append(
            f"{source}: {num_cut} text(s) cut to model.dataset.max_seq_length="
            f"{max_seq_length} tokens; the longest has {longest}"
        )
    return Dataset(source, records, examples, tuple(notes))


def collate_texts(
    examples: Sequence[Example], device: torch.device | str | None, dtype: torch.dtype
) -> TaskBatch:
    """Packed tokens and, where all examples have one, `labels["label"]`: [b] of `dtype`."""
    packed = pack_examples(examples, device)
    labels = {}
    if all(example.labels is not None for example in examples):
        targets = [example.labels for example in examples]
        labels["label"] = torch.tensor(targets, dtype=dtype, device=device)
    return TaskBatch(tuple(examples), packed, labels)
