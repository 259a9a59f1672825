"""Two costs of torch's matrix products in bfloat16 on a CPU, and what tpcore does about them.

    python -m benchmarks.products [--threads 2] [--print]

1. A product with a number of rows that did not come before is compiled first: its time beside that
   of the second call, and the memory that stays. tpcore rounds numbers of tokens up
   (tpcore/layers/rounded_rows.py).
2. The gradient dY^T X of a weight [out, in]: as a product of the transposed view, and with dY
   transposed in memory first, which tpcore does on AMX (tpcore/layers/linear_function.py).

Medians, of 100 numbers of rows and of 30 rounds in which both ways take turns; written to
benchmarks/results/products_*.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.run import device_name
from tpcore import _native, memory

RESULTS = Path(__file__).parent / "results"
OUT, IN = 1536, 384
SHAPES = [(1536, 384), (384, 1536), (1152, 384), (384, 384), (4096, 1024), (1024, 4096)]


def microseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def new_sizes() -> list[str]:
    lines = [
        "| dtype | product | first call, us | second call, us | MiB that stay, of each |",
        "|---|---|---|---|---|",
    ]
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(OUT, IN, dtype=dtype)
        for name in ("X W^T", "dY W", "dY^T X"):
            first, second = [], []
            before = resident_mib()
            for rows in range(501, 601):
                x = torch.randn(rows, IN, dtype=dtype)
                grad = torch.randn(rows, OUT, dtype=dtype)
                call = {
                    "X W^T": lambda x=x, weight=weight: F.linear(x, weight),
                    "dY W": lambda grad=grad, weight=weight: grad @ weight,
                    "dY^T X": lambda x=x, grad=grad: grad.t() @ x,
                }[name]
                first.append(microseconds(call))
                second.append(microseconds(call))
            stays = (resident_mib() - before) / len(first)
            lines.append(
                f"| {str(dtype).removeprefix('torch.')} | {name} | {statistics.median(first):.0f} "
                f"| {statistics.median(second):.0f} | {stays:.2f} |"
            )
    return lines


def weight_gradients() -> list[str]:
    lines = [
        "| tokens | weight | dY^T X, us | transposed first, us | of that the transpose | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for rows in (459, 1024, 4096):
        for out, in_features in SHAPES:
            x = torch.randn(rows, in_features, dtype=torch.bfloat16)
            grad = torch.randn(rows, out, dtype=torch.bfloat16)
            calls: tuple[Callable[[], Any], ...] = (
                lambda x=x, grad=grad: grad.t() @ x,
                lambda x=x, grad=grad: torch.ops.tpcore.transpose16(grad) @ x,
                lambda grad=grad: torch.ops.tpcore.transpose16(grad),
            )
            times: list[list[float]] = [[], [], []]
            for _ in range(33):
                for call, found in zip(calls, times, strict=True):
                    found.append(microseconds(call))
            view, first, alone = (statistics.median(found[3:]) for found in times)
            lines.append(
                f"| {rows} | [{out}, {in_features}] | {view:.0f} | {first:.0f} | {alone:.0f} "
                f"| {view / first:.2f} |"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--print", action="store_true", help="write no file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    isa = _native.status("cpu").info["isa"]
    load = os.getloadavg()[0]
    with torch.inference_mode():
        lines = [*new_sizes(), "", *weight_gradients()]
    date = datetime.date.today().isoformat()
    text = "\n".join(
        [
            f"# Products in bfloat16 on {device_name()}",
            "",
            f"{options.threads} threads, {isa}, torch {torch.__version__}, {date}, load average "
            f"{load:.1f} before; what is measured stands in benchmarks/products.py.",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    if not options.print:
        cpu = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
        (RESULTS / f"products_{cpu}_{isa}_{date}.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    memory.restart_process()
    sys.exit(main())
