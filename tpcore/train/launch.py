"""Ranks: starting them, the threads of each, and what happens when one of them fails.

The error protocol: what a user did wrong ends in one line `tpcore: error: ...` on standard error
and exit status 2. Under torchrun every rank meets the mistake, or hears of it in `on_all_ranks`;
rank 0 prints the line and leaves first, the others are silent, so the line comes before whatever
torchrun has to say about it.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup

T = TypeVar("T")

USAGE_ERROR = 2
FAILED = 1
INTERRUPTED = 130
PATIENCE_S = 30.0
"""How long a silent rank waits to be ended by torchrun after rank 0 has left."""
_LOST_PATIENCE_S = 2.0
"""The same after another rank has gone: its end is the cause, and is to be found first."""

_LAUNCHED = "TPCORE_LAUNCHED"
"""Set for ranks that `launch` started: it tells how they ended, so they need not."""

_LOST = re.compile(
    r"gloo/transport|connection (was )?(closed|reset)|NCCL.*(remote|abort)|"
    r"shared-memory collective: .* (ended|missing|not come|earlier collective)",
    re.IGNORECASE,
)
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class RankError(ValueError):
    """Another rank could not go on; the message is that rank's."""


def environment_int(name: str, default: int) -> int:
    """An integer that torchrun has put into the environment."""
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def is_under_torchrun() -> bool:
    """Whether this process is a rank that torchrun started."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def report_error(message: str, status: int = USAGE_ERROR) -> int:
    """Print the line of the protocol; returns `status`.

    Ranks above 0 wait to be ended. One that nobody ends met the error alone, and says so.
    """
    rank = environment_int("RANK", 0)
    if rank > 0:
        time.sleep(PATIENCE_S)
        message = f"rank {rank}: {message}"
    print(f"tpcore: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def report_interrupt() -> int:
    """End after Ctrl-C: one line from whoever was started by the user; returns the status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a launcher passes on what all have heard
    if is_under_torchrun() and (environment_int("RANK", 0) > 0 or os.environ.get(_LAUNCHED)):
        # Nobody waits for the others here, nor do destructors of the process group.
        sys.stdout.flush()
        os._exit(INTERRUPTED)
    return report_error("interrupted", INTERRUPTED)


def report_stopped(message: str, number: int) -> int:
    """End after the ranks have saved because of a signal; returns 128 + its number."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)  # a launcher passes on what all have heard
    if environment_int("RANK", 0) == 0 and not os.environ.get(_LAUNCHED):
        report_error(message, FAILED)
    if is_under_torchrun():
        sys.stdout.flush()
        os._exit(128 + number)
    return 128 + number


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return environment_int("WORLD_SIZE", 1) > 1 and _LOST.search(str(error)) is not None


def report_lost_rank() -> int:
    """End because another rank has gone, which has said why or was killed; returns the status."""
    if environment_int("RANK", 0) == 0 and not os.environ.get(_LAUNCHED):
        report_error("another rank has ended; see above, or it was killed", FAILED)
    time.sleep(_LOST_PATIENCE_S)
    return FAILED


def on_all_ranks(action: Callable[[], T], tp: TensorParallelGroup, dp: DataParallelGroup) -> T:
    """`action()`, where a failure on one rank fails all of them: nobody is left waiting.

    `action` must not communicate.

    Raises:
        ValueError: what this rank's action raised, or a RankError with the message of the first
            rank whose action failed.
    """
    import torch.distributed as dist

    result: list[T] = []
    error: ValueError | OSError | None = None
    try:
        result.append(action())
    except (ValueError, OSError) as caught:
        error = caught
    own_rank = dp.rank * tp.size + tp.rank
    failures: dict[int, str] = {} if error is None else {own_rank: str(error)}
    for group in (tp, dp):
        if group.size > 1:
            gathered: list[dict[int, str]] = [{}] * group.size
            dist.all_gather_object(gathered, failures, group=group.process_group)
            failures = {rank: text for part in gathered for rank, text in part.items()}
    if failures and (error is None or own_rank != min(failures)):
        raise RankError(f"rank {min(failures)}: {failures[min(failures)]}") from error
    if error is not None:
        raise error
    return result[0]


def of_first_rank(value: T, tp: TensorParallelGroup, dp: DataParallelGroup) -> T:
    """The value of the first rank of all, on every rank; it travels as a pickle."""
    import torch.distributed as dist

    for group in (dp, tp):
        if group.size > 1:
            gathered = [value] * group.size
            dist.all_gather_object(gathered, value, group=group.process_group)
            value = gathered[0]
    return value


def num_cores() -> int:
    """Cores that this process may use: its affinity, or less under a container's CPU quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = count or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no such file outside of cgroup v2: there is no quota to read
    return count


def check_num_threads(configured: int | None) -> None:
    """Refuse numbers that would stop the machine, not speed it up.

    Raises:
        ValueError: more than four times the cores of this process.
    """
    limit = 4 * num_cores()
    if configured is not None and configured > limit:
        raise ValueError(
            f"trainer.num_threads={configured}: this process has {num_cores()} core(s); expected "
            f"at most {limit} threads, best as many as cores"
        )


def set_num_threads(configured: int | None) -> int:
    """Set torch's CPU threads for this rank and return their number.

    `configured` wins. Under torchrun, which sets OMP_NUM_THREADS=1 where the user set nothing, it
    is the cores of the machine over its ranks; another value of OMP_NUM_THREADS is the user's and
    stays, as does everything in a single process.
    """
    import torch

    check_num_threads(configured)
    if configured is None and is_under_torchrun():
        of_user = environment_int("OMP_NUM_THREADS", 1)
        ranks = environment_int("LOCAL_WORLD_SIZE", 1)
        configured = of_user if of_user > 1 else max(1, num_cores() // ranks)
    if configured is not None:
        torch.set_num_threads(configured)
    return torch.get_num_threads()


def launch(arguments: Sequence[str], num_ranks: int) -> int:
    """Run `python -m tpcore <arguments>` on ranks of this machine, by torchrun's own launcher.

    Returns the exit status of the first rank that failed, 0 if none did; 128 + its number for a
    signal, which one line names. Ranks talk over loopback, on a port that the launcher finds free.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it logs of failures, we say in one line.
    for part in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").setLevel(logging.CRITICAL)
    os.environ[_LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
    if sys.platform == "linux":
        # All ranks are here; the name of this machine need not resolve for that.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tpcore", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        # Ended by a signal: 128 + its number, as a shell has it.
        name = signal.Signals(-failure.exitcode).name
        hint = "; was memory short?" if name == "SIGKILL" else ""
        return report_error(f"rank {rank} was ended by {name}{hint}", 128 - failure.exitcode)
    except SignalException as error:  # to this process, and passed on to the ranks
        if error.sigval == signal.SIGINT:
            return report_interrupt()
        return 128 + error.sigval
    finally:
        del os.environ[_LAUNCHED]
    return 0
