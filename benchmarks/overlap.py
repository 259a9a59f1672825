"""What the backward of a column-parallel layer does at the same time: a trace and two step times.

    python benchmarks/overlap.py [--tokens 512] [--hidden 1024] [--features 4096]

Two ranks, one thread each, over shared memory and over gloo, with and without sequence parallelism.
The layer [hidden -> features] is run backward as it is, and with every collective waited for where
it starts; both take turns. Prints markdown: the spans of the trace in milliseconds after its begin,
and the times of both. On a machine that does other work as well the medians measure that work.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

from tpcore.layers import linear_function
from tpcore.layers.linear import ColumnParallelLinear
from tpcore.parallel import collectives
from tpcore.parallel.group import TensorParallelGroup

SPANS = ("aten::mm", "tpcore::shm_", "_c10d_functional::", "gloo:")
OVERLAPPED = {
    name: getattr(linear_function, name)
    for name in ("start_all_reduce", "start_all_gather", "start_reduce_scatter", "wait")
}
AT_ONCE = {
    "start_all_reduce": collectives.all_reduce,
    "start_all_gather": collectives.all_gather,
    "start_reduce_scatter": collectives.reduce_scatter,
    "wait": lambda finished: finished,
}


@contextmanager
def replaced(functions: dict[str, Callable]) -> Iterator[None]:
    for name, function in functions.items():
        setattr(linear_function, name, function)
    yield
    for name, function in OVERLAPPED.items():
        setattr(linear_function, name, function)


def backward_ms(
    step: Callable[[], torch.Tensor], tp: TensorParallelGroup, turns: int
) -> dict[str, list[float]]:
    """Milliseconds of one backward on the slowest rank, for both variants in turn."""
    times: dict[str, list[float]] = {"overlapped": [], "one after the other": []}
    for turn in range(turns + 2):
        for values, functions in zip(times.values(), (OVERLAPPED, AT_ONCE), strict=True):
            with replaced(functions):
                y = step()
                grad = torch.ones_like(y)
                collectives.all_reduce(torch.zeros(1), tp)
                start = time.perf_counter()
                y.backward(grad)
                elapsed = torch.tensor([1e3 * (time.perf_counter() - start)])
            slowest = collectives.all_reduce(elapsed, tp, "max").item()
            if turn >= 2:
                values.append(slowest)
    return times


def trace_of(step: Callable[[], torch.Tensor], tp: TensorParallelGroup) -> list[str]:
    y = step()
    grad = torch.ones_like(y)
    collectives.all_reduce(torch.zeros(1), tp)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        y.backward(grad)
    events = [e for e in trace.events() if e.name.startswith(SPANS)]
    origin = min(e.time_range.start for e in events)
    events.sort(key=lambda e: e.time_range.start)
    return [
        f"{(e.time_range.start - origin) / 1e3:8.2f} {(e.time_range.end - origin) / 1e3:8.2f}  "
        f"{e.name}"
        for e in events
    ]


def run_rank(rank: int, store: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    lines = []
    for shared in (True, False):
        group = dist.new_group([0, 1])
        tp = TensorParallelGroup.from_process_group(group, shared_memory=shared)
        for sequence in (False, True):
            torch.manual_seed(0)
            layer = ColumnParallelLinear(
                options.hidden, options.features, tp=tp, sequence_parallel=sequence
            )
            rows = options.tokens // (2 if sequence else 1)
            x = torch.randn(rows, options.hidden, requires_grad=True)

            def step(layer: ColumnParallelLinear = layer, x: torch.Tensor = x) -> torch.Tensor:
                layer.zero_grad()
                x.grad = None
                return layer(x)

            times = backward_ms(step, tp, options.turns)
            spans = trace_of(step, tp)
            lines += [
                f"### {'shared memory' if shared else 'gloo'}, sequence_parallel={sequence}",
                "",
                "```",
                "   start      end  span (ms)",
                *spans,
                "```",
                "",
            ]
            fast, slow = times.values()
            ratios = [a / b for a, b in zip(fast, slow, strict=True)]
            lines += [
                f"backward: overlapped {statistics.median(fast):.2f} ms (min {min(fast):.2f}), "
                f"one after the other {statistics.median(slow):.2f} ms (min {min(slow):.2f}); "
                f"median of the ratios {statistics.median(ratios):.3f}, "
                f"ratio of the minima {min(fast) / min(slow):.3f}",
                "",
            ]
    if rank == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    model = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    print(
        f"{model[0] if model else 'CPU'}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{datetime.date.today()}, load average {os.getloadavg()[0]:.1f}; {options.tokens} tokens, "
        f"{options.hidden} -> {options.features} features, 2 ranks of 1 thread, float32\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (f"{folder}/store", options), nprocs=2)


if __name__ == "__main__":
    main()
