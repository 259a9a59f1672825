"""Writing a checkpoint folder so that it is either complete or not there, by one process or all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError

from tpcore.checkpoint.errors import CheckpointError
from tpcore.parallel.collectives import all_reduce, barrier
from tpcore.parallel.group import TensorParallelGroup

_ELSEWHERE = "choose another folder"
_ALMOST_FULL_BYTES = 64 * 2**20


def check_apart(destination: Path, source: Path, files: Iterable[Path] = ()) -> None:
    """Refuse to write into what is being read, or over it, whatever links lead there.

    Args:
        destination: the folder to make.
        source: the folder or file that is read.
        files: what `source` consists of, which links may have put elsewhere.

    Raises:
        CheckpointError: one of the two holds the other.
    """
    target, origin = destination.resolve(), source.resolve()
    if target != origin and target.is_relative_to(origin):
        raise CheckpointError(f"{destination}: lies inside the source {source}; {_ELSEWHERE}")
    # The two folders beside a destination are emptied too.
    for folder in (target, pending(target), _replaced(target)):
        for file in (origin, *(file.resolve() for file in files)):
            if file.is_relative_to(folder):
                raise CheckpointError(f"{folder}: holds the source {source}; {_ELSEWHERE}")


def pending(destination: Path) -> Path:
    """Where a folder is written before it gets its name: beside it, the same on every rank."""
    return destination.parent / f".{destination.name}.incomplete"


def _replaced(destination: Path) -> Path:
    """Where the old folder is while the new one takes its name."""
    return destination.parent / f".{destination.name}.replaced"


def check_not_replaced(path: Path) -> None:
    """Say where an old folder is, if a process was killed while it was being replaced.

    Raises:
        CheckpointError: it is.
    """
    old = _replaced(path)
    if old.is_dir() and not path.exists():
        raise CheckpointError(
            f"{path}: was being replaced when a process was killed; what was there is now called "
            f"{old}: rename it back"
        )


def is_empty(path: Path) -> bool:
    """Whether it is a folder that holds nothing."""
    return path.is_dir() and not any(path.iterdir())


def prepare(destination: Path, *, replaceable: bool) -> Path:
    """Make the empty pending folder of a destination.

    Args:
        destination: a folder that does not exist, or is empty.
        replaceable: whether one that is there and not empty may be replaced.

    Raises:
        CheckpointError: the destination is taken or cannot be written.
    """
    taken = destination.exists() and not is_empty(destination)
    if taken and not replaceable:
        raise CheckpointError(
            f"{destination}: exists already; choose another path, or pass overwrite to replace a "
            "checkpoint"
        )
    folder = pending(destination)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error.strerror})") from error
    return folder


def publish(destination: Path) -> None:
    """Give the pending folder its name, in place of what was there."""
    old = _replaced(destination)
    try:
        if destination.exists():
            _sync(pending(destination))  # on disk before what it replaces goes
            if old.exists():
                shutil.rmtree(old)
            os.replace(destination, old)
        os.replace(pending(destination), destination)
    except OSError as error:
        if old.exists() and not destination.exists():
            os.replace(old, destination)
        raise CheckpointError(f"{destination}: cannot be written ({error.strerror})") from error
    shutil.rmtree(old, ignore_errors=True)


_publish = publish


def discard(destination: Path) -> None:
    """Remove the pending folder of a write that failed."""
    shutil.rmtree(pending(destination), ignore_errors=True)


def write_together(
    destination: Path,
    tp: TensorParallelGroup,
    device: torch.device,
    *,
    prepare: Callable[[], object],
    write: Callable[[Path], None],
    finish: Callable[[Path], None] | None = None,
    publish: Callable[[], None] | None = None,
) -> None:
    """Make a folder to which every rank of a group contributes: all of it, or nothing.

    A failure on one rank is an error on all of them, and leaves the destination as it was.

    Args:
        destination: the folder to make.
        tp: the ranks, all of which call this.
        device: where they communicate.
        prepare: makes the pending folder; called on rank 0 only.
        write: writes this rank's part into the folder that it is given; called on every rank.
        finish: writes what needs the parts of all ranks; called on rank 0 only.
        publish: gives what was written its name; None: that of the folder.

    Raises:
        CheckpointError: a step failed here or on another rank.
    """
    folder = pending(destination)
    steps: list[tuple[Callable[[], object], bool]] = [
        (prepare, True),
        (lambda: write(folder), False),
        (lambda: finish and finish(folder), True),
        (publish or (lambda: _publish(destination)), True),
    ]
    for step, only_first in steps:
        error = None if only_first and tp.rank != 0 else _attempt(step, destination)
        # The reduction also makes every rank wait for the others.
        failed = torch.tensor([float(error is not None)], device=device)
        if all_reduce(failed, tp, "max").item():
            # Only what this call made: a destination that could not be prepared is not touched.
            if tp.rank == 0 and step is not prepare:
                discard(destination)
            barrier(tp)  # nobody sees the error before the remains are gone
            raise error or CheckpointError(f"{destination}: another rank could not write its part")


def _attempt(step: Callable[[], object], destination: Path) -> CheckpointError | None:
    try:
        step()
    except CheckpointError as error:
        return error
    except (OSError, RuntimeError, SafetensorError) as error:
        failure = unwritable(destination, error)
        failure.__cause__ = error
        return failure
    return None


def unwritable(destination: Path, error: Exception) -> CheckpointError:
    """The one line that says why a folder cannot be written."""
    return CheckpointError(f"{destination}: cannot be written ({_reason(destination, error)})")


def _reason(destination: Path, error: Exception) -> str:
    """What the system says; torch and safetensors hide it in texts of their own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    code = re.search(r"os error (\d+)", text)
    if code:
        return os.strerror(int(code.group(1)))
    if "inline_container" in text or "PytorchStreamWriter" in text:
        free = shutil.disk_usage(_existing(destination)).free
        if free < _ALMOST_FULL_BYTES:
            return f"{os.strerror(errno.ENOSPC)}: {free:,} bytes are free"
        return "a file could not be written whole; the disk is full, or limits the size of files"
    return text.splitlines()[0] if text else type(error).__name__


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _sync(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
