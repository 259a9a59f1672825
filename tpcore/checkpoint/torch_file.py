"""Writing a torch file one tensor after the other; torch.save wants all of them in memory.

A zip file without compression: `archive/data.pkl` is the object, with a reference for each tensor,
`archive/data/<n>` the bytes of the n-th. Every record has a checksum and begins at 64 bytes.
"""

from __future__ import annotations

import ctypes
import io
import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcore.checkpoint.stored import StoredTensor

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_ROOT = "archive/"
_ALIGNMENT = 64
_WIDE_FROM_BYTES = 2**30
_WIDE_FIELD_BYTES = 20
"""Of a record whose sizes may need 64 bits."""
_CHUNK_BYTES = 2**26
_EPOCH = (1980, 1, 1, 0, 0, 0)


def save(content: Any, path: Path, *, write: bool = True) -> None:
    """Write an object as torch.save does; each `StoredTensor` in it is read when its turn comes.

    Args:
        content: dicts, lists, plain values, and `StoredTensor` in the place of tensors.
        path: the file to make.
        write: False reads the tensors in the same order and writes nothing, for ranks that only
            take part in reading.

    Raises:
        OSError: the file cannot be written; all tensors have been read by then.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    error: OSError | None = None
    file: zipfile.ZipFile | None = None
    try:
        if write:
            try:
                file = zipfile.ZipFile(path, "x")
                _add(file, "data.pkl", pickled.getvalue())
                _add(file, "byteorder", sys.byteorder.encode())
            except OSError as raised:
                error = raised
        for number, tensor in enumerate(pickler.tensors):
            value = tensor.read()
            if file is None or error is not None:
                continue
            try:
                _add(file, f"data/{number}", _memory(value, tensor))
            except OSError as raised:
                error = raised
        if error is not None:
            raise error
        if file is not None:
            _add(file, "version", b"3\n")
            file.close()
    finally:
        if file is not None and file.fp is not None:
            # Its directory is of no use any more; the zip file must not try to write it later.
            opened, file.fp = file.fp, None
            opened.close()


@dataclass(frozen=True)
class _Storage:
    """What a tensor's memory is in the pickle: a reference to a record."""

    number: int
    dtype: torch.dtype
    num_elements: int


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[StoredTensor] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        return ("storage", _STORAGES[value.dtype], str(value.number), "cpu", value.num_elements)

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, StoredTensor):
            return NotImplemented
        shape = tuple(value.shape)
        strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        storage = _Storage(len(self.tensors), value.dtype, math.prod(shape))
        self.tensors.append(value)
        hooks: OrderedDict[str, Any] = OrderedDict()
        arguments = (storage, 0, shape, strides, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


def _memory(value: Tensor, described: StoredTensor) -> memoryview:
    assert (tuple(value.shape), value.dtype) == (tuple(described.shape), described.dtype)
    value = value.detach().cpu().contiguous()
    size = value.numel() * value.element_size()
    if not size:
        return memoryview(b"")
    memory = (ctypes.c_char * size).from_address(value.data_ptr())
    memory.tensor = value  # type: ignore[attr-defined]  # lives as long as its memory is looked at
    return memoryview(memory).cast("B")


def _add(file: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    entry = zipfile.ZipInfo(_ROOT + name, _EPOCH)
    entry.file_size = len(data)
    wide = entry.file_size >= _WIDE_FROM_BYTES
    assert file.fp is not None
    # The data begins behind a header of 30 bytes, the name, the extra fields.
    begin = file.fp.tell() + 30 + len(entry.filename) + 4 + wide * _WIDE_FIELD_BYTES
    padding = -begin % _ALIGNMENT
    entry.extra = struct.pack("<2H", 0x4246, padding) + b"Z" * padding  # as torch pads
    with file.open(entry, "w", force_zip64=wide) as record:
        for start in range(0, len(data), _CHUNK_BYTES):
            record.write(data[start : start + _CHUNK_BYTES])
