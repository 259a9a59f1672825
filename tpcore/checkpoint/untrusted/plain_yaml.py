"""YAML files that nobody vouches for, as plain values.

PyYAML's safe loader runs nothing, but its time and memory are not bounded by the size of a file:
merge keys and aliases multiply, nesting recurses, some numbers take quadratic time. So the events
of a file are looked at first, one after the other, and then loaded.
"""

from __future__ import annotations

import json
from typing import Any

from tpcore.checkpoint.errors import CheckpointError, printable

MAX_BYTES = 2**20
MAX_EVENTS = 50_000
MAX_DEPTH = 32
MAX_PLAIN = 4096
"""Characters of a scalar without quotes, which may be a number."""

_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")
)


def parse_yaml(data: bytes, where: str) -> dict[str, Any]:
    """The mapping in a YAML file, of plain values only.

    Without PyYAML, which tpcore's extra [finetune] brings, only YAML that is JSON is read.

    Raises:
        CheckpointError: it is damaged, or larger or deeper than settings are, asks for objects, or
            holds something else than a mapping.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{where}: has {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        values = _load(data.decode(), where)
        _check_size(values, where)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes the parser raise
        what = printable(" ".join(str(error).split()))
        raise CheckpointError(f"{where}: is not valid YAML ({what:.200})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: holds a {type(values).__name__}, not a mapping")
    return {str(key): value for key, value in values.items()}


def _load(text: str, where: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        try:
            return json.loads(text)
        except ValueError:
            raise CheckpointError(
                f"{where}: reading YAML needs the package PyYAML; pip install 'tpcore[finetune]'"
            ) from None
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH or count > MAX_EVENTS:
            raise CheckpointError(f"{where}: is nested too deep, or has too many entries")
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!" and tag not in _TAGS:
            raise CheckpointError(f"{where}: has the tag {tag:.80}; only plain values are read")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
            if event.value == "<<":
                raise CheckpointError(f"{where}: merges mappings (<<); only plain values are read")
            if len(event.value) > MAX_PLAIN:
                raise CheckpointError(f"{where}: has a value of {len(event.value)} characters")
    return yaml.load(text, Loader=yaml.SafeLoader)  # the safe one


def _check_size(values: Any, where: str) -> None:
    """Aliases may repeat a node, or put it into itself; nobody walks such a tree unprepared."""
    pending, count = [(values, 0)], 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_EVENTS:
            raise CheckpointError(f"{where}: is nested too deep, or repeats itself too often")
        if isinstance(value, dict):
            pending += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            pending += [(each, depth + 1) for each in value]
