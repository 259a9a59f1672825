"""Text data files: read as lines, with errors that say where; written whole or not at all."""

from __future__ import annotations

import codecs
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tpcore.tasks.task import DataError


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file, without its end."""

    number: int  # from 1
    text: str


def read_lines(path: str | os.PathLike[str]) -> list[Line]:
    r"""All lines of a UTF-8 file, blank ones too; ends may be \n, \r\n or a mixture.

    A byte-order mark is dropped. Other characters that Unicode calls line ends stay in the text.

    Raises:
        DataError: the file is missing, unreadable, empty, not UTF-8, or holds a NUL.
    """
    try:
        if stat.S_ISFIFO(Path(path).stat().st_mode):
            raise DataError(f"{path} is a pipe, and data are read more than once; expected a file")
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected a data file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path} is UTF-16; expected UTF-8: convert it with `iconv -f UTF-16 -t UTF-8`"
        )
    content = content.removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        raise DataError(f"{path} is empty; expected at least one line of data")
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: the line holds a NUL byte; a text file has none: remove it"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8; if the file is in "
            "Latin-1, convert it with `iconv -f LATIN1 -t UTF-8`"
        ) from None
    if "\r" in text and "\n" not in text:
        raise DataError(
            f"{path}: lines end in \\r alone; expected \\n: convert it with `tr '\\r' '\\n'`"
        )
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [Line(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1)]


def write_whole(path: str | os.PathLike[str], content: str) -> None:
    """Write a UTF-8 file; another process sees the old file or the new one, never a part.

    Raises:
        ValueError: the folder does not exist or cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(content, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
