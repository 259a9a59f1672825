"""The `.metadata` of torch.distributed.checkpoint: which tensors there are, where their chunks lie.

It is a pickle of dataclasses. It is followed first (`pickle_scan`), then read with classes that
keep their state and do nothing; of torch nothing is looked up but dtypes.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.untrusted.pickle_scan import MAX_BYTES, PickleScan

METADATA = ".metadata"

_DCP = "torch.distributed.checkpoint"
_CLASSES = (
    *(
        f"{_DCP}.metadata.{name}"
        for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta"),
        )
    ),
    *(
        f"{_DCP}.planner.{name}"
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    ),
    f"{_DCP}.filesystem._StorageInfo",
    f"{_DCP}._extension.StreamTransformExtension",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "torch.serialization._get_layout",
    "torch.Size",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
)
_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "bool", "uint8"),
        *("int64", "int32", "int16", "int8"),
    )
}
_MAX_DIMS = 16
_MAX_PAIRS = 200_000
"""Of chunks of one tensor that are compared; 64 ranks and 100 layers need 200,000."""


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor (or an object's bytes): where it belongs, where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor; or, without a shape, an object."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    chunks: tuple[Chunk, ...]


class _Record:
    """Keeps what the pickle gives it."""

    name = ""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, field: str) -> Any:
        return self.state.get(field) if isinstance(self.state, dict) else None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _DTYPES:
            return _DTYPES[full]
        if full not in _CLASSES:
            raise pickle.UnpicklingError(f"{full} is not on the list")
        return type(name, (_Record,), {"name": full})

    def persistent_load(self, identity: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def read_metadata(path: Path) -> dict[str, Entry]:
    """Every entry of a `.metadata` file by name.

    Raises:
        CheckpointError: it is damaged, holds something that is not on the list, or contradicts
            itself.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: is far too large for what it should hold")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    PickleScan(data, str(path), (*_CLASSES, *_DTYPES), lambda key: None).follow()
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever a damaged pickle makes the reader raise
        raise CheckpointError(f"{path}: truncated, damaged or unsafe ({error})") from error
    entries = metadata.get("state_dict_metadata") if _is(metadata, "Metadata") else None
    places = metadata.get("storage_data") if _is(metadata, "Metadata") else None
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise CheckpointError(f"{path}: is no metadata of torch.distributed.checkpoint")
    found: dict[tuple[Any, Any], _Record] = {}
    for index, info in places.items():
        if not _is(index, "MetadataIndex") or not _is(info, "_StorageInfo"):
            raise CheckpointError(f"{path}: the places of its tensors are not where they should be")
        found[_text(index.get("fqn"), path), _sizes(index.get("offset"), path)] = info
    return {_text(name, path): _entry(name, item, found, path) for name, item in entries.items()}


def _entry(name: str, item: Any, places: dict[tuple[Any, Any], _Record], path: Path) -> Entry:
    if _is(item, "BytesStorageMetadata"):
        return Entry(None, None, (_chunk(name, None, (), (), places, path),))
    properties = item.get("properties") if _is(item, "TensorStorageMetadata") else None
    chunks = item.get("chunks") if properties is not None else None
    if not isinstance(chunks, list):
        raise CheckpointError(f"{path}: {name:.80} is neither a tensor nor an object")
    shape = _sizes(item.get("size"), path) or ()
    state = properties.state if isinstance(properties, _Record) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{path}: {name:.80} has no dtype")
    parts = []
    for chunk in chunks:
        if not _is(chunk, "ChunkStorageMetadata"):
            raise CheckpointError(f"{path}: {name:.80} has a chunk that is none")
        offsets, sizes = _sizes(chunk.get("offsets"), path), _sizes(chunk.get("sizes"), path)
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
            raise CheckpointError(f"{path}: {name:.80} has a chunk of another kind of shape")
        if any(at + size > full for at, size, full in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(f"{path}: {name:.80} has a chunk outside of its shape {shape}")
        parts.append(_chunk(name, offsets, offsets, sizes, places, path))
    _check_cover(name, shape, parts, path)
    return Entry(shape, dtype, tuple(parts))


def _chunk(
    name: str,
    key: tuple[int, ...] | None,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    places: dict[tuple[Any, Any], _Record],
    path: Path,
) -> Chunk:
    info = places.get((name, key))
    if info is None:
        raise CheckpointError(f"{path}: does not say where {name:.80} {list(offsets)} lies")
    if info.get("transform_descriptors"):
        raise CheckpointError(f"{path}: {name:.80} is compressed or transformed; not supported")
    file, start, length = (info.get(part) for part in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
        raise CheckpointError(f"{path}: {name:.80} lies in {file!r:.80}, which is no file name")
    if not all(type(value) is int and value >= 0 for value in (start, length)):
        raise CheckpointError(f"{path}: {name:.80} lies at no place in its file")
    return Chunk(offsets, sizes, file, start, length)


def _check_cover(name: str, shape: tuple[int, ...], chunks: list[Chunk], path: Path) -> None:
    """Chunks must hold every element once."""
    total = sum(math.prod(chunk.sizes) for chunk in chunks)
    ordered = sorted({(c.offsets, c.sizes) for c in chunks})
    if total != math.prod(shape) or len(ordered) != len(chunks) or _overlap(ordered):
        raise CheckpointError(
            f"{path}: the chunks of {name:.80} hold {total} elements, its shape {list(shape)} has "
            f"{math.prod(shape)}; some are missing, or there twice"
        )


def _overlap(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    # Sorted by their first offsets; most chunks differ there, so few pairs are looked at.
    compared = 0
    for index, (at, size) in enumerate(boxes):
        for other, other_size in boxes[index + 1 :]:
            compared += 1
            if compared > _MAX_PAIRS or not at:
                return True
            if other[0] >= at[0] + size[0]:
                break
            if all(
                a < b + n and b < a + m
                for a, m, b, n in zip(at, size, other, other_size, strict=True)
            ):
                return True
    return False


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Record) and type(value).__name__ == kind


def _text(value: Any, path: Path) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"{path}: a tensor has no name")
    return value


def _sizes(value: Any, path: Path) -> tuple[int, ...] | None:
    """A torch.Size, as it was pickled; None where there is none."""
    if value is None:
        return None
    sizes = value.args[0] if _is(value, "Size") and len(value.args) == 1 else None
    if (
        not isinstance(sizes, tuple)
        or len(sizes) > _MAX_DIMS
        or any(type(size) is not int or not 0 <= size < 2**48 for size in sizes)
    ):
        raise CheckpointError(f"{path}: a tensor has a shape that is none: {shown(sizes)}")
    return sizes
