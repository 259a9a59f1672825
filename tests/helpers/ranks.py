"""Run a test body on several ranks, in a pool of processes that lives as long as the test session.

    def _check_something(tp, hidden_size):      # module-level; tp: TensorParallelGroup of that size
        assert ...

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_something(size):
        run_ranks(_check_something, size, 64)

Starting ranks costs seconds (nearly all of it is ``import torch``), so four of them are started
once and given (function, arguments) over a pipe. The rank that failed first is the one reported:
when it dies, the others usually fail too, with a "connection closed" that hides the cause. After a
failure or a timeout the pool is killed; the next call starts a new one. The rendezvous is a file,
so no port is used.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

POOL_SIZE = 4
TIMEOUT_S = 180.0
START_TIMEOUT_S = 180.0
# How long the others may take to report after one rank has failed: clocks decide who was first.
_GRACE_S = 2.0


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """Call ``function(tp, *args)`` on ``size`` ranks; the results in rank order.

    Args:
        function: a module-level function; ``tp`` is its TensorParallelGroup, single() for size 1.
        size: 1, 2 or 4.
        args: anything that pickles; every rank gets its own copy.
        timeout_s: after so long the ranks are killed and the test fails.
    """
    return _run(function, size, None, args, timeout_s)


def run_mesh(
    function: Callable[..., Any],
    tp_size: int,
    dp_size: int,
    *args: Any,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """Call ``function(tp, dp, *args)`` on a mesh of tp_size * dp_size ranks, at most 4."""
    return _run(function, tp_size, dp_size, args, timeout_s)


@dataclass(frozen=True)
class _Task:
    module: str
    file: str
    function: str
    tp_size: int
    dp_size: int | None
    args: bytes
    path: list[str]


@dataclass(frozen=True)
class _Reply:
    status: str  # "ok", "skip" or "error"
    value: bytes | str
    finished_at: float


class _Pool:
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="tpcore-ranks-")
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(POOL_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.folder.name, theirs, sys.path), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        for rank, connection in enumerate(self.connections):
            try:
                if connection.poll(START_TIMEOUT_S):
                    connection.recv()
                    continue
                problem = f"did not start within {START_TIMEOUT_S:g} s"
            except (EOFError, OSError):
                problem = "died while starting"
            self.close()
            raise AssertionError(f"rank {rank} of the pool of {POOL_SIZE} {problem}")

    def stack_of(self, rank: int) -> str:
        """What a hung rank is doing, from its faulthandler."""
        process = self.processes[rank]
        if process.pid is None or not process.is_alive() or not hasattr(signal, "SIGUSR1"):
            return ""
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return _stack_file(self.folder.name, rank).read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()
        self.folder.cleanup()


_pool: _Pool | None = None


def close_pool() -> None:
    """End the processes; the next run_ranks starts new ones."""
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None


atexit.register(close_pool)


def _run(
    function: Callable[..., Any],
    tp_size: int,
    dp_size: int | None,
    args: tuple[Any, ...],
    timeout_s: float,
) -> list[Any]:
    global _pool
    size = tp_size * (dp_size or 1)
    if size > POOL_SIZE or tp_size not in (1, 2, 4) or (dp_size or 1) not in (1, 2, 4):
        raise ValueError(
            f"tp_size={tp_size}, dp_size={dp_size}: expected 1, 2 or 4 each and at most "
            f"{POOL_SIZE} ranks"
        )
    if "<" in function.__qualname__ or "." in function.__qualname__:
        raise ValueError(
            f"{function.__qualname__} must be a module-level function: ranks import it by name"
        )
    task = _Task(
        function.__module__,
        inspect.getfile(function),
        function.__qualname__,
        tp_size,
        dp_size,
        pickle.dumps(args),
        list(sys.path),
    )
    if _pool is None:
        _pool = _Pool()
    try:
        replies = _exchange(_pool, task, size, timeout_s)
    except BaseException:
        close_pool()
        raise
    skipped = [reply.value for reply in replies if reply.status == "skip"]
    if skipped:
        pytest.skip(str(skipped[0]))
    return [pickle.loads(reply.value) for reply in replies]  # type: ignore[arg-type]


def _exchange(pool: _Pool, task: _Task, size: int, timeout_s: float) -> list[_Reply]:
    ranks = {pool.connections[rank]: rank for rank in range(size)}
    replies: dict[int, _Reply] = {}
    for connection, rank in ranks.items():
        try:
            connection.send(task)
        except OSError:
            raise AssertionError(
                f"rank {rank} of {size} is dead: exit code {pool.processes[rank].exitcode}"
            ) from None
    deadline = time.monotonic() + timeout_s
    failed = False
    while len(replies) < size:
        waiting = [connection for connection, rank in ranks.items() if rank not in replies]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = ranks[connection]  # type: ignore[index]
            try:
                reply = connection.recv()  # type: ignore[union-attr]
            except (EOFError, OSError):
                pool.processes[rank].join(5)
                reply = _Reply(
                    "error",
                    f"the process died with exit code {pool.processes[rank].exitcode}",
                    time.time(),
                )
            replies[rank] = reply
            if reply.status == "error" and not failed:
                failed = True
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    errors = sorted(
        (reply.finished_at, rank) for rank, reply in replies.items() if reply.status == "error"
    )
    if errors:
        rank = errors[0][1]
        raise AssertionError(f"rank {rank} of {size} failed first:\n{replies[rank].value}")
    if len(replies) < size:
        hung = next(rank for rank in range(size) if rank not in replies)
        raise AssertionError(
            f"rank {hung} of {size} did not finish {task.function} within {timeout_s:g} s; it was "
            f"at:\n{pool.stack_of(hung)}"
        )
    return [replies[rank] for rank in range(size)]


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"stack-of-rank-{rank}.txt")


def _serve(rank: int, folder: str, connection: Connection, path: list[str]) -> None:
    """The life of one rank."""
    sys.path[:] = path
    os.environ["OMP_NUM_THREADS"] = "1"
    if sys.platform == "linux":
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", "lo"
        )  # host names of build machines often do not resolve
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if os.environ.get("TPCORE_TEST_DEVICE"):
        torch.set_default_device(os.environ["TPCORE_TEST_DEVICE"])
    stack_file = open(_stack_file(folder, rank), "w")  # noqa: SIM115 - open as long as the process
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=stack_file)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.device_count() >= POOL_SIZE else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=POOL_SIZE,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    # Sizes 1, 2 and 4 in any mesh need no other groups than these.
    members = ([0, 1], [2, 3], [0, 2], [1, 3], [0, 1, 2, 3])
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in members}
    connection.send("ready")
    while True:
        try:
            task = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        connection.send(_answer(task, rank, groups))


def _answer(task: _Task, rank: int, groups: dict[tuple[int, ...], Any]) -> _Reply:
    import torch

    from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup

    def group(kind: Any, ranks: range) -> Any:
        return kind.single() if len(ranks) == 1 else kind.from_process_group(groups[tuple(ranks)])

    try:
        sys.path[:] = task.path
        torch.manual_seed(0)
        first = rank - rank % task.tp_size
        arguments = [group(TensorParallelGroup, range(first, first + task.tp_size))]
        if task.dp_size is not None:
            world = task.tp_size * task.dp_size
            arguments.append(
                group(DataParallelGroup, range(rank % task.tp_size, world, task.tp_size))
            )
        value = _find(task)(*arguments, *pickle.loads(task.args))
        return _Reply("ok", pickle.dumps(value), time.time())
    except pytest.skip.Exception as skipped:
        return _Reply("skip", str(skipped), time.time())
    except BaseException:
        return _Reply("error", traceback.format_exc(), time.time())


def _find(task: _Task) -> Callable[..., Any]:
    """The test's function, whichever import mode pytest gave its module its name in."""
    module = sys.modules.get(task.module)
    if module is None and task.module != "__main__":
        try:
            module = importlib.import_module(task.module)
        except ImportError:
            module = None
    if module is None or not os.path.samefile(module.__file__ or os.devnull, task.file):
        spec = importlib.util.spec_from_file_location(task.module, task.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[task.module] = module
        spec.loader.exec_module(module)
    return getattr(module, task.function)
