"""Where the time of a step on texts of real lengths goes, by torch's profiler, on one thread.

    python -m benchmarks.profile_real sst2 MiniLM-L6 bf16 [train | infer]

The case is that of benchmarks/finetune.py: two batches of 32 texts, forward, backward and AdamW.
Seconds of the whole are those that the processor spent on the one thread. An operator's time is
the least of seven passes for each of its calls, since other programs only ever add to it; so the
table stands on a machine that is not idle, and sums to less than the whole.
"""

from __future__ import annotations

import collections
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import finetune, finetune_sides
from tpcore import memory
from tpcore.parallel.group import TensorParallelGroup

PASSES = 7
SMALLEST_SHARE = 0.003
DATA = Path(__file__).parents[2] / "shared" / "data"


def _least(times: list[float]) -> float:
    """The sum over the calls of a pass, each as it was in its quickest pass."""
    calls = len(times) // PASSES
    if calls * PASSES != len(times):  # not the same in every pass
        return sum(times) / PASSES
    return sum(min(times[call::calls]) for call in range(calls))


def main(data: str, model: str, dtype: str, mode: str = "train") -> int:
    """Print the table."""
    torch.set_num_threads(1)
    finetune_sides.now = time.process_time
    ways = finetune.ways_of(finetune.examples_of(data, DATA), mode == "train", 2, 32)
    case = finetune.Case(model, finetune.TASKS[data], dtype, mode == "train", 128, ways)
    run = finetune_sides._tpcore(case, TensorParallelGroup.single())
    floor = finetune_sides._floor(case)
    for _ in range(2):
        run("packed", 0, 2)
        floor("packed", 0, 2)
    found = [(*run("packed", 0, 2), floor("packed", 0, 2)[0]) for _ in range(PASSES)]
    whole, optimizer, products = (1e3 * statistics.median(row) for row in zip(*found, strict=True))
    print(
        f"{model}, {data}, {dtype}, {mode}: {case.tokens('packed')} tokens in two batches, "
        f"{whole:.0f} ms, of them {optimizer:.0f} the optimizer's; the products alone "
        f"{products:.0f} ms; load average {os.getloadavg()[0]:.1f}\n"
    )
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(PASSES):
            run("packed", 0, 2)
    times: dict[str, list[float]] = collections.defaultdict(list)
    for event in recorded.events():
        times[event.name].append(event.self_cpu_time_total / 1e3)
    rows = {name: _least(values) for name, values in times.items()}
    total = sum(rows.values())
    print("| operator | calls | ms | share |\n|---|---|---|---|")
    for name in sorted(rows, key=lambda name: -rows[name]):
        if rows[name] >= SMALLEST_SHARE * total:
            share, calls = rows[name] / total, len(times[name]) / PASSES
            print(f"| {name} | {calls:.0f} | {rows[name]:.2f} | {share:.1%} |")
    return 0


if __name__ == "__main__":
    memory.restart_process()
    sys.exit(main(*sys.argv[1:]))
