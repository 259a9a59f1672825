"""Megatron-Core checkpoints in the `torch_dist` container of torch.distributed.checkpoint.

    <folder>/.metadata                  names, shapes, and where the chunks of each tensor lie
    <folder>/__<rank>_<i>.distcp        chunks, each a torch file of its own
    <folder>/metadata.json              which container it is
    <folder>/common.pt                  args, version, iteration; since 2026 it is among the chunks

Layers are stacked, with a leading axis [L, ...], or each has names of its own. No process group is
needed, and no class of Megatron's or of torch.distributed is looked up.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcore.checkpoint import names
from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.formats.megatron import describe
from tpcore.checkpoint.formats.megatron_args import (
    labels_from_args,
    lowercase_from_args,
    stated_fields,
)
from tpcore.checkpoint.formats.megatron_files import TRACKER, tracked_folder
from tpcore.checkpoint.state import CanonicalState, Source, check_complete, tokenizer_files
from tpcore.checkpoint.stored import (
    Box,
    FoldedPiece,
    Piece,
    StoredTensor,
    assembled,
    embedded_piece,
)
from tpcore.checkpoint.untrusted.dist_metadata import METADATA, Chunk, Entry, read_metadata
from tpcore.checkpoint.untrusted.fields import Fields
from tpcore.checkpoint.untrusted.unpickle import load_embedded, load_pickle

FORMAT = "Megatron-Core (torch_dist)"
COMMON = "common.pt"
BACKEND = "metadata.json"

_LAYERS = "encoder.layers."
_COMMON_OBJECT = re.compile(r"common_state/shard_0_1")
_DROPPED = re.compile(
    r"(optimizer|opt_param_scheduler|lr_scheduler|rng_state|rerun_state_machine_state|common_state)"
    r"([./].*)?|.*\._extra_state([./].*)?"
)
"""What belongs to a run, not to its model; bytes of Transformer Engine, which are pickles."""


def recognise(path: Path) -> bool:
    """Whether `path` is such a folder, or one above it that names its newest iteration."""
    return (path / METADATA).is_file() or _iteration(path) is not None


def read(
    path: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
) -> CanonicalState:
    """Read a folder, or the iteration that the tracker file above it names.

    Args:
        path: where it is.
        overrides: as in `megatron.read`.
        args: what is known of the run, where the folder does not say.

    Raises:
        CheckpointError: a file is missing or damaged, or something in it is not accounted for.
    """
    folder = path if (path / METADATA).is_file() else _iteration(path)
    assert folder is not None
    _check_backend(folder)
    where = str(folder)
    entries = read_metadata(folder / METADATA)
    common = _common(folder, entries)
    raw_args = common.get("args")
    if isinstance(raw_args, argparse.Namespace):
        raw_args = vars(raw_args)
    stated = raw_args if isinstance(raw_args, dict) else {}
    run = Fields({**(args or {}), **stated}, where)
    facts = Fields({key: v for key, v in common.items() if isinstance(key, str)}, where, prefix="")
    tensors, stacked = _tensors(folder, entries)
    prefix = "model." if any(name.startswith("model.embedding.") for name in tensors) else ""
    named = {_without(prefix, name): tensor for name, tensor in tensors.items()}
    spelled = names.apply_aliases(named, names.MEGATRON_CORE_ALIASES, where)
    known = names.expand(names.MEGATRON_CORE, names.count_layers(spelled, where))
    keys = names.translate(spelled, known, where)
    canonical = {name: named[key] for name, key in keys.items()}
    shapes = {name: tensor.shape for name, tensor in canonical.items()}
    config, head, head_kwargs = describe(shapes, run, where, overrides)
    copies = {
        target: named[spelled[key]]
        for key, target in names.MEGATRON_CORE_TIED.items()
        if key in spelled
    }
    files = {folder / chunk.file for entry in entries.values() for chunk in entry.chunks}
    _check_files(files)
    common_file = (folder / COMMON,) if (folder / COMMON).is_file() else ()
    parts = tuple(
        (folder / chunk.file, chunk.start, chunk.length, f"{folder / chunk.file}: {name}")
        for name, entry in entries.items()
        if not _is_dropped(name)
        for chunk in entry.chunks
    )
    layout = "stacked" if stacked else "one by one"
    return check_complete(
        CanonicalState(
            config=config,
            head=head,
            head_kwargs=head_kwargs,
            labels=labels_from_args(run),
            tensors=canonical,
            copies=copies,
            source=Source(
                path=path,
                format=FORMAT,
                version=f"{facts.number('checkpoint_version', 3.0):g}",
                tensor_parallel_size=run.integer("tensor_model_parallel_size", 1) or 1,
                pipeline_parallel_size=run.integer("pipeline_model_parallel_size", 1) or 1,
                iteration=facts.integer("iteration") or None,
                qkv_layout="v3",
                lowercase=lowercase_from_args(run),
                notes=(f"layers: {layout}", f"{'with' if run.values else 'without'} args"),
                stated=stated_fields(run),
                files=(folder / METADATA, *common_file, *sorted(files)),
                parts=parts,
                tokenizer_files=tokenizer_files((path, folder, folder.parent)),
            ),
        )
    )


def _iteration(root: Path) -> Path | None:
    if not (root / TRACKER).is_file():
        return None
    folder = root / tracked_folder(root)
    return folder if (folder / METADATA).is_file() else None


def _check_backend(folder: Path) -> None:
    """metadata.json, where there is one, says what wrote the folder."""
    file = folder / BACKEND
    if not file.is_file():
        return
    try:
        with file.open("rb") as opened:
            content = json.loads(opened.read(2**20))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not valid JSON ({error})") from error
    backend = content.get("sharded_backend") if isinstance(content, dict) else None
    if backend != "torch_dist":
        raise CheckpointError(
            f"{file}: sharded_backend={shown(backend)} is not supported; torch_dist is"
        )


def _common(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What is not tensors: the dict in common.pt, else the one among the chunks, else nothing."""
    if (folder / COMMON).is_file():
        common, where = load_pickle(folder / COMMON), str(folder / COMMON)
    else:
        found = next((name for name in entries if _COMMON_OBJECT.fullmatch(name)), None)
        if found is None:
            return {}
        chunk = entries[found].chunks[0]
        where = f"{folder / chunk.file}: {found}"
        common = load_embedded(folder / chunk.file, chunk.start, chunk.length, where)
        if isinstance(common, list) and len(common) == 1:
            common = common[0]
    if not isinstance(common, dict):
        raise CheckpointError(f"{where}: holds a {type(common).__name__}, not a dict")
    return common


def _tensors(folder: Path, entries: Mapping[str, Entry]) -> tuple[dict[str, StoredTensor], bool]:
    """Every tensor of the model, stacked layers taken apart; and whether there were any."""
    tensors: dict[str, StoredTensor] = {}
    stacked = False
    for name, entry in entries.items():
        if _is_dropped(name):
            continue
        if entry.shape is None or entry.dtype is None:
            raise CheckpointError(
                f"{folder}: {name:.80} is an object, and none that is known to be no parameter"
            )
        before, found, rest = name.partition(_LAYERS)
        if not found or before not in ("", "model.") or rest[:1].isdigit():
            tensors[name] = _tensor(folder, name, entry, entry.shape, None)
            continue
        stacked = True
        if not entry.shape or not 1 <= entry.shape[0] <= names.MAX_LAYERS:
            raise CheckpointError(
                f"{folder}: {name:.80} has shape {list(entry.shape)}; expected a stack of 1 to "
                f"{names.MAX_LAYERS} layers"
            )
        for layer in range(entry.shape[0]):
            key = f"{before}{_LAYERS}{layer}.{rest}"
            if key in entries:
                raise CheckpointError(f"{folder}: {key:.80} is there alone and among its stack")
            tensors[key] = _tensor(folder, name, entry, entry.shape[1:], layer)
    return tensors, stacked


def _tensor(
    folder: Path, name: str, entry: Entry, shape: tuple[int, ...], layer: int | None
) -> StoredTensor:
    """A tensor of an entry; of a stack, that of one layer."""
    assert entry.dtype is not None
    pieces: list[tuple[tuple[int, ...], Piece]] = []
    for chunk in entry.chunks:
        piece: Piece = _ChunkPiece(folder, name, chunk, entry.dtype)
        if layer is None:
            pieces.append((chunk.offsets, piece))
        elif chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]:
            pieces.append((chunk.offsets[1:], _Layer(piece, layer - chunk.offsets[0])))
    return assembled(shape, entry.dtype, pieces)


@dataclass(frozen=True)
class _ChunkPiece:
    """A chunk, opened when it is read."""

    folder: Path
    name: str
    chunk: Chunk
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.chunk.sizes

    def read_box(self, box: Box) -> Tensor:
        """The part of the chunk."""
        file = self.folder / self.chunk.file
        where = f"{file}: {self.name} {list(self.chunk.offsets)}"
        piece = embedded_piece(file, self.chunk.start, self.chunk.length, where)
        sizes = tuple(size for size in piece.shape if size != 1)
        if piece.dtype != self.dtype or sizes != tuple(n for n in self.shape if n != 1):
            raise CheckpointError(
                f"{where}: is {list(piece.shape)} {piece.dtype}; the metadata says "
                f"{list(self.shape)} {self.dtype}"
            )
        return FoldedPiece(piece, self.shape).read_box(box)


@dataclass(frozen=True)
class _Layer:
    """One layer of a chunk of a stack."""

    piece: Piece
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.piece.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.piece.dtype

    def read_box(self, box: Box) -> Tensor:
        """The part of the layer."""
        return self.piece.read_box(((self.index, self.index + 1), *box))[0]


def _check_files(files: set[Path]) -> None:
    missing = sorted(str(file) for file in files if not file.is_file())
    if missing:
        raise CheckpointError(f"files are missing: {names.listing(missing)}")


def _is_dropped(name: str) -> bool:
    return _DROPPED.fullmatch(name.removeprefix("model.")) is not None


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix) if prefix else name
