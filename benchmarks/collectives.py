"""Collectives in shared memory against gloo, and against the cost of only moving the bytes.

    python benchmarks/collectives.py [--ranks 2] [--collectives all_reduce ...] [--sizes 4096 ...]

Every rank is a process with one thread. For each size the providers take turns, all ranks at once:

    tpcore   tpcore.parallel.collectives, in float32; the all-reduce in place
    gloo     the same call of torch.distributed, into memory that exists already
    floor    the bytes are copied into shared memory, in pieces of the size that tpcore uses; after
             each piece the ranks tell each other, and copy as many bytes out of it as the
             collective needs; nothing is added up
    copy     the same copies within private memory, and nobody tells anybody anything

The smallest size shows what a call from Python costs by itself: two or three calls of ctypes for
the floor, the dispatcher of torch and a few look-ups for tpcore. It is most of what small messages
cost either.

A turn is a run of calls of about two milliseconds; the slowest rank counts. On a machine that does
other work as well the medians measure that work; the minima are what the machine can do.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.run import device_name  # noqa: E402 - after the path
from tpcore import memory  # noqa: E402
from tpcore.parallel import collectives  # noqa: E402
from tpcore.parallel.group import TensorParallelGroup  # noqa: E402
from tpcore.parallel.shared_memory import HALF_BYTES, channel_of  # noqa: E402

SIZES = [64, *(4096 << shift for shift in range(15))]
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
PROVIDERS = ("tpcore", "gloo", "floor", "copy")
COLUMNS = (
    "collective",
    "ranks",
    "bytes",
    *(f"{provider}_{what}_us" for provider in PROVIDERS for what in ("median", "min")),
    "gloo_over_tpcore_median",
    "gloo_over_tpcore_min",
    "tpcore_over_floor_median",
    "tpcore_over_floor_min",
    "tpcore_gb_per_s",
    "load_average",
)
_TURN_S = 2e-3


class Floor:
    """The bytes of one collective, moved and not added up. x: num_bytes on every rank."""

    def __init__(self, tp: TensorParallelGroup) -> None:
        self.tp = tp
        self.segment = _shared_bytes(tp, 4096 + 2 * tp.size * HALF_BYTES)
        address = self.segment.data_ptr()
        self.flags = [ctypes.c_int64.from_address(address + 64 * rank) for rank in range(tp.size)]
        self.slots = [address + 4096 + 2 * rank * HALF_BYTES for rank in range(tp.size)]
        self.step = 0
        self.private = torch.zeros(2 * HALF_BYTES, dtype=torch.uint8)

    def moved(self, collective: str, num_bytes: int) -> tuple[int, list[int]]:
        """Bytes that this rank writes, and bytes that it reads of each rank's."""
        rank, size = self.tp.rank, self.tp.size
        others = [other for other in range(size) if other != rank]
        return {
            "all_reduce": (
                num_bytes,
                [num_bytes // len(others) * (r in others) for r in range(size)],
            ),
            "all_gather": (num_bytes, [num_bytes] * size),
            "reduce_scatter": (
                num_bytes // size * len(others),
                [num_bytes // size * (r in others) for r in range(size)],
            ),
            "broadcast": (num_bytes * (rank == 0), [num_bytes * (rank > 0)] + [0] * (size - 1)),
        }[collective]

    def run(
        self, x: torch.Tensor, out: torch.Tensor, written: int, read: list[int], shared: bool
    ) -> None:
        source, target = x.data_ptr(), out.data_ptr()
        for start in range(0, max(written, *read), HALF_BYTES):
            half = self.step % 2 * HALF_BYTES
            slots = self.slots if shared else [self.private.data_ptr()] * self.tp.size
            if written > start:
                length = min(HALF_BYTES, written - start)
                ctypes.memmove(slots[self.tp.rank] + half, source + start, length)
            self.step += 1
            if shared:
                self.meet()
            place = target
            for slot, total in zip(slots, read, strict=True):
                if total > start:
                    length = min(HALF_BYTES, total - start)
                    ctypes.memmove(place + start, slot + half, length)
                place += total

    def meet(self) -> None:
        self.flags[self.tp.rank].value = self.step
        for flag in self.flags:
            spins = 0
            while flag.value < self.step:
                spins += 1
                if spins % 256 == 0:
                    os.sched_yield()


def _shared_bytes(tp: TensorParallelGroup, num_bytes: int) -> torch.Tensor:
    """Zeros that all ranks see."""
    places: list = [None] * tp.size
    file = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR) if tp.rank == 0 else -1
    if tp.rank == 0:
        os.truncate(file, num_bytes)
    dist.all_gather_object(places, f"/proc/{os.getpid()}/fd/{file}")
    shared = torch.from_file(places[0], True, num_bytes, dtype=torch.uint8)
    dist.barrier()
    if tp.rank == 0:
        os.close(file)
    return shared


def calls(collective: str, num_bytes: int, tp: TensorParallelGroup, floor: Floor) -> dict:
    """Provider -> a function of no arguments that does the collective once."""
    x = torch.zeros(num_bytes // 4)
    out = torch.zeros(num_bytes // 4 * (tp.size if collective == "all_gather" else 1))
    scattered = out[: x.numel() // tp.size]
    functions: dict[str, dict[str, Callable[[], object]]] = {
        "all_reduce": {
            "tpcore": lambda: collectives.all_reduce_in_place(x, tp),
            "gloo": lambda: dist.all_reduce(x),
        },
        "all_gather": {
            "tpcore": lambda: collectives.all_gather(x, tp),
            "gloo": lambda: dist.all_gather_into_tensor(out, x),
        },
        "reduce_scatter": {
            "tpcore": lambda: collectives.reduce_scatter(x, tp),
            "gloo": lambda: dist.reduce_scatter_tensor(scattered, x),
        },
        "broadcast": {
            "tpcore": lambda: collectives.broadcast(x, tp),
            "gloo": lambda: dist.broadcast(x, 0),
        },
    }
    moved = (x, out, *floor.moved(collective, num_bytes))
    return {
        **functions[collective],
        "floor": lambda: floor.run(*moved, shared=True),
        "copy": lambda: floor.run(*moved, shared=False),
    }


def measure(functions: dict, tp: TensorParallelGroup, turns: int) -> dict[str, list[float]]:
    """Provider -> microseconds for one call, of the slowest rank, in each turn."""
    seconds: dict[str, list[float]] = {provider: [] for provider in functions}
    counts = dict.fromkeys(functions, 1)
    for turn in range(turns + 1):
        for provider, function in functions.items():
            collectives.all_reduce(torch.zeros(1), tp)  # all ranks begin together
            start = time.perf_counter()
            for _ in range(counts[provider]):
                function()
            elapsed = (time.perf_counter() - start) / counts[provider]
            slowest = collectives.all_reduce(torch.tensor([elapsed]), tp, "max").item()
            if turn == 0:  # a warm-up, which says how many calls make a turn
                counts[provider] = max(1, min(200, int(_TURN_S / slowest)))
            else:
                seconds[provider].append(1e6 * slowest)
    return seconds


def row_of(collective: str, ranks: int, num_bytes: int, times: dict[str, list[float]]) -> dict:
    row: dict = {"collective": collective, "ranks": ranks, "bytes": num_bytes}
    for provider, values in times.items():
        row[f"{provider}_median_us"] = statistics.median(values)
        row[f"{provider}_min_us"] = min(values)
    for what in ("median", "min"):
        ours = row[f"tpcore_{what}_us"]
        row[f"gloo_over_tpcore_{what}"] = row[f"gloo_{what}_us"] / ours
        row[f"tpcore_over_floor_{what}"] = ours / row[f"floor_{what}_us"]
    row["tpcore_gb_per_s"] = num_bytes / row["tpcore_median_us"] / 1e3
    row["load_average"] = os.getloadavg()[0]
    return row


def run_rank(rank: int, store: str, options: argparse.Namespace) -> None:
    memory.keep_freed_memory()  # as in a run of the command line; else results cost page faults
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks
    )
    tp = TensorParallelGroup.from_process_group(dist.group.WORLD, shared_memory=True)
    assert channel_of(tp) is not None
    floor, rows = Floor(tp), []
    for collective in options.collectives:
        for num_bytes in options.sizes:
            turns = options.turns if num_bytes <= 1 << 22 else max(5, options.turns // 3)
            times = measure(calls(collective, num_bytes, tp, floor), tp, turns)
            rows.append(row_of(collective, tp.size, num_bytes, times))
            if rank == 0:
                print(line_of(rows[-1]), flush=True)
    if rank == 0:
        write(rows, options)
    dist.barrier()
    dist.destroy_process_group()


def line_of(row: dict) -> str:
    shown = [f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]
    return "| " + " | ".join(shown) + " |"


def write(rows: list[dict], options: argparse.Namespace) -> None:
    cpu = device_name().rsplit(",", 1)[0] + f", {os.cpu_count()} processors"
    date = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    target = HERE / "results" / f"collectives_{slug}_{options.ranks}-ranks_{date}"
    target.parent.mkdir(exist_ok=True)
    loads = [row["load_average"] for row in rows]
    facts = (
        f"torch {torch.__version__}, {date}, {options.ranks} ranks of one thread each; load "
        f"average {min(loads):.1f} to {max(loads):.1f}, of which the benchmark itself is up to "
        f"{options.ranks}. Times in microseconds for one call, of the slowest rank; what the "
        "providers are stands in benchmarks/collectives.py."
    )
    header = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    table = "\n".join([*header, *map(line_of, rows)])
    target.with_suffix(".md").write_text(f"# Collectives on {cpu}\n\n{facts}\n\n{table}\n")
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {target}.md and .csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of x")
    parser.add_argument("--collectives", nargs="+", choices=COLLECTIVES, default=list(COLLECTIVES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (f"{folder}/store", options), options.ranks)


if __name__ == "__main__":
    main()
