"""How the GPU benchmarks measure, and where they write: the same on CUDA and, small, on the CPU."""

from __future__ import annotations

import csv
import datetime
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.run import device_name

RESULTS = Path(__file__).parent / "results"
# While the device waits so long, the host queues a batch of calls: what is measured then is the
# time of the kernels and not that of launching them.
_HEAD_START_CYCLES = 20_000_000
_BATCH = 8

Call = Callable[[], object]


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def times_ms(
    turns: Sequence[Call], device: str, *, rounds: int = 24, warm_up: int = 3
) -> list[float]:
    """Milliseconds of single calls; the calls take turns, each with tensors of its own.

    On CUDA by events around each call, in batches that are queued while the device is held up; on
    the CPU by its clock.
    """
    for number in range(max(warm_up, len(turns))):
        turns[number % len(turns)]()
    synchronize(device)
    if device != "cuda":
        return [_clocked(turns[number % len(turns)]) for number in range(rounds)]
    found: list[float] = []
    for first in range(0, rounds, _BATCH):
        events = []
        torch.cuda._sleep(_HEAD_START_CYCLES)
        for number in range(first, min(first + _BATCH, rounds)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            turns[number % len(turns)]()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        found += [start.elapsed_time(end) for start, end in events]
    return found


def _clocked(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def cache_bytes(device: str) -> int:
    """Of the device's last-level cache; on the CPU nothing, so that small tests stay small."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0


def sets_for(bytes_of_one: int, device: str) -> int:
    """How many sets of tensors take turns, so that none is in the cache when its turn comes."""
    return max(2, -(-4 * cache_bytes(device) // max(1, bytes_of_one)))


def copy_gb_per_s(num_bytes: int, device: str) -> float:
    """Bytes read and written by a copy of so many bytes, over its median time."""
    pairs = []
    for _ in range(sets_for(2 * num_bytes, device)):
        source = torch.ones(num_bytes // 4, device=device)
        pairs.append((torch.empty_like(source), source))
    turns = [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]
    return 2 * num_bytes / statistics.median(times_ms(turns, device)) / 1e6


def matrix_tflops(size: int, dtype: torch.dtype, device: str) -> float:
    """Of a product of two square matrices of random numbers: what the device can do at most."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(times_ms([lambda: a @ b], device, rounds=12))
    return 2 * size**3 / best / 1e9


def device_facts(device: str) -> str:
    """One line: what ran this, and when."""
    now = datetime.datetime.now(datetime.timezone.utc)
    facts = [device_name(), f"torch {torch.__version__}", f"{now:%Y-%m-%d %H:%M} UTC"]
    if device == "cuda" and shutil.which("nvidia-smi"):
        fields = "driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.limit"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True)
        facts.append(f"{fields}: {result.stdout.strip()}")
    return "; ".join([*facts, f"load average {os.getloadavg()[0]:.1f}"])


class Table:
    """Rows that are on the disk as soon as they are added: CSV, and Markdown by `finish`.

    Args:
        folder: where the files go; `$OUT`, or benchmarks/results.
        name: what they are about; the device and the date are added.
        columns: of the table.
        device: "cuda" or "cpu".
    """

    def __init__(self, folder: Path, name: str, columns: Sequence[str], device: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
        self.path = folder / f"{name}_{slug}_{datetime.date.today().isoformat()}.csv"
        self.columns, self.device, self.facts = tuple(columns), device, device_facts(device)
        self.rows: list[dict] = []
        self._write("w", [dict(zip(columns, columns, strict=True))])

    def add(self, rows: Iterable[dict]) -> None:
        rows = list(rows)
        self.rows += rows
        self._write("a", rows)
        self._write_markdown("The run was cut short here, unless notes follow.")

    def finish(self, notes: Sequence[str]) -> None:
        self._write_markdown("\n".join(f"- {note}" for note in notes))
        print(f"wrote {self.path} and .md")

    def _write(self, mode: str, rows: list[dict]) -> None:
        with self.path.open(mode, newline="") as file:
            csv.DictWriter(file, self.columns).writerows(rows)

    def _write_markdown(self, end: str) -> None:
        lines = [f"# {self.path.stem}", "", f"{self.facts}.", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        for row in self.rows:
            lines.append("| " + " | ".join(_shown(row.get(c)) for c in self.columns) + " |")
        self.path.with_suffix(".md").write_text("\n".join([*lines, "", end]) + "\n")


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return "" if cell is None else str(cell)


def in_a_line(error: Exception) -> str:
    """What went wrong, for a note under a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Deadline:
    """When to begin nothing new."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def passed(self) -> bool:
        return time.monotonic() > self._end


def results_folder() -> Path:
    """`$OUT` where that is set, so that it can be carried away from there."""
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
