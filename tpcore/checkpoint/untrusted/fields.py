"""Typed access to values from a file: checked when they are asked for, and named if wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcore.checkpoint.errors import CheckpointError, shown


class Fields:
    """Named values of a file; hyphens in names are read as underscores.

    Args:
        values: the names and values; nothing about them is trusted.
        where: the file, for errors.
        prefix: what stands before a name in errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "args.") -> None:
        self.values = {str(key).replace("-", "_"): value for key, value in values.items()}
        self.where = where
        self.prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None) -> int | None:
        """A non-negative integer, or the default where it is absent or None."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(name, value, "a non-negative integer")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.values.get(name)
        if value is None:
            return default
        # inf - inf and nan - nan are nan; no conversion that a huge integer would overflow.
        if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0:
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or False; absent and None are False."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool | int):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """A string, or None where it is absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def _wrong(self, name: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {self.prefix}{name}={shown(value)} is not {expected}"
        )
