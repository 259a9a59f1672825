"""The classes of a task: where their names come from, and what a cell of a data file means."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from tpcore.tasks.task import DataError
from tpcore.tasks.text_file import read_lines

NUM_SHOWN = 20
"""Messages list so many labels at most."""
IN_A_TABLE = "correct or remove the line, or set model.dataset.header=true if it is a header"
"""What to do about an unknown label in a column of a table."""


class Labels:
    """Names of classes; a class's id is its index.

    Raises:
        ValueError: fewer than two names, an empty one, or one twice.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._ids = {name: index for index, name in enumerate(self.names)}
        if len(self.names) < 2 or len(self._ids) < len(self.names) or "" in self._ids:
            raise ValueError(f"labels are {self}; expected two or more, all different, none empty")
        self._has_integers = any(map(is_integer, self.names))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __str__(self) -> str:
        shown = ", ".join(self.names[:NUM_SHOWN])
        more = len(self.names) - NUM_SHOWN
        return f"{shown} and {more} more" if more > 0 else shown

    def find(self, cell: str) -> int | None:
        """The id that a cell stands for: it is a name or, where no name is a number, an id."""
        if cell in self._ids:
            return self._ids[cell]
        if self._has_integers or not is_integer(cell) or not 0 <= int(cell) < len(self.names):
            return None
        return int(cell)

    def is_known(self, cell: str) -> bool:
        return self.find(cell) is not None

    def id_of(self, cell: str, where: str, way_out: str = IN_A_TABLE) -> int:
        """As `find`.

        Raises:
            DataError: it is no label; `where` is the place in the file, `way_out` what to do.
        """
        index = self.find(cell)
        if index is not None:
            return index
        near = difflib.get_close_matches(cell, self.names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"{where}: unknown label {cell!r}{hint}; the labels are {self}; {way_out}")

    def balanced_weights(self, ids: Sequence[int]) -> list[float]:
        """`len(ids) / (number of classes * occurrences)` for each class; 1 for one without any."""
        counts = Counter(ids)
        return [
            len(ids) / (len(self.names) * counts[index]) if counts[index] else 1.0
            for index in range(len(self.names))
        ]

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Labels:
        """One name a line, in the order of the ids.

        Raises:
            DataError: the file cannot be used.
        """
        names = [line.text.strip() for line in read_lines(path)]
        while not names[-1]:
            names.pop()
        for index, name in enumerate(names):
            if not name:
                raise DataError(f"{path}:{index + 1}: the line is empty; expected a label in each")
            if name in names[:index]:
                first = names.index(name) + 1
                raise DataError(f"{path}:{index + 1}: label {name!r} is in line {first} already")
        if len(names) < 2:
            raise DataError(f"{path}: 1 label; a classification needs at least two, one a line")
        return cls(names)

    @classmethod
    def of_cells(
        cls, cells: Sequence[str], num_classes: int | None, path: str | os.PathLike[str]
    ) -> Labels:
        """The labels that occur: in numerical order when all are integers, else in code order.

        With `num_classes` n and integers from 0 to n-1 they are all of these, occurring or not.

        Raises:
            DataError: all cells are equal.
        """
        found = set(cells)
        if all(map(is_integer, found)):
            if num_classes is not None and all(0 <= int(cell) < num_classes for cell in found):
                return cls([str(index) for index in range(num_classes)])
            names = sorted(found, key=int)
        else:
            names = sorted(found)
        if len(names) < 2:
            raise DataError(
                f"{path}: all lines have the label {names[0]!r}; a classification needs two or "
                "more: check model.dataset.label_column"
            )
        return cls(names)


def is_integer(text: str) -> bool:
    """Whether a text is an integer as `str` writes it, of at most 18 digits."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) <= 18 and text == str(int(text))
