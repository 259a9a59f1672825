"""Formats that are written, under the names that users give: what fits, who writes which part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from tpcore.checkpoint import folders
from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.formats import (
    huggingface,
    megatron_dist,
    megatron_files,
    megatron_write,
    nemo,
    nemo_write,
)
from tpcore.checkpoint.state import CanonicalState
from tpcore.parallel.group import TensorParallelGroup

Format = Literal["megatron", "megatron-core", "nemo", "huggingface"]
FORMATS = ("megatron", "megatron-core", "nemo", "huggingface")

_ARCHIVE = ".archive"


def check_format(name: str) -> None:
    """Refuse a format that is none of `FORMATS`."""
    if name not in FORMATS:
        raise CheckpointError(f"format {name!r} cannot be written; use one of {', '.join(FORMATS)}")


def check_writable(state: CanonicalState, name: str, size: int) -> None:
    """Refuse what a format has no place for, before anything is written."""
    if name == "huggingface":
        huggingface.check_writable(state)
    elif name == "nemo":
        nemo_write.check_writable(state, size)
    else:
        megatron_write.check_writable(state, size, core=name == "megatron-core")


def prepare(destination: Path, name: str, overwrite: bool) -> None:
    """Make the pending folder; of what is there only a checkpoint is replaced."""
    folders.check_not_replaced(destination)
    replaceable = overwrite and (
        nemo.recognise(destination)
        if name == "nemo"
        else huggingface.recognise(destination)
        or megatron_files.recognise(destination)
        or megatron_dist.recognise(destination)
    )
    if overwrite and not replaceable and destination.exists() and not folders.is_empty(destination):
        raise CheckpointError(
            f"{destination}: is no checkpoint of that kind; only a checkpoint is overwritten"
        )
    folders.prepare(destination, replaceable=replaceable)


def write(
    state: CanonicalState,
    folder: Path,
    name: str,
    size: int,
    tp: TensorParallelGroup,
    tokenizer_files: Iterable[Path] = (),
) -> None:
    """Write this process's part. Reading is collective, so all of it is done before an error."""
    errors: list[Exception] = []
    # Each rank saves its own shard where it has it; otherwise rank 0 saves what all gather.
    own = name != "huggingface" and state.holds(tp.rank, size, state.padded_rows(size))
    for rank in [tp.rank] if own else range(1 if name == "huggingface" else size):
        writes = (own or tp.rank == 0) and not errors
        try:
            if name == "huggingface":
                huggingface.save(state, folder, write=writes)
            elif name == "nemo":
                nemo_write.save_rank(state, folder, size, rank, write=writes)
            else:
                core = name == "megatron-core"
                megatron_write.save_rank(state, folder, size, rank, core=core, write=writes)
        except Exception as error:
            if tp.size == 1:
                raise
            errors.append(error)
    if errors:
        raise errors[0]
    if tp.rank == 0 and name != "nemo":
        for file in tokenizer_files:
            shutil.copyfile(file, folder / file.name)


def finish(
    state: CanonicalState,
    folder: Path,
    name: str,
    size: int,
    tokenizer_files: Iterable[Path] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """What one process does when all have written their part."""
    if name == "nemo":
        nemo_write.save_extras(state, folder, size, tokenizer_files=tokenizer_files, config=config)
        nemo_write.pack(folder, folder / _ARCHIVE)


def publish(destination: Path, name: str) -> None:
    """Give what was written its name."""
    if name != "nemo":
        folders.publish(destination)
        return
    archive = folders.pending(destination) / _ARCHIVE
    try:
        with archive.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(archive, destination)
    except OSError as error:
        raise folders.unwritable(destination, error) from error
    folders.discard(destination)
