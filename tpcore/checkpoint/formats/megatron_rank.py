"""One rank's file of a Megatron checkpoint: its parameters under canonical names, its arguments."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tpcore.checkpoint import names
from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.formats import nemo_names
from tpcore.checkpoint.stored import Piece, check_dense, embedded_pieces, file_pieces, num_bytes
from tpcore.checkpoint.untrusted.fields import Fields
from tpcore.checkpoint.untrusted.unpickle import load_pickle

LEGACY = "Megatron-LM"
CORE = "Megatron-Core (torch)"

_MAX_DEPTH = 8


@dataclass(frozen=True)
class RankFile:
    """What it holds; nothing of a tensor is read yet."""

    where: str
    args: Fields
    chunks: list[dict[str, Piece]]
    """By canonical name; layer numbers count from 0 in each chunk."""
    tied: dict[str, Piece]
    """Canonical name -> this rank's second copy of it."""
    family: str
    old_names: bool
    version: float | None
    iteration: int | None

    @property
    def version_text(self) -> str:
        return "0 (absent)" if self.version is None else f"{self.version:g}"

    @property
    def notes(self) -> tuple[str, ...]:
        spelling = "transformer/attention" if self.old_names else "encoder/self_attention"
        args = "with" if self.args.values else "without"
        if self.family != LEGACY:
            return (f"{args} args",)
        return (f"names of layers: {spelling}", f"{args} args")


def read_rank(path: Path) -> RankFile:
    """Read a file that Megatron wrote, or NeMo, alone or by way of Lightning.

    Raises:
        CheckpointError: it is damaged, or something in it is not accounted for.
    """
    return rank_of(nemo_names.unwrap(load_pickle(path), str(path)), path)


def rank_of(
    content: Any, path: Path, where: str | None = None, part: tuple[int, int] | None = None
) -> RankFile:
    """The content of a file: a dict with `model`, and what Megatron keeps beside it.

    Args:
        content: as `load_pickle` gives it, or `embedded_content` with `part`.
        path: the file that holds the tensors.
        where: what errors call it; None: its path.
        part: offset and size, if it is a part of another file.

    Raises:
        CheckpointError: something in it is not accounted for.
    """
    where = str(path) if where is None else where
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: holds a {type(content).__name__}, not a dict with a model")
    chunk_keys = sorted(
        (key for key in content if isinstance(key, str) and re.fullmatch(r"model\d{0,3}", key)),
        key=lambda key: int(key[5:] or -1),
    )
    if not chunk_keys:
        keys = names.listing(sorted(str(key)[:60] for key in content))
        raise CheckpointError(f"{where}: there is no 'model' in it; it holds: {keys or 'nothing'}")
    raw_args = content.get("args", content.get("config"))
    args = {} if raw_args is None else raw_args if isinstance(raw_args, dict) else None
    if isinstance(raw_args, argparse.Namespace):
        args = vars(raw_args)
    if args is None:
        raise CheckpointError(f"{where}: args is a {type(raw_args).__name__}, not a namespace")
    limit = path.stat().st_size if part is None else part[1]
    flats = [_flatten(content[key], where, limit) for key in chunk_keys]
    core = any(
        key.removeprefix("module.").startswith(("embedding.", "encoder."))
        for flat in flats
        for key in flat
    )
    table, aliases, ties = (
        (names.MEGATRON_CORE, names.MEGATRON_CORE_ALIASES, names.MEGATRON_CORE_TIED)
        if core
        else (names.MEGATRON, names.MEGATRON_ALIASES, names.MEGATRON_TIED)
    )
    translations, named = [], {}
    for number, flat in enumerate(flats):
        spelled = names.apply_aliases(flat, aliases, where)
        known = names.expand(table, names.count_layers(spelled, where))
        translated = names.translate(spelled, known, where)
        translations.append((spelled, translated))
        for key in (*translated.values(), *(spelled[key] for key in ties if key in spelled)):
            named[f"{number} {key}"] = flat[key]
            check_dense(flat[key], key, where)
    if part is None:
        pieces = file_pieces(named, path, where)
    else:
        pieces = embedded_pieces(named, path, *part, where)
    chunks: list[dict[str, Piece]] = []
    tied: dict[str, Piece] = {}
    for number, (spelled, translated) in enumerate(translations):
        chunks.append({name: pieces[f"{number} {key}"] for name, key in translated.items()})
        for key, target in ties.items():
            if key in spelled:
                tied[target] = pieces[f"{number} {spelled[key]}"]
    facts = Fields({k: v for k, v in content.items() if isinstance(k, str)}, where)
    return RankFile(
        where=where,
        args=Fields(args, where),
        chunks=chunks,
        tied=tied,
        family=CORE if core else LEGACY,
        old_names=any(".transformer." in key for flat in flats for key in flat),
        version=_version(content.get("checkpoint_version"), where),
        iteration=facts.integer("iteration", facts.integer("total_iters")),
    )


def _version(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1, 2, 3):
        raise CheckpointError(
            f"{where}: checkpoint_version={shown(value)} is unknown; 0 to 3 are read"
        )
    return float(value)


def _flatten(tree: Any, where: str, limit: int) -> dict[str, Any]:
    """Nested dicts -> dotted keys. `limit` bounds what a tensor may claim to hold, in bytes."""
    flat: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(part: Any, prefix: str, depth: int) -> None:
        part_name = prefix or "model"
        if not isinstance(part, dict):
            raise CheckpointError(
                f"{where}: {part_name:.80} is a {type(part).__name__}, not a dict"
            )
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{where}: {part_name:.80} is nested more than {_MAX_DEPTH} deep")
        if id(part) in seen:
            raise CheckpointError(f"{where}: {part_name:.80} occurs twice, or contains itself")
        seen.add(id(part))
        for key, value in part.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: {part_name:.80} has a key that is no string")
            name = f"{prefix}.{key}" if prefix else key
            if isinstance(value, dict):
                visit(value, name, depth + 1)
                continue
            if name in flat:
                raise CheckpointError(f"{where}: {name:.80} occurs twice")
            if isinstance(value, Tensor) and num_bytes(value) > limit:
                raise CheckpointError(
                    f"{where}: {name:.80} claims shape {list(value.shape)}, more than the file "
                    "holds"
                )
            flat[name] = value

    visit(tree, "", 0)
    return flat
