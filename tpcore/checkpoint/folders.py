"""Writing a checkpoint folder so that it is either complete or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tpcore.checkpoint.errors import CheckpointError

_ELSEWHERE = "choose another folder"


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


def discard(destination: Path) -> None:
    """Remove the pending folder of a write that failed."""
    shutil.rmtree(pending(destination), ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
