from __future__ import annotations

import reprlib
from typing import Any

_LONGEST = 2000


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and the way out.

    It is one printable line, whatever names and values a file put into it.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[:_LONGEST]} ..."
        super().__init__(printable(message))


def shown(value: Any) -> str:
    """`repr` of a value from a file for an error: short, however large and nested the value is."""
    return _SHORT.repr(value)[:80]


def printable(text: str) -> str:
    """The text in one line, with what would steer a terminal written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
