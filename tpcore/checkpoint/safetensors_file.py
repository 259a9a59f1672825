"""Writing a safetensors file one tensor after the other; the library wants all of them at once.

An 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, begin and end of the
data), then the data without a gap. Wider dtypes come first, so that each tensor is aligned.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_ALIGNMENT = 8


class SafetensorsWriter:
    """A file whose tensors are announced first and written in any order; made by the first.

    Args:
        path: the file to make.
        layout: name -> shape and dtype of every tensor.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        self._layout = dict(layout)
        order = sorted(layout, key=lambda name: -layout[name][1].itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, int] = {}
        end = 0
        for name in order:
            shape, dtype = layout[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._places[name] = begin
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        self._path = path
        self._file: BinaryIO | None = None
        self._head = len(text).to_bytes(8, "little") + text

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place.

        Raises:
            OSError: the disk is full, or the like.
        """
        assert (tuple(tensor.shape), tensor.dtype) == self._layout[name], name
        if self._file is None:
            self._file = self._path.open("xb")
            self._file.write(self._head)
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        self._file.seek(self._start + self._places[name])
        if size:
            self._file.write((ctypes.c_char * size).from_address(tensor.data_ptr()))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
