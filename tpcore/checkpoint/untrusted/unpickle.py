"""Reading torch.save files without executing anything that they contain.

`torch.load(weights_only=True)` does the work. Training checkpoints also pickle a few objects that
carry no weights (an argparse.Namespace, numpy random states, enums, a loss scaler). Those names,
and no others, are mapped to inert classes for the duration of one call: nothing is imported for
them and nothing of theirs runs. Any other name is refused, and the error says which.

Before that, `zip_directory` and `pickle_scan` make sure that the file holds what it claims: torch
itself unpacks compressed records of any size, and trusts what a tensor says of its storage.
"""

from __future__ import annotations

import argparse
import io
import mmap
import os
import pickle
import stat
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.serialization import safe_globals

from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.untrusted.archive import Window
from tpcore.checkpoint.untrusted.pickle_scan import MAX_BYTES, PickleScan
from tpcore.checkpoint.untrusted.zip_directory import MAGIC, Record, read_directory


class InertStub:
    """Stands for a pickled object whose class is not wanted: keeps its state, does nothing."""

    pickled_name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.pickled_args = args
        self.pickled_state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> InertStub:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.pickled_state = state

    def __repr__(self) -> str:
        return f"<{self.pickled_name}>"


def _names(module: str, *names: str) -> list[str]:
    return [f"{module}.{name}" for name in names]


STUBBED = (
    # numpy's random state, and numbers left in args; the module was renamed in numpy 2
    *_names("numpy.core.multiarray", "_reconstruct", "scalar"),
    *_names("numpy._core.multiarray", "_reconstruct", "scalar"),
    *_names("numpy", "ndarray", "dtype"),
    *_names("numpy.dtypes", "UInt32DType", "Int64DType", "Float64DType"),
    # dynamic loss scaling, 2019-2020
    *_names("fp16.loss_scaler", "DynamicLossScaler", "LossScaler"),
    *_names("megatron.fp16.loss_scaler", "DynamicLossScaler", "LossScaler"),
    *_names("megatron.fp16_deprecated.loss_scaler", "DynamicLossScaler", "LossScaler"),
    # enums and settings in args
    *_names("megatron.model.enums", "ModelType", "AttnMaskType", "PositionEmbeddingType"),
    *_names("megatron.enums", "ModelType", "AttnMaskType", "PositionEmbeddingType"),
    *_names("megatron.core.enums", "ModelType"),
    *_names("megatron.core.transformer.enums", "ModelType", "AttnBackend", "AttnMaskType"),
    *_names("megatron.core.transformer.enums", "CudaGraphScope", "CudaGraphModule"),
    *_names("megatron.core.transformer.enums", "InferenceCudaGraphScope"),
    *_names("megatron.core.rerun_state_machine", "RerunDiagnostic", "RerunMode", "RerunState"),
    *_names("megatron.core.optimizer", "OptimizerConfig"),
    *_names("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
    # paths, signals, generators
    *_names("types", "SimpleNamespace"),
    *_names("pathlib", "PosixPath"),
    *_names("pathlib._local", "PosixPath"),
    *_names("signal", "Signals"),
    *_names("io", "BytesIO"),
    *_names("torch._C", "Generator"),
    # what Lightning keeps beside the weights: settings of the model, the state of its callbacks
    *_names("omegaconf.dictconfig", "DictConfig"),
    *_names("omegaconf.listconfig", "ListConfig"),
    *_names("omegaconf.base", "ContainerMetadata", "Metadata", "SCMode"),
    *_names("omegaconf.nodes", "AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "StringNode"),
    *_names("typing", "Any"),
    *_names("builtins", "dict", "list", "tuple", "str", "int", "float", "bool"),
    *_names("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    *_names("pytorch_lightning.callbacks.early_stopping", "EarlyStopping"),
    *_names("nemo.utils.exp_manager", "NeMoModelCheckpoint"),
    *_names("nemo.utils.callbacks.nemo_model_checkpoint", "NeMoModelCheckpoint"),
)
"""Names that may occur in a training checkpoint and that no weight depends on."""


def _inert_class(name: str) -> type[InertStub]:
    return type(name.rpartition(".")[2], (InertStub,), {"pickled_name": name})


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """What a defaultdict becomes: its factory is not kept."""
    return {}


_READ: dict[str, Any] = {
    # Objects that are read: attributes and items only, no behaviour.
    "argparse.Namespace": argparse.Namespace,
    "collections.defaultdict": _plain_dict,
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
    "lightning_fabric.utilities.data.AttributeDict": dict,
    "lightning.fabric.utilities.data.AttributeDict": dict,
}
_ALLOWED: list[Any] = [
    *((kind, name) for name, kind in _READ.items()),
    *((_inert_class(name), name) for name in STUBBED),
]
_LISTED = frozenset((*_READ, *STUBBED))

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5
"""Before torch 1.6: a magic number, a version, sizes of types, the object, keys of storages."""

_CHUNK_BYTES = 2**20


def load_pickle(path: Path, where: str | None = None) -> Any:
    """The object in a torch.save file, with tensors mapped from the file where its format allows.

    Both the zip format and the one before torch 1.6 are read; only the first can be mapped.

    Args:
        path: the file.
        where: what errors call it, if it was unpacked from another; None: its path.

    Raises:
        CheckpointError: the file cannot be opened, is truncated or damaged, or holds an object
            that is not on the list.
    """
    where = str(path) if where is None else where
    with _mapped(path, where) as data:
        is_zip = data[:4] == MAGIC
        if is_zip:
            _scan_zip(data, where)
        else:
            _scan_legacy(data, where)
    return _load(path, where, is_zip)


class FileRange:
    """Some bytes of a mapped file, in place of all of it."""

    def __init__(self, data: mmap.mmap, offset: int, size: int, where: str) -> None:
        if offset < 0 or size < 0 or offset + size > len(data):
            raise CheckpointError(
                f"{where}: lies at bytes {offset} to {offset + size}, but the file has {len(data)}"
            )
        self._data, self._offset, self._size = data, offset, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        return self._data[self._offset + start : self._offset + max(start, stop)]


def load_embedded(path: Path, offset: int, size: int, where: str) -> Any:
    """As `load_pickle`, of a zip file that is a range of another file; its tensors are read.

    Raises:
        CheckpointError: as `load_pickle`.
    """
    with _mapped(path, where) as data:
        content = FileRange(data, offset, size, where)
        if content[:4] != MAGIC:
            raise CheckpointError(f"{where}: not a readable torch checkpoint, truncated or damaged")
        _scan_zip(content, where)
    window = Window(os.open(path, os.O_RDONLY), offset, size)
    with cast(BinaryIO, io.BufferedReader(window)) as file:
        return _load(file, where, False)


def _load(file: Path | BinaryIO, where: str, mapped: bool) -> Any:
    try:
        with safe_globals(_ALLOWED), warnings.catch_warnings():
            # Advice for writers of pickles; what a reader needs to know is an error below.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError as error:
        raise CheckpointError(f"{where}: not enough memory to read it") from error
    except Exception as error:  # whatever a damaged file makes the reader raise
        # torch's own message advises weights_only=False; that advice is not repeated.
        detail = str(error).rsplit("WeightsUnpickler error:", 1)[-1]
        kind = "" if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: "
        raise CheckpointError(
            f"{where}: not a readable torch checkpoint, truncated, damaged or unsafe "
            f"({kind}{_first_line(detail)})"
        ) from error


def check_records(path: Path, where: str | None = None) -> None:
    """Compare every record of a torch zip file with its checksum; other files have none.

    Args:
        path: the file.
        where: what errors call it, if it was unpacked from another; None: its path.

    Raises:
        CheckpointError: names the record that differs.
    """
    where = str(path) if where is None else where
    with _mapped(path, where) as data:
        records = read_directory(data, where) if data[:4] == MAGIC else {}
    _compare(path, 0, records, where)


def check_embedded(path: Path, offset: int, size: int, where: str) -> None:
    """As `check_records`, of a zip file that is a range of another file.

    Raises:
        CheckpointError: names the record that differs.
    """
    with _mapped(path, where) as data:
        content = FileRange(data, offset, size, where)
        records = read_directory(content, where) if content[:4] == MAGIC else {}
    _compare(path, offset, records, where)


def _compare(path: Path, base: int, records: Mapping[str, Record], where: str) -> None:
    # Ordinary reads: mapped pages would count as memory of the process.
    with path.open("rb", buffering=0) as file:
        for name, record in records.items():
            if record.crc == 0:
                continue  # written without: torch.serialization.set_crc32_options(False)
            file.seek(base + record.offset)
            crc, left = 0, record.size
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            if crc != record.crc:
                raise CheckpointError(
                    f"{where}: is damaged: {name} differs from its checksum; copy or download it "
                    "again"
                )


def _mapped(path: Path, where: str) -> mmap.mmap:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # A pipe would wait for somebody to write into it.
            kind = "a directory" if path.is_dir() else "a pipe or a device"
            raise CheckpointError(f"{where}: is {kind}, not a file")
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except CheckpointError:
        raise
    except ValueError:
        raise CheckpointError(f"{where}: is empty, or truncated to nothing") from None
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be opened ({error.strerror})") from error


def _scan_zip(data: mmap.mmap | FileRange, where: str) -> None:
    records = read_directory(data, where)
    root = next(iter(records), "").partition("/")[0]
    pickled = records.get(f"{root}/data.pkl")
    if pickled is None or f"{root}/constants.pkl" in records:
        raise CheckpointError(f"{where}: is a zip file, but no torch checkpoint of tensors")
    if pickled.size > MAX_BYTES:
        raise CheckpointError(
            f"{where}: data.pkl has {pickled.size} bytes; at most {MAX_BYTES} are read"
        )

    def size(key: str) -> int | None:
        record = records.get(f"{root}/data/{key}")
        return None if record is None else record.size

    content = data[pickled.offset : pickled.offset + pickled.size]
    PickleScan(content, where, _LISTED, size).follow()


def _scan_legacy(data: mmap.mmap, where: str) -> None:
    # Every storage lies behind the pickles, so together they are smaller than the file.
    scan = PickleScan(data, where, _LISTED, lambda key: len(data))
    at = 0
    for index in range(_LEGACY_PICKLES):
        value, at = scan.follow(at)
        if index == 0 and value != _LEGACY_MAGIC:
            raise CheckpointError(f"{where}: not a readable torch checkpoint, truncated or damaged")
        if scan.storage_bytes > len(data):
            raise CheckpointError(
                f"{where}: claims {scan.storage_bytes} bytes of tensors, more than the file holds; "
                "it is truncated, damaged or hostile"
            )


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else "no message"
