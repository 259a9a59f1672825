"""Writing a checkpoint folder so that it is either complete or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tpcore.checkpoint.errors import CheckpointError


def pending(destination: Path) -> Path:
    """Where a folder is written before it gets its name: beside it, the same on every rank."""
    return destination.parent / f".{destination.name}.incomplete"


def prepare(destination: Path, *, replaceable: bool) -> Path:
    """Make the empty pending folder of a destination.

    Args:
        destination: a folder that does not exist, or is empty.
        replaceable: whether one that is there and not empty may be replaced.

    Raises:
        CheckpointError: the destination is taken or cannot be written.
    """
    taken = destination.exists() and not (destination.is_dir() and not any(destination.iterdir()))
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
    old = destination.parent / f".{destination.name}.replaced"
    try:
        if destination.exists():
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
