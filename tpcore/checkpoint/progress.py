"""Watching a long conversion: a progress bar, and a remark on weights that are no numbers."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tpcore.checkpoint.names import listing
from tpcore.checkpoint.state import CanonicalState, sharding_of
from tpcore.checkpoint.stored import Box, StoredTensor
from tpcore.parallel.sharding import Sharded

logger = logging.getLogger(__name__)

SHOWN_FROM_BYTES = 256 * 2**20
"""Smaller conversions are over before a bar is of use."""

_PIECE = 2**20


@contextmanager
def watched(state: CanonicalState, size: int, label: str) -> Iterator[CanonicalState]:
    """The state, with every tensor that is read counted and looked at.

    Args:
        state: what is going to be read once, by each of `size` ranks.
        size: how many ranks' shards are made.
        label: stands before the bar, which is shown on a terminal if `rich` is installed.
    """
    total = 0
    for name, tensor in state.tensors.items():
        times = 1 if isinstance(sharding_of(name), Sharded) else size
        total += times * math.prod(tensor.shape) * tensor.dtype.itemsize
    strange: dict[str, None] = {}
    with _bar(label, total) as advance:

        def seen(name: str, tensor: Tensor) -> Tensor:
            advance(tensor.numel() * tensor.element_size())
            if not _is_finite(tensor):
                strange[name] = None
            return tensor

        tensors = {name: _observed(name, t, seen) for name, t in state.tensors.items()}
        yield dataclasses.replace(state, tensors=tensors)
    if strange:
        logger.warning(
            "%s: not all weights are finite numbers: %s; they are copied as they are",
            state.source.path,
            listing(strange),
        )


def _is_finite(tensor: Tensor) -> bool:
    """In pieces: `isfinite` needs more memory than what it looks at."""
    return all(bool(p.isfinite().all()) for p in tensor.reshape(-1).split(_PIECE))


def _observed(
    name: str, tensor: StoredTensor, seen: Callable[[str, Tensor], Tensor]
) -> StoredTensor:
    read_box = tensor.read_box
    if read_box is None:
        return StoredTensor(tensor.shape, tensor.dtype, lambda: seen(name, tensor.read()))

    def box(part: Box) -> Tensor:
        return seen(name, read_box(part))

    return StoredTensor(tensor.shape, tensor.dtype, lambda: seen(name, tensor.read()), box)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], Any]]:
    if total < SHOWN_FROM_BYTES or not sys.stderr.isatty():
        yield lambda count: None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield lambda count: None
        return
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
