"""Collectives in shared memory, for CPU tensors of a group whose ranks share a host.

    channel = channel_of(group)             collective at the first call; None where gloo must do
    y = channel.all_reduce(x)               publish, wait, reduce
    y = channel.start_all_reduce(x)         publish; the caller computes something else
    channel.finish(y)                       wait, reduce

Sums are taken in rank order in the accumulation dtype, so every rank and every run gets the same
bits. The protocol stands in csrc/cpu/shm_channel.h.

The memory is a file in /dev/shm that never has a name: rank 0 opens it with O_TMPFILE, the others
by way of /proc. So nothing is left behind, whoever dies when. Its pages are allocated at once: a
file system that is too small is noticed here, and not by a bus error in the middle of a step. Each
rank holds a lock on the file as long as its process and its channel live.

Which groups use it is decided by all ranks together, at the first collective on a CPU tensor: they
must share a host, the compiled library must be there, and the memory must be large enough.
``TPCORE_SHARED_MEMORY=0`` or ``init_parallel(shared_memory=False)`` says no; 1 or True makes it an
error where it is not possible.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tpcore import _native
from tpcore.parallel.group import ParallelGroup

T = TypeVar("T")
logger = logging.getLogger(__name__)

REDUCED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_RANKS = 64
# Two halves for each rank. Large enough that a step costs little beside the copying, small enough
# that what one rank writes is still in a cache when the other reads it.
HALF_BYTES = 256 * 1024
_FOLDER = Path("/dev/shm")
_PAGE = 4096


class _Collective(IntEnum):
    """The numbers of csrc/include/tpcore/kernels.h."""

    SUM = 0
    MAX = 1
    REDUCE_SCATTER = 2
    ALL_GATHER = 3
    BROADCAST = 4


_REDUCTIONS = {"sum": _Collective.SUM, "max": _Collective.MAX}


class UnavailableError(RuntimeError):
    """A group cannot use shared memory; the message says why, in one line."""


class Channel:
    """One rank's end of the shared memory of a group; freed with the last reference to it.

    Tensors may have any strides; results are new and contiguous, of x's dtype. Every method is a
    collective. An exception leaves the channel unusable.

    Raises:
        RuntimeError: a rank has ended, has not come in time, or called something else; the message
            names it.
    """

    def __init__(self, segment: Tensor, lock: int, group: ParallelGroup, timeout_s: float) -> None:
        self._segment = segment
        self._member = (group.rank, group.size, lock, int(timeout_s * 1000))
        self._ranks = group.ranks
        self._pending: tuple[Tensor, Tensor, int] | None = None
        # The overloads themselves: to look for them costs as much as a small message.
        ops = torch.ops.tpcore
        self._publish, self._complete = ops.shm_publish.default, ops.shm_complete.default
        self._exchange_at_once = ops.shm_exchange.default
        self._close = weakref.finalize(self, os.close, lock)

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """The sum or maximum over the ranks."""
        x = _plain(x)
        return self._exchange(x, torch.empty_like(x), _REDUCTIONS[op])

    def all_reduce_in_place(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """The same, written over x, which must be contiguous."""
        x = x.detach() if x.requires_grad else x
        self._exchange(x, x, _REDUCTIONS[op])

    def start_all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Publish x and return the tensor that ``finish`` fills; x must stay as it is till then.

        Only one collective can be under way: the next one finishes it first. What is published at
        once is as much of x as fits into half a slot; ``finish`` exchanges the rest.
        """
        x = _plain(x)
        return self._start(x, torch.empty_like(x), _REDUCTIONS[op])

    def start_all_gather(self, x: Tensor) -> Tensor:
        """The same for ``all_gather``."""
        x = _plain(x)
        return self._start(x, self._gathered(x), _Collective.ALL_GATHER)

    def start_reduce_scatter(self, x: Tensor) -> Tensor:
        """The same for ``reduce_scatter``."""
        x = _plain(x)
        return self._start(x, self._scattered(x), _Collective.REDUCE_SCATTER)

    def finish(self, started: Tensor) -> bool:
        """Wait for the others and fill ``started``; False if nothing of the kind is under way."""
        if self._pending is None or self._pending[1] is not started:
            return False
        self._finish_pending()
        return True

    def all_gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, one after the other along dim 0."""
        x = _plain(x)
        return self._exchange(x, self._gathered(x), _Collective.ALL_GATHER)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This rank's slice of dim 0 of the sum over the ranks."""
        x = _plain(x)
        return self._exchange(x, self._scattered(x), _Collective.REDUCE_SCATTER)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The tensor of the rank ``source`` of the group."""
        x = _plain(x)
        return self._exchange(x, torch.empty_like(x), _Collective.BROADCAST, source)

    def _gathered(self, x: Tensor) -> Tensor:
        return x.new_empty((self._member[1] * x.shape[0], *x.shape[1:]))

    def _scattered(self, x: Tensor) -> Tensor:
        return x.new_empty((x.shape[0] // self._member[1], *x.shape[1:]))

    def _start(self, x: Tensor, out: Tensor, collective: int) -> Tensor:
        self._finish_pending()
        self._call(self._publish, x, out, collective)
        self._pending = x, out, collective
        return out

    def _finish_pending(self) -> None:
        if self._pending is not None:
            x, out, collective = self._pending
            self._pending = None
            self._call(self._complete, x, out, collective)

    def _exchange(self, x: Tensor, out: Tensor, collective: int, source: int = 0) -> Tensor:
        if self._pending is not None:
            self._finish_pending()
        try:
            self._exchange_at_once(x, out, self._segment, collective, source, *self._member)
        except RuntimeError as error:
            raise self._explained(error) from None
        return out

    def _call(self, op: Any, x: Tensor, out: Tensor, collective: int) -> None:
        try:
            op(x, out, self._segment, collective, 0, *self._member)
        except RuntimeError as error:
            raise self._explained(error) from None

    def _explained(self, error: RuntimeError) -> RuntimeError:
        # Without the place in the source that the check writes before it.
        message = re.sub(r"^\w+, \S+:\d+, ", "", str(error).splitlines()[0])
        return RuntimeError(
            f"shared-memory collective: {message} (this is rank {self._member[0]}; the global "
            f"ranks of the group are {list(self._ranks)})"
        )


def _plain(x: Tensor) -> Tensor:
    return (x.detach() if x.requires_grad else x).contiguous()


def open_channel(group: ParallelGroup, half_bytes: int | None = None) -> Channel:
    """Make the shared memory of a group and attach to it; collective over the group.

    Args:
        group: two or more ranks.
        half_bytes: size of half a slot, in whole pages; None: HALF_BYTES.

    Raises:
        UnavailableError: it cannot be done; on every rank, with the same message.
    """
    num_bytes = -(-128 * group.size // _PAGE) * _PAGE + 2 * group.size * (half_bytes or HALF_BYTES)
    with ExitStack() as undo:

        def create() -> tuple[int, int]:
            if group.rank != 0:
                return 0, 0
            file = _allocate(num_bytes)
            undo.callback(os.close, file)
            return os.getpid(), file

        def attach() -> None:
            file = number
            if group.rank != 0:
                file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
                undo.callback(os.close, file)
            segment = torch.from_file(f"/proc/self/fd/{file}", True, num_bytes, dtype=torch.uint8)
            # Not before: closing any other descriptor of the file, as from_file does, unlocks it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, group.rank)
            attached.append((segment, file))

        if len(set(_together(group, partial(_host, group.size)))) > 1:
            raise UnavailableError("the ranks run on several hosts or in several containers")
        process, number = _together(group, create)[0]
        attached: list[tuple[Tensor, int]] = []
        _together(group, attach)
        undo.pop_all()
    return Channel(*attached[0], group, _timeout_s(group))


def _together(group: ParallelGroup, action: Callable[[], T]) -> list[T]:
    """What ``action`` returns on each rank; if it fails on one, every rank raises."""
    own: tuple[Any, str] = None, ""
    try:
        own = action(), ""
    except (OSError, RuntimeError) as error:
        own = None, f"rank {group.rank}: {str(error).splitlines()[0]}"
    every: list[Any] = [None] * group.size
    dist.all_gather_object(every, own, group=group.process_group)
    for _, problem in every:
        if problem:
            raise UnavailableError(problem)
    return [value for value, _ in every]


def _host(size: int) -> str:
    """Names what ranks must have in common to see each other's files."""
    if sys.platform != "linux":
        raise UnavailableError(f"it needs Linux, and this is {sys.platform}")
    if "shm_exchange" not in _native.NATIVE_OPS.get("cpu", ()):
        reason = _native.status("cpu").reason or "it is older than this version of tpcore"
        raise UnavailableError(f"the compiled CPU library is missing: {reason}")
    if size > MAX_RANKS:
        raise UnavailableError(f"it serves at most {MAX_RANKS} ranks, and there are {size}")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _allocate(num_bytes: int) -> int:
    """An open file without a name, all of whose pages exist."""
    free = os.statvfs(_FOLDER)
    free_bytes = free.f_bavail * free.f_frsize
    if free_bytes < num_bytes:
        raise UnavailableError(
            f"{_FOLDER} has {free_bytes / 2**20:.1f} MiB free, and {num_bytes / 2**20:.1f} MiB are "
            "needed; in a container, raise --shm-size"
        )
    file = os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except BaseException:
        os.close(file)
        raise
    return file


def _timeout_s(group: ParallelGroup) -> float:
    assert group.process_group is not None
    backend = group.process_group._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


# --- Which groups use it

# Weak: a channel lives as long as its process group, and holds none alive.
_CHANNELS: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel | None]
_CHANNELS = weakref.WeakKeyDictionary()


def channel_of(group: ParallelGroup) -> Channel | None:
    """The channel of a group of two or more ranks, or None if its CPU tensors go through gloo.

    The first call for a process group is collective: all ranks decide together.

    Raises:
        ValueError: shared memory was asked for and is not possible, or the environment variable is
            not 0, 1 or auto.
    """
    assert group.process_group is not None
    try:
        return _CHANNELS[group.process_group]
    except KeyError:
        channel = _CHANNELS[group.process_group] = _decide(group)
        return channel


def finish(started: Tensor) -> bool:
    """Let the channel under which this collective is under way finish it; False if none is."""
    return any(channel is not None and channel.finish(started) for channel in _CHANNELS.values())


def _wish(group: ParallelGroup) -> bool | None:
    if group.shared_memory is not None:
        return group.shared_memory
    value = os.environ.get("TPCORE_SHARED_MEMORY", "auto")
    if value not in _WISHES:
        raise ValueError(f"TPCORE_SHARED_MEMORY is {value!r}; expected auto, 1 or 0")
    return _WISHES[value]


_WISHES = {"auto": None, "1": True, "0": False}


def _decide(group: ParallelGroup) -> Channel | None:
    wishes: list[bool | None] = [None] * group.size
    dist.all_gather_object(wishes, _wish(group), group=group.process_group)
    if False in wishes:
        return None
    try:
        return open_channel(group)
    except UnavailableError as error:
        if True in wishes:
            raise ValueError(
                f"shared memory was asked for and is not possible: {error}; leave the choice to "
                "tpcore (shared_memory=None, TPCORE_SHARED_MEMORY=auto) to go on with gloo"
            ) from None
        if group.rank == 0:
            logger.warning(
                "collectives of ranks %s go through gloo, not shared memory: %s",
                list(group.ranks),
                error,
            )
        return None
