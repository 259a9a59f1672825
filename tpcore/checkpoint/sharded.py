"""Any module's parameters in a folder, written at one tensor-parallel size and read at another.

    save_sharded(module, "out", tp=tp)          every rank writes its own shards
    load_sharded(module, "out", tp=tp)          every rank reads what it needs, at any size

    out/index.json                              what there is: full shapes, shardings, ties, files
    out/shard_00_of_02.safetensors ...          rank 0 also holds what is replicated

A module takes part by saying how its tensors are split, ``own_sharding()`` of
tpcore.parallel.sharding; the layers of tpcore do. A tensor whose length depends on the size of the
group, such as a padded vocabulary, needs ``own_unpadded_sizes() -> dict[str, int]`` beside it: the
length without padding, along the split dimension. Where the length changes, padding is made anew,
by repeating the last row.

Bits are kept. Nothing is dropped, renamed or newly initialised. Reading needs no communication.

Every file holds a checksum of the layouts in the index and one of each of its tensors. The second
is compared where a shard is read whole, which is what a rank does at the size of the save; of a
shard of which only a part is needed the rest is not read, so the part goes unchecked.
"""

from __future__ import annotations

import ctypes
import json
import secrets
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tpcore.checkpoint import folders
from tpcore.checkpoint.errors import CheckpointError
from tpcore.parallel.collectives import broadcast
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import (
    Replicated,
    Sharding,
    full_shape,
    num_parts,
    sharding_table,
)

FORMAT = "tpcore sharded 1"
INDEX = "index.json"
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if type(d) is torch.dtype}


@dataclass(frozen=True)
class _Layout:
    """How a full tensor lies over ``size`` shards; dim None: whole, on every rank.

    ``unpadded`` is the length of ``dim`` that is not padding; None where nobody said.
    """

    shape: tuple[int, ...]
    dim: int | None
    parts: int = 1
    unpadded: int | None = None

    def intervals(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Where the blocks of one shard lie along dim in the full tensor."""
        assert self.dim is not None
        block = self.shape[self.dim] // self.parts
        length = block // size
        starts = [part * block + rank * length for part in range(self.parts)]
        return [(start, start + length) for start in starts]

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """The shape of one shard."""
        return tuple(n // size if d == self.dim else n for d, n in enumerate(self.shape))


@dataclass(frozen=True)
class _Entry:
    """A tensor of the module: all its names, its storage, its layout."""

    names: tuple[str, ...]
    tensor: Tensor
    layout: _Layout


def save_sharded(
    module: nn.Module,
    folder: str | Path,
    *,
    tp: TensorParallelGroup | None = None,
    overwrite: bool = False,
) -> None:
    """Write the parameters and persistent buffers of a module; every rank of ``tp`` calls it.

    A tensor with several names is written once. The folder appears when all of it is written, or
    not at all. With data parallelism, let one tensor-parallel group call it.

    Args:
        module: built with ``tp``.
        folder: the folder to make.
        tp: the ranks that share the module; None: a single process.
        overwrite: replace a folder that this function wrote.

    Raises:
        CheckpointError: the folder is taken or cannot be written, or the module holds what cannot
            be written; raised on every rank.
    """
    tp = TensorParallelGroup.single() if tp is None else tp
    destination = Path(folder).resolve()
    entries = list(_entries(module, tp.size))
    device = entries[0].tensor.device if entries else torch.device("cpu")
    number = torch.tensor([secrets.randbits(62)], device=device)
    identity = f"{int(broadcast(number, tp)):x}"

    def layouts() -> dict[str, Any]:
        return {
            "tensor_parallel_size": tp.size,
            "tensors": {entry.names[0]: _describe(entry) for entry in entries},
            "tied": {name: entry.names[0] for entry in entries for name in entry.names[1:]},
        }

    def prepare() -> None:
        if destination.exists() and not folders.is_empty(destination) and overwrite:
            _read_index(destination)  # only what this function wrote is overwritten
        folders.prepare(destination, replaceable=overwrite)

    def write(pending: Path) -> None:
        own = {
            entry.names[0]: entry.tensor.detach().to("cpu", copy=True).contiguous()
            for entry in entries
            if entry.layout.dim is not None or tp.rank == 0
        }
        checksums = {name: _checksum(tensor) for name, tensor in own.items()}
        metadata = {
            "format": FORMAT,
            "save": identity,
            "index": _index_checksum(layouts()),
            "crc32": json.dumps(checksums),
        }
        save_file(own, pending / _file_name(tp.rank, tp.size), metadata)

    def finish(pending: Path) -> None:
        names = [_file_name(rank, tp.size) for rank in range(tp.size)]
        index = {
            "format": FORMAT,
            "save": identity,
            "files": {name: (pending / name).stat().st_size for name in names},
            **layouts(),
        }
        (pending / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    folders.write_together(destination, tp, device, prepare=prepare, write=write, finish=finish)


def load_sharded(
    module: nn.Module, folder: str | Path, *, tp: TensorParallelGroup | None = None
) -> None:
    """Fill a module from a folder that ``save_sharded`` wrote at any tensor-parallel size.

    Everything is checked before the first tensor is touched, but for the checksums: after an error
    about one of those the module must not be used. Floating-point tensors are cast to the module's
    dtype.

    Args:
        module: built with ``tp``; not on the meta device.
        folder: what ``save_sharded`` wrote.
        tp: the ranks that share the module; None: a single process.

    Raises:
        CheckpointError: a name, a full shape or a kind of dtype differs between module and folder,
            or a file is missing, damaged or of another save.
    """
    tp = TensorParallelGroup.single() if tp is None else tp
    stored = _Stored(Path(folder))
    entries = list(_entries(module, tp.size))
    _check(entries, stored)
    with torch.no_grad():
        for entry in entries:
            entry.tensor.copy_(stored.read(entry.names[0], entry.layout, tp.rank, tp.size))


def _entries(module: nn.Module, size: int) -> Iterator[_Entry]:
    """The tensors of a module in the order of its state dict, those with several names once."""
    table, unpadded = sharding_table(module), _unpadded_sizes(module)
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}; only tensors are saved and loaded"
            )
        if hasattr(tensor, "full_tensor"):
            raise CheckpointError(
                f"{name} is spread over the data-parallel ranks (FSDP2); load before fully_shard, "
                "and save a module without it that was given full_tensor() of each parameter"
            )
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} is on the meta device; give the module memory first: to_empty(device=...)"
            )
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for key, aliases in names.items():
        # A module that shares another's parameter need not know how that is split.
        known = {table[name] for name in aliases if not isinstance(table[name], Replicated)}
        if len(known) > 1:
            raise CheckpointError(
                f"{' and '.join(aliases)} are one tensor, but are split as {known}"
            )
        sharding: Sharding = known.pop() if known else Replicated()
        shape = full_shape(tensors[key].shape, sharding, size, name=aliases[0])
        if isinstance(sharding, Replicated):
            layout = _Layout(shape, None)
        else:
            length = next((unpadded[name] for name in aliases if name in unpadded), None)
            layout = _Layout(shape, sharding.dim % len(shape), num_parts(sharding), length)
        yield _Entry(tuple(aliases), tensors[key], layout)


def _unpadded_sizes(module: nn.Module) -> dict[str, int]:
    sizes = {}
    for prefix, submodule in module.named_modules(remove_duplicate=False):
        own: Mapping[str, int] = (
            submodule.own_unpadded_sizes() if hasattr(submodule, "own_unpadded_sizes") else {}
        )
        sizes.update({f"{prefix}.{name}" if prefix else name: size for name, size in own.items()})
    return sizes


def _describe(entry: _Entry) -> dict[str, Any]:
    layout = entry.layout
    return {
        "dtype": str(entry.tensor.dtype).removeprefix("torch."),
        "shape": list(layout.shape),
        "dim": layout.dim,
        "parts": layout.parts,
        "unpadded": layout.unpadded,
    }


def _check(entries: list[_Entry], stored: _Stored) -> None:
    """Refuse what does not fit, naming all of it."""
    own = {name for entry in entries for name in entry.names}
    known = stored.layouts.keys() | stored.tied.keys()
    problems = [f"missing in the folder: {name}" for name in sorted(own - known)]
    problems += [f"not in the module: {name}" for name in sorted(known - own)]
    for entry in entries:
        name, ours = entry.names[0], entry.layout
        sources = {stored.tied.get(alias, alias) for alias in entry.names} & known
        if len(sources) > 1:
            problems.append(f"{' and '.join(sorted(sources))} are one tensor in the module only")
        if not sources:
            continue
        theirs = stored.layouts[stored.tied.get(name, name)]
        dtype = stored.dtypes[stored.tied.get(name, name)]
        if not _fits(ours, theirs):
            problems.append(
                f"{name} is {_in_words(theirs)} in the folder, {_in_words(ours)} in the module"
            )
        if dtype != entry.tensor.dtype and not (
            dtype.is_floating_point and entry.tensor.is_floating_point()
        ):
            problems.append(f"{name} is {dtype} in the folder, {entry.tensor.dtype} in the module")
    if problems:
        raise CheckpointError(f"{stored.folder} does not fit the module: {'; '.join(problems)}")


def _fits(ours: _Layout, theirs: _Layout) -> bool:
    if ours.shape == theirs.shape and None in (ours.unpadded, theirs.unpadded):
        return True
    if len(ours.shape) != len(theirs.shape) or ours.unpadded != theirs.unpadded:
        return False
    if ours.unpadded is None or ours.dim != theirs.dim:
        return ours.shape == theirs.shape
    return all(
        a == b
        for d, (a, b) in enumerate(zip(ours.shape, theirs.shape, strict=True))
        if d != ours.dim
    )


def _in_words(layout: _Layout) -> str:
    padding = "" if layout.unpadded is None else f" (dim {layout.dim}: {layout.unpadded} + padding)"
    return f"{list(layout.shape)}{padding}"


class _Stored:
    """A folder, its files opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder)
        self._files: dict[int, tuple[Any, dict[str, int]]] = {}
        try:
            self.size = _whole(self.index["tensor_parallel_size"], at_least=1)
            self.tied: dict[str, str] = self.index["tied"]
            tensors = self.index["tensors"].items()
            self.dtypes = {name: _DTYPES[value["dtype"]] for name, value in tensors}
            self.layouts = {name: _parse_layout(value, self.size) for name, value in tensors}
            files = [(name, _whole(n)) for name, n in self.index["files"].items()]
            if not all(source in self.layouts for source in self.tied.values()):
                raise ValueError("a tie leads nowhere")
            self.identity: str = self.index["save"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged ({error!r})") from error
        for name, num_bytes in files:
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != num_bytes:
                what = "is missing" if found is None else f"has {found} bytes"
                raise CheckpointError(f"{path} {what}; the index says that it has {num_bytes}")

    def _file(self, rank: int) -> tuple[Any, dict[str, int]]:
        """The opened file of one rank, and the checksums of its tensors."""
        if rank not in self._files:
            path = self.folder / _file_name(rank, self.size)
            try:
                file = safe_open(path, framework="pt")
                metadata = file.metadata() or {}
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            if metadata.get("save") != self.identity:
                raise CheckpointError(f"{path} does not belong to {INDEX}: it is of another save")
            if metadata.get("index") != _index_checksum(self.index):
                raise CheckpointError(
                    f"{self.folder / INDEX} is damaged, or was edited: the layouts in it are not "
                    f"those that {path.name} was written with"
                )
            try:
                checksums = dict(json.loads(metadata["crc32"]))
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged: it has no checksums") from error
            self._files[rank] = file, checksums
        return self._files[rank]

    def read(self, name: str, wanted: _Layout, rank: int, size: int) -> Tensor:
        """The shard that ``rank`` of ``size`` holds in the wanted layout."""
        name = self.tied.get(name, name)
        layout = self.layouts[name]
        dim = layout.dim if wanted.dim is None else wanted.dim
        if dim is None:
            return self._piece(name, 0, {})
        length = layout.shape[dim]
        intervals = [(0, length)] if wanted.dim is None else wanted.intervals(rank, size)
        if wanted.shape == layout.shape:
            return self._join(name, dim, intervals)
        # Another padding: the rows in common, then the last of them again and again.
        assert wanted.unpadded is not None
        ((start, stop),) = intervals
        end = min(stop, wanted.unpadded)
        rows = [self._join(name, dim, [(start, end)])] if start < end else []
        if stop > end:
            last = self._join(name, dim, [(wanted.unpadded - 1, wanted.unpadded)])
            rows.append(last.repeat_interleave(stop - max(start, end), dim))
        return torch.cat(rows, dim)

    def _join(self, name: str, dim: int, intervals: list[tuple[int, int]]) -> Tensor:
        """These intervals of dim of the full tensor, one after the other."""
        layout = self.layouts[name]
        if layout.dim is None:
            return _cat([self._piece(name, 0, {dim: interval}) for interval in intervals], dim)
        segments = []  # (start in the full tensor, rank, start in the shard, length)
        for rank in range(self.size):
            local = 0
            for start, stop in layout.intervals(rank, self.size):
                segments.append((start, rank, local, stop - start))
                local += stop - start
        segments.sort()
        if dim != layout.dim:
            rows = [
                _cat(
                    [
                        self._piece(
                            name, rank, {layout.dim: (local, local + length), dim: interval}
                        )
                        for interval in intervals
                    ],
                    dim,
                )
                for _, rank, local, length in segments
            ]
            return _cat(rows, layout.dim)
        pieces = []
        for start, stop in intervals:
            for first, rank, local, length in segments:
                low, high = max(start, first), min(stop, first + length)
                if low < high:
                    region = {dim: (local + low - first, local + high - first)}
                    pieces.append(self._piece(name, rank, region))
        return _cat(pieces, dim)

    def _piece(self, name: str, rank: int, region: Mapping[int, tuple[int, int]]) -> Tensor:
        """A region of one rank's shard; a whole shard is checked against its checksum."""
        file, checksums = self._file(rank)
        path = self.folder / _file_name(rank, self.size)
        try:
            part = file.get_slice(name)
            shape = part.get_shape()
            expected = self.layouts[name].shard_shape(self.size)
            if tuple(shape) != expected:
                raise CheckpointError(
                    f"{path}: {name} is {shape}, and {list(expected)} according to {INDEX}"
                )
            if all(interval == (0, shape[dim]) for dim, interval in region.items()):
                tensor = file.get_tensor(name)
                if _checksum(tensor) != checksums.get(name):
                    raise CheckpointError(f"{path} is damaged: {name} has another checksum")
                return tensor
            return part[tuple(slice(*region.get(dim, (None,))) for dim in range(len(shape)))]
        except SafetensorError as error:
            raise CheckpointError(f"{path} has no {name} of the right size ({error})") from error


def _whole(value: Any, at_least: int = 0) -> int:
    if type(value) is not int or value < at_least:
        raise ValueError(f"{value!r} where a number of {at_least} or more belongs")
    return value


def _parse_layout(value: Any, size: int) -> _Layout:
    """A layout of the index, which anybody may have edited."""
    shape = tuple(_whole(n) for n in value["shape"])
    dim, parts, unpadded = value["dim"], _whole(value["parts"], 1), value["unpadded"]
    if dim is not None and (_whole(dim) >= len(shape) or shape[dim] % (parts * size)):
        raise ValueError(f"shape {list(shape)} is not split along dim {dim}")
    if unpadded is not None and (dim is None or _whole(unpadded) > shape[dim]):
        raise ValueError(f"shape {list(shape)} does not hold {unpadded} along dim {dim}")
    return _Layout(shape, dim, parts, unpadded)


def _cat(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _file_name(rank: int, size: int) -> str:
    return f"shard_{rank:02d}_of_{size:02d}.safetensors"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); expected a folder that save_sharded wrote"
        ) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not of the format {FORMAT!r}")
    return index


def _index_checksum(index: Mapping[str, Any]) -> str:
    """Of all that says which element of a file is which element of a tensor."""
    layouts = {key: index[key] for key in ("tensor_parallel_size", "tensors", "tied")}
    return f"{zlib.crc32(json.dumps(layouts, sort_keys=True).encode()):08x}"


def _checksum(tensor: Tensor) -> int:
    tensor = tensor.contiguous()
    num_bytes = tensor.numel() * tensor.element_size()
    if num_bytes == 0:
        return zlib.crc32(b"")
    return zlib.crc32((ctypes.c_char * num_bytes).from_address(tensor.data_ptr()))
