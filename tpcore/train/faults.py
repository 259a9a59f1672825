"""What can end a run before its end: signals, numbers that are none, ranks that hang.

A signal does not end a rank at once: the ranks agree on it at the end of a step, save, and stop
together with the status that a shell gives for it, 128 + its number. A rank that makes no progress
is found by a thread on each of the others (`Watchdog`), which works under every backend.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from tpcore.train.launch import FAILED, environment_int, is_under_torchrun

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SECOND_AFTER_S = 5.0
"""Ctrl-C reaches a rank from the terminal and again from its launcher: that counts once."""

_LINE_FIRST_S = 3.0
"""How long ranks wait before they end, so that the line of the one that speaks comes first."""


class DivergedError(RuntimeError):
    """Loss or gradient is not a finite number; there is nothing to go on with."""


class StoppedError(RuntimeError):
    """The run has saved its state and ended because of a signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """As a shell has it."""
        return 128 + self.number


class StopSignals:
    """SIGTERM and SIGINT as flags, inside a `with` block; in the main thread only.

    A second one of the same kind ends the process, as without the block.
    """

    def __init__(self) -> None:
        self.received: dict[int, float] = {}
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def flags(self) -> list[float]:
        """1 for each of `SIGNALS` that has come, else 0."""
        return [float(number in self.received) for number in SIGNALS]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self.received.setdefault(number, now)
        if first == now or (is_under_torchrun() and now - first < _SECOND_AFTER_S):
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os._exit(128 + number)


def agreed_signal(flags: Sequence[float]) -> int | None:
    """The signal that a sum of `StopSignals.flags` over ranks stands for."""
    return next((int(n) for n, flag in zip(SIGNALS, flags, strict=True) if flag), None)


class Watchdog:
    """Ends a run in which a rank hangs, and says which.

    Every rank's thread publishes whether it lives and, when its main thread has made no progress
    for a while, whether that waits in a collective or does something else. When `timeout_s` is
    over, the ranks that do not wait for others are the ones that are waited for.

    Args:
        store: key-value store of all ranks, for this thread alone; None: a single process, where
            nobody waits.
        rank: of this process in the world.
        describe: what a rank is, for messages: "rank 3 (tensor-parallel 1, data-parallel 1)".
        timeout_s: of collectives without progress; hung ranks are named after half of it.
        end: called in place of ending the process, with the message on the first of the ranks that
            wait, with an empty one on the others.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        describe: Sequence[str],
        timeout_s: float,
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._store, self._rank, self._describe = store, rank, describe
        self._timeout_s = timeout_s
        self._interval_s = min(5.0, timeout_s / 20)
        self._end = end or _end_process
        self._what = "start"
        self._since = time.monotonic()
        self._main = threading.get_ident()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._count = 0

    def beat(self, what: str) -> None:
        """Progress: the main thread begins `what`."""
        self._what, self._since = what, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._store is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(self._interval_s + 1)

    def _watch(self) -> None:
        try:
            self._publish(0.0)
            while not self._stopped.wait(self._interval_s):
                stalled_s = time.monotonic() - self._since
                self._publish(stalled_s)
                # Early enough to be heard before the others' collectives give up.
                if stalled_s > self._timeout_s / 2:
                    hung = self._find_hung(stalled_s)
                    if hung and not self._stopped.is_set():
                        others = [rank for rank in range(len(self._describe)) if rank not in hung]
                        self._end(_message(hung, stalled_s) if self._rank in others[:1] else "")
                        return
        except RuntimeError:
            return  # the store has gone, and with it the launcher: whoever ended it says why

    def _publish(self, stalled_s: float) -> None:
        self._count += 1
        record = {
            "count": self._count,
            "stalled_s": stalled_s,
            "what": self._what,
            "where": _where(self._main),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._store.set(f"tpcore/watchdog/{self._rank}", json.dumps(record))

    def _find_hung(self, stalled_s: float) -> dict[int, str]:
        """The ranks that are waited for, and what can be said of each."""
        before = self._records()
        if self._stopped.wait(2.5 * self._interval_s):
            return {}
        self._publish(stalled_s)
        after = self._records()
        silent, busy = {}, {}
        for rank, name in enumerate(self._describe):
            old, new = before.get(rank), after.get(rank)
            if new is None:
                silent[rank] = f"{name} has not begun"
                continue
            place = f"{name}, process {new['pid']} on {new['host']}"
            if rank != self._rank and old is not None and old["count"] == new["count"]:
                silent[rank] = f"{place}, does not answer; last seen at {new['what']}"
            elif new["where"] is not None and new["stalled_s"] > self._interval_s:
                busy[rank] = f"{place}, hangs at {new['what']} in {new['where']}"
        return silent or busy

    def _records(self) -> dict[int, dict[str, Any]]:
        records = {}
        for rank in range(len(self._describe)):
            key = f"tpcore/watchdog/{rank}"
            if self._store.check([key]):
                records[rank] = json.loads(self._store.get(key))
        return records


def _message(hung: Mapping[int, str], stalled_s: float) -> str:
    return f"no progress for {stalled_s:.0f} s: {'; '.join(hung.values())}"


def _where(thread: int) -> str | None:
    """Where a thread is, innermost first; None: in a collective, waiting for others."""
    frame = sys._current_frames().get(thread)
    stack = traceback.extract_stack(frame) if frame is not None else []
    waiting = ("/torch/distributed/", "/tpcore/parallel/")
    if any(part in entry.filename for entry in stack for part in waiting):
        return None
    # A collective of the backward is called by autograd, below torch's own frames.
    if not stack or "/torch/" in stack[-1].filename:
        return None
    return f"{Path(stack[-1].filename).name}:{stack[-1].lineno}"


def _end_process(message: str) -> None:
    if message:
        print(f"tpcore: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(_LINE_FIRST_S)
    os._exit(FAILED)


def watchdog_store() -> Any:
    """A connection to the store of the process group, for one more thread; None: there is none."""
    if environment_int("WORLD_SIZE", 1) == 1:
        return None
    import torch.distributed as dist

    if not dist.is_initialized():
        return None
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def describe_ranks(tp_size: int, dp_size: int) -> list[str]:
    """What each rank of the world is."""
    return [
        f"rank {rank} (tensor-parallel {rank % tp_size}, data-parallel {rank // tp_size})"
        for rank in range(tp_size * dp_size)
    ]


def write_diverged(path: Path, record: Mapping[str, Any]) -> None:
    """What led to a DivergedError, for whoever looks for the cause."""
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
