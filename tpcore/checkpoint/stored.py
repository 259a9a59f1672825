"""Tensors that are described, not held: read from files when asked for, and no more than is asked.

torch maps a zip file without reading it; where in the file each tensor is follows from its address.
What a rank needs is then read from there with ordinary reads: mapped pages would count as memory of
the process, and a rank that needs an eighth of the model should not need memory for all of it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.untrusted.unpickle import FileRange, load_embedded
from tpcore.checkpoint.untrusted.zip_directory import MAGIC, read_directory

_BLOCK_BYTES = 2**20

Box = tuple[tuple[int, int], ...]
"""A part of a tensor: begin and end in every dimension."""


@dataclass(frozen=True)
class StoredTensor:
    """One full tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_box: Callable[[Box], Tensor] | None = None
    """Reads a part alone, into memory of its own; None: only the whole can be read."""

    def narrow(self, dim: int, start: int, stop: int) -> Tensor:
        """Elements start .. stop - 1 of one dimension, in memory of their own."""
        if self.read_box is None:
            part = self.read().narrow(dim, start, stop - start)
            return part.clone(memory_format=torch.contiguous_format)
        box = [(0, size) for size in self.shape]
        box[dim] = (start, stop)
        return self.read_box(tuple(box))


class Piece(Protocol):
    """A tensor of which a part can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read_box(self, box: Box) -> Tensor:
        """The part, in memory that may be shared with others who read it."""
        ...


@dataclass(frozen=True)
class FilePiece:
    """A tensor in a region of a file."""

    path: Path
    where: str
    offset: int
    """Of its first element, in bytes."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def read_box(self, box: Box) -> Tensor:
        """The part: its rows are read, then other dimensions cut."""
        shape, stride = list(self.shape), self.stride
        start = 0
        for dim, (begin, end) in enumerate(box):
            start += begin * stride[dim]
            shape[dim] = end - begin
            if end - begin != 1:
                # Rows of a row-major tensor follow each other; columns are cut after reading.
                later = tuple((0, size) for size in self.shape[dim + 1 :])
                rest, shape[dim + 1 :] = box[dim + 1 :], self.shape[dim + 1 :]
                break
        else:
            later = rest = ()
        if 0 in shape:
            return torch.empty([b - a for a, b in box], dtype=self.dtype)
        rows = _BLOCK_BYTES // (stride[0] * self.dtype.itemsize or 1) if rest != later else 0
        if 0 < rows < box[0][1] - box[0][0]:
            # Some columns of many rows: in blocks, so that what is cut off takes no room.
            result = torch.empty([b - a for a, b in box], dtype=self.dtype)
            for begin in range(box[0][0], box[0][1], rows):
                end = min(begin + rows, box[0][1])
                target = slice(begin - box[0][0], end - box[0][0])
                result[target] = self.read_box(((begin, end), *box[1:]))
            return result
        span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        part = self._span(start, span).as_strided(shape, stride)
        if rest != later:
            first = part.dim() - len(rest)
            for dim, (begin, end) in enumerate(rest, start=first):
                part = part.narrow(dim, begin, end - begin)
        return part.contiguous()

    def _span(self, start: int, count: int) -> Tensor:
        """Elements start .. start + count - 1 of the region."""
        elements = torch.empty(count, dtype=self.dtype)
        size = count * elements.element_size()
        memory = (ctypes.c_char * size).from_address(elements.data_ptr())
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * elements.element_size())
                view, done = memoryview(memory).cast("B"), 0
                while done < size:
                    more = file.readinto(view[done : done + 2**30])
                    if not more:
                        raise CheckpointError(f"{self.where}: the file is truncated")
                    done += more
        except OSError as error:
            raise CheckpointError(f"{self.where}: cannot be read ({error.strerror})") from error
        return elements


@dataclass(frozen=True)
class HeldPiece:
    """A tensor that is in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read_box(self, box: Box) -> Tensor:
        """A view."""
        return self.tensor[tuple(slice(*bounds) for bounds in box)]


@dataclass(frozen=True)
class FoldedPiece:
    """A piece under a shape with more dimensions of size 1, or fewer."""

    piece: Piece
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.piece.dtype

    def read_box(self, box: Box) -> Tensor:
        """The part, in the new shape."""
        kept = iter(bounds for size, bounds in zip(self.shape, box, strict=True) if size != 1)
        inner = tuple((0, 1) if size == 1 else next(kept) for size in self.piece.shape)
        return self.piece.read_box(inner).reshape([end - begin for begin, end in box])


def whole(piece: Piece) -> Tensor:
    """All of a piece."""
    return piece.read_box(tuple((0, size) for size in piece.shape))


def assembled(
    shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[tuple[Sequence[int], Piece]]
) -> StoredTensor:
    """A tensor made of pieces, each with the place of its first element; they cover it exactly."""
    shape = tuple(shape)

    def read_box(box: Box) -> Tensor:
        result = torch.empty([end - begin for begin, end in box], dtype=dtype)
        for at, piece in pieces:
            common = [
                (max(begin, first), min(end, first + size))
                for (begin, end), first, size in zip(box, at, piece.shape, strict=True)
            ]
            if any(begin >= end for begin, end in common):
                continue
            inner = tuple((a - first, b - first) for (a, b), first in zip(common, at, strict=True))
            part = piece.read_box(inner)
            if part.shape == result.shape and not isinstance(piece, HeldPiece) and _is_whole(part):
                return part  # all that was asked for, in memory of its own
            target = tuple(
                slice(begin - first, end - first)
                for (begin, end), (first, _) in zip(common, box, strict=True)
            )
            result[target] = part
        return result

    return StoredTensor(
        shape, dtype, lambda: read_box(tuple((0, size) for size in shape)), read_box
    )


def _is_whole(part: Tensor) -> bool:
    """Whether a tensor fills its memory."""
    return part.is_contiguous() and part.untyped_storage().nbytes() == num_bytes(part)


def joined(pieces: Sequence[Piece], dim: int | None) -> StoredTensor:
    """Equal pieces one after the other along `dim`; None: one piece alone."""
    shape = list(pieces[0].shape)
    if dim is None:
        return assembled(shape, pieces[0].dtype, [([0] * len(shape), pieces[0])])
    places = []
    for index, piece in enumerate(pieces):
        at = [0] * len(shape)
        at[dim] = index * shape[dim]
        places.append((at, piece))
    shape[dim] *= len(pieces)
    return assembled(shape, pieces[0].dtype, places)


def file_pieces(tensors: Mapping[str, Any], path: Path, where: str) -> dict[str, Piece]:
    """The tensors that `load_pickle` mapped from a file, as pieces that are read from it later.

    Args:
        tensors: some or all of them, by name.
        path: the file.
        where: what errors call it.

    Raises:
        CheckpointError: one of them is no ordinary dense tensor.
    """
    for key, value in tensors.items():
        check_dense(value, key, where)
    base = _find_base(tensors.values(), path, where)
    pieces: dict[str, Piece] = {}
    for key, value in tensors.items():
        if base is None:
            pieces[key] = HeldPiece(value.detach())
            continue
        shape, stride = tuple(value.shape), tuple(value.stride())
        pieces[key] = FilePiece(path, where, value.data_ptr() - base, shape, stride, value.dtype)
    return pieces


def check_dense(value: Any, key: str, where: str) -> None:
    """Refuse what is no ordinary dense tensor.

    Raises:
        CheckpointError: names it.
    """
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{where}: {key} is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise CheckpointError(f"{where}: {key} is not an ordinary dense tensor")


def _find_base(tensors: Iterable[Tensor], path: Path, where: str) -> int | None:
    """The address where torch mapped the file; None: it did not, or that cannot be told.

    Each storage lies at the address of its record, and the mapping begins at a page.
    """
    addresses = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors)
        if storage.nbytes()
    }
    with path.open("rb") as file:
        if not addresses or file.read(len(MAGIC)) != MAGIC:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            records = {r.offset: r.size for r in read_directory(data, where).values()}
    first = min(addresses)
    bases = [
        first - offset
        for offset in records
        if (first - offset) % mmap.PAGESIZE == 0
        and all(records.get(at - first + offset) == size for at, size in addresses.items())
    ]
    return bases[0] if len(bases) == 1 else None


def embedded_content(path: Path, offset: int, size: int, where: str) -> Any:
    """The object in a torch zip file that is a range of another file; tensors are described only.

    Raises:
        CheckpointError: as `load_embedded`.
    """
    with FakeTensorMode():
        return load_embedded(path, offset, size, where)


def embedded_pieces(
    tensors: Mapping[str, Any], path: Path, offset: int, size: int, where: str
) -> dict[str, Piece]:
    """The tensors of `embedded_content`, as pieces that are read from the file later.

    Args:
        tensors: some or all of them, by name.
        path: the file.
        offset: of the torch file in it.
        size: of the torch file.
        where: what errors call it.

    Raises:
        CheckpointError: one of them is no ordinary dense tensor.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        records = read_directory(FileRange(data, offset, size, where), where)
    sizes = {record.offset: record.size for record in records.values() if record.size}
    pieces: dict[str, Piece] = {}
    for key, value in tensors.items():
        check_dense(value, key, where)
        storage = value.untyped_storage()
        # What torch says of a storage that it did not read: where its record begins.
        record = int(getattr(storage, "_checkpoint_offset", None) or 0)
        if storage.nbytes() > sizes.get(record, 0):
            raise CheckpointError(f"{where}: {key:.80} lies in no record of the file")
        begin = offset + record + value.storage_offset() * value.element_size()
        shape, strides = tuple(value.shape), tuple(value.stride())
        pieces[key] = FilePiece(path, where, begin, shape, strides, value.dtype)
    return pieces


def embedded_piece(path: Path, offset: int, size: int, where: str) -> Piece:
    """The one tensor in a torch zip file that is a range of another file; only described.

    Raises:
        CheckpointError: something else is there.
    """
    value = embedded_content(path, offset, size, where)
    return embedded_pieces({"the tensor": value}, path, offset, size, where)["the tensor"]


def num_bytes(value: Tensor) -> int:
    """What a tensor of this shape and dtype holds."""
    return math.prod(value.shape) * value.element_size()
