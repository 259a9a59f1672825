"""JSON data files: one object a line, or one in the whole file, with errors that say where."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from tpcore.tasks.task import DataError
from tpcore.tasks.text_file import read_lines

MAX_DIGITS = 300
"""No float is longer; Python itself refuses to read some thousands."""


def read_objects(path: str | os.PathLike[str]) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """((line number, object) of each line, the number of blank lines left out).

    Raises:
        DataError: as `read_lines`, or a line is no JSON object.
    """
    lines = read_lines(path)
    objects = []
    for line in lines:
        if line.text.strip():
            objects.append((line.number, parse_object(line.text, f"{path}:{line.number}")))
    return objects, len(lines) - len(objects)


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        DataError: it is not; `where` is the place for the message.
    """
    try:
        value = load_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg} at character {error.colno}; expected one object in "
            "each line"
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {kind_of(value)}; expected an object, {{...}}")
    return value


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: it is, but Python would read it wrongly or not at all; the message says why.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise ValueError("JSON nested too deeply; expected plain objects and arrays") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice; keep one of them")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; expected at most {MAX_DIGITS}")
    return int(digits)


def get_text(value: dict[str, Any], keys: Sequence[str], where: str) -> str:
    """The string under the first of `keys` that the object has.

    Raises:
        DataError: it has none of them, or the value is no string.
    """
    for key in keys:
        if key in value:
            if isinstance(value[key], str):
                return check_text(value[key], f"{where}: {key}")
            raise DataError(f"{where}: {key} is a {kind_of(value[key])}; expected a string")
    raise DataError(
        f"{where}: no {' or '.join(keys)}; the object has {', '.join(value) or 'no keys'}"
    )


def check_text(text: str, where: str) -> str:
    """The same text.

    Raises:
        DataError: it holds a NUL or half of a surrogate pair, which JSON can spell.
    """
    if "\0" in text:
        raise DataError(f"{where} holds a NUL character; a text has none: remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half of a surrogate pair, which is no character; write the whole pair"
        ) from None
    return text


def kind_of(value: Any) -> str:
    """What JSON calls the type of a value."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")
