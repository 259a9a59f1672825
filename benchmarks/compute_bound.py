"""What a kernel's arithmetic alone would take, beside its time where memory is in the way.

    python benchmarks/compute_bound.py [--table benchmarks/results/kernels_....csv]

For each case of benchmarks/kernels.py one thread runs the kernel on two numbers of tokens that stay
in its caches. The difference of the two times, per token, is arithmetic: calls, threads and memory
cancel out. Times the tokens of the case, over the threads, it is the compute bound. The CSV of a
run of benchmarks/run.py on the same machine has the times beyond the caches and the bandwidth of
the copy. A case is at a limit if it reaches 75 % of the copy, or takes at most 1.3 times its bound.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.kernels import DTYPES, OPS, TOKENS  # noqa: E402 - after the path
from tpcore import memory  # noqa: E402

# Two numbers of tokens for each op, whose tensors a core's caches hold.
CACHED = {
    "layer_norm": (64, 256),
    "bias_gelu": (16, 48),
    "masked_softmax": (256, 512),  # whole sequences
    "bias_dropout_residual": (64, 256),
    "cross_entropy": (4, 12),
}
COPY_SHARE, BOUND_RATIO = 75, 1.3


def seconds(function: Callable[[], object], rounds: int = 61) -> float:
    """The least of a number of rounds of about two milliseconds: other work only adds to it."""
    function()
    start = time.perf_counter()
    function()
    calls = max(1, int(2e-3 / (time.perf_counter() - start)))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def call(op: str, tokens: int, dtype: torch.dtype, direction: str) -> Callable[[], object]:
    case = OPS[op](tokens)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in case.shapes]
    if direction == "forward":
        return lambda: case.tpcore(*inputs)
    output = case.tpcore(*inputs)
    grad = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def per_token(op: str, dtype: torch.dtype, direction: str) -> float:
    """Seconds of one thread for one token more."""
    few, many = CACHED[op]
    difference = seconds(call(op, many, dtype, direction)) - seconds(
        call(op, few, dtype, direction)
    )
    return difference / (many - few)


def row_of(measured: dict[str, str], bound_ms: float) -> str:
    time_ms, share = float(measured["median_ms"]), float(measured["percent_of_copy"])
    at_copy, at_bound = share >= COPY_SHARE, time_ms <= BOUND_RATIO * bound_ms
    verdict = "copy" if at_copy else "arithmetic" if at_bound else "neither"
    case = " | ".join(measured[key] for key in ("op", "direction", "dtype"))
    figures = f"{time_ms:.2f} | {share:.0f} % | {bound_ms:.2f} | {time_ms / bound_ms:.2f}"
    return f"| {case} | {figures} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = sorted((HERE / "results").glob("kernels_*.csv"))
    parser.add_argument("--table", type=Path, default=tables[-1] if tables else None)
    parser.add_argument("--threads", type=int, default=2, help="of the run that made the table")
    options = parser.parse_args()
    memory.restart_process()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with options.table.open() as file:
        beyond = {
            (row["op"], row["direction"], row["dtype"]): row
            for row in csv.DictReader(file)
            if row["regime"] == "beyond" and row["provider"] == "tpcore"
        }
    lines = [
        "| op | direction | dtype | beyond cache, ms | of copy | bound, ms | time/bound | limit |",
        "|" + "---|" * 8,
    ]
    for (op, direction, dtype_name), measured in beyond.items():
        dtype = next(d for d in DTYPES if str(d) == f"torch.{dtype_name}")
        bound = per_token(op, dtype, direction) * TOKENS["beyond"] / options.threads
        lines.append(row_of(measured, bound * 1e3))
        print(lines[-1], flush=True)
    facts = (
        f"`python benchmarks/compute_bound.py`, torch {torch.__version__}, "
        f"{datetime.date.today().isoformat()}, load average {load:.1f}; times beyond the caches "
        f"from {options.table.name}. Limit: 75 % of the copy, or 1.3 times the arithmetic of "
        f"{options.threads} threads."
    )
    target = options.table.with_name(options.table.stem.replace("kernels", "compute_bound") + ".md")
    target.write_text("\n".join(["# Compute bounds", "", facts, "", *lines, ""]))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
