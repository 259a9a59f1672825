"""Reading torch.save files without executing anything that they contain.

`torch.load(weights_only=True)` does the work. Training checkpoints also pickle a few objects that
carry no weights (an argparse.Namespace, numpy random states, enums, a loss scaler). Those names,
and no others, are mapped to inert classes for the duration of one call: nothing is imported for
them and nothing of theirs runs. Any other name is refused, and the error says which.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from tpcore.checkpoint.errors import CheckpointError


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
)
"""Names that may occur in a training checkpoint and that no weight depends on."""


def _inert_class(name: str) -> type[InertStub]:
    return type(name.rpartition(".")[2], (InertStub,), {"pickled_name": name})


_ALLOWED: list[Any] = [
    # The one object that is read: attributes only, no behaviour.
    (argparse.Namespace, "argparse.Namespace"),
    *((_inert_class(name), name) for name in STUBBED),
]

_CHUNK_BYTES = 2**20

_REFUSED = (
    re.compile(r"Unsupported global: GLOBAL (\S+)"),
    re.compile(r"unsupported GLOBAL (\S+) whose module"),
    re.compile(r"Unsupported class (\S+)"),
)


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
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be opened ({error.strerror})") from error
    if is_zip and not _ends_as_zip(path):
        raise CheckpointError(f"{where}: the file is truncated; copy or download it again")
    try:
        with safe_globals(_ALLOWED), warnings.catch_warnings():
            # Advice for writers of pickles; what a reader needs to know is an error below.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(where, str(error))) from error
    except MemoryError as error:
        raise CheckpointError(f"{where}: not enough memory to read it") from error
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise CheckpointError(
            f"{where}: not a readable torch checkpoint, truncated or damaged "
            f"({type(error).__name__}: {_first_line(error)})"
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
    name = "its directory"
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename
                if entry.CRC == 0:
                    continue  # written without: torch.serialization.set_crc32_options(False)
                with archive.open(entry) as record:
                    while record.read(_CHUNK_BYTES):
                        pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise CheckpointError(
            f"{where}: is damaged: {name} differs from its checksum; copy or download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror})") from error


def _ends_as_zip(path: Path) -> bool:
    """Whether the directory that ends every zip archive is there."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _refusal(where: str, message: str) -> str:
    for pattern in _REFUSED:
        match = pattern.search(message)
        if match:
            name = match.group(1).rstrip(".,")
            return (
                f"{where}: refused to load the pickled object {name}, which is not on the list of "
                "harmless names; if you trust the file, save its tensors again without that object"
            )
    # torch's own message advises weights_only=False; that advice is not repeated.
    detail = message.rsplit("WeightsUnpickler error:", 1)[-1].strip().splitlines()
    return (
        f"{where}: not a readable torch checkpoint, truncated, damaged or unsafe "
        f"({detail[0][:200] if detail else 'empty pickle'})"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
