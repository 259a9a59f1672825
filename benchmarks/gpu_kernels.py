"""Every op on a GPU: tpcore's two backends beside torch eager, torch.compile, Liger and apex.

    python -m benchmarks.gpu_kernels [--quick] [--seconds 200] [--ops layer_norm ...]

Of each op x size x dtype x direction: the median time of a call on a cold cache (sets of tensors
take turns), the bandwidth that a kernel which moved only the unavoidable bytes would need for that
time, its share of what a copy reaches in the same run, and the ratio to the fastest of the others.
"full" is forward and backward together, for peers that compute gradients in forward. The time to
launch is not in these figures (see measure.py). Liger and apex take part if they can be imported.

`--device cpu --tiny` runs every line on small tensors, where TRITON_INTERPRET=1 serves Triton.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.gpu_cases import Case, cases
from tpcore import kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = {"tpcore-native": "", "tpcore-triton": "triton"}  # "": the compiled kernels of the device
DIRECTIONS = ("forward", "backward", "full")
COLUMNS = (
    "op",
    "size",
    "dtype",
    "direction",
    "provider",
    "median_ms",
    "min_ms",
    "gb_per_s",
    "percent_of_copy",
    "best_peer",
    "best_peer_over_this",
)


def providers(
    case: Case, device: str, wanted: Sequence[str] | None
) -> dict[str, Callable[..., Tensor]]:
    """Provider -> its function, of those that are here and wanted."""
    found: dict[str, Callable[..., Tensor]] = {}
    for provider, backend in OURS.items():
        if _serves(backend or device, case.op.split("+")[0], device):
            found[provider] = functools.partial(_on, backend or device, case.functions["ours"])
    found["eager"] = case.functions["eager"]
    torch.compiler.reset()
    found["compile"] = torch.compile(case.functions["eager"], dynamic=False)
    found.update({n: f for n, f in case.functions.items() if n in ("liger", "apex")})
    return {name: f for name, f in found.items() if wanted is None or name in wanted}


def _on(backend: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with kernels.use_backend(backend):
        return function(*inputs)


def _serves(backend: str, op: str, device: str) -> bool:
    with kernels.use_backend(backend):
        row = next(r for r in kernels.explain() if (r.op, r.device) == (op, device))
    return row.serves == backend


def measure_provider(
    function: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: str, rounds: int
) -> dict[str, list[float]]:
    """Direction -> times in ms."""
    torch.manual_seed(0)
    sets = []
    for _ in range(measure.sets_for(case.moved[0] * dtype.itemsize, device)):
        inputs = [torch.randn(shape, device=device).to(dtype) for shape in case.shapes]
        sets.append([x.requires_grad_() for x in inputs])
    turns = [lambda inputs=inputs: function(*inputs) for inputs in sets]
    found = {"forward": measure.times_ms(turns, device, rounds=rounds)}

    def backward_of(inputs: list[Tensor]) -> measure.Call:
        outputs = function(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        grads = [torch.randn_like(o) for o in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    turns = [backward_of(inputs) for inputs in sets]
    found["backward"] = measure.times_ms(turns, device, rounds=rounds)
    return found


def rows_of(
    case: Case, dtype: str, times: dict[str, dict[str, list[float]]], copy: float
) -> list[dict]:
    """The rows of one case in one dtype, with the ratios to the others."""
    rows = []
    medians = {
        (d, provider): statistics.median(found[d])
        for provider, found in times.items()
        for d in found
    }
    for direction in DIRECTIONS:
        parts = ("forward", "backward") if direction == "full" else (direction,)
        moved = sum(case.moved[("forward", "backward").index(d)] for d in parts)
        of = {provider: sum(medians[d, provider] for d in parts) for provider in times}
        least = {provider: sum(min(times[provider][d]) for d in parts) for provider in times}
        peers = {p: of[p] for p in of if p not in OURS}
        for provider, median in of.items():
            others = {p: t for p, t in peers.items() if p != provider}
            best = min(others, key=others.get, default=None)
            bandwidth = moved * DTYPES[dtype].itemsize / median / 1e6
            rows.append(
                {
                    "op": case.op,
                    "size": case.size,
                    "dtype": dtype,
                    "direction": direction,
                    "provider": provider,
                    "median_ms": median,
                    "min_ms": least[provider],
                    "gb_per_s": bandwidth,
                    "percent_of_copy": 100 * bandwidth / copy,
                    "best_peer": best,
                    "best_peer_over_this": others[best] / median if best else None,
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after so long")
    parser.add_argument("--quick", action="store_true", help="the first size of each op, bf16")
    parser.add_argument("--tiny", action="store_true", help="small tensors: a test of this program")
    parser.add_argument("--ops", nargs="+", help="only these")
    parser.add_argument("--providers", nargs="+", help="only these")
    options = parser.parse_args(arguments)
    device, deadline = options.device, measure.Deadline(options.seconds)
    table = measure.Table(measure.results_folder(), "gpu_kernels", COLUMNS, device)
    rounds = 3 if options.tiny else 24
    copied = 1 << (12 if options.tiny else 28)
    copy = measure.copy_gb_per_s(copied, device)
    notes = [f"a copy of {copied >> 20} MiB moves {copy:.0f} GB/s, read and written"]
    dtypes = ("bf16",) if options.quick else ("bf16", "fp32")
    done: set[str] = set()
    late: list[str] = []
    for make, dtype in itertools.product(cases(options.tiny, device), dtypes):
        if deadline.passed():
            late.append(f"{make.func.__name__}{make.args[:-1]} {dtype}")
            continue
        case = make()
        op = case.op.split("+")[0]
        if op not in (options.ops or [op]) or (options.quick and case.op in done):
            continue
        times = {}
        for provider, function in providers(case, device, options.providers).items():
            try:
                times[provider] = measure_provider(function, case, DTYPES[dtype], device, rounds)
            except Exception as error:  # one provider's failure is a result, not the end
                reason = measure.in_a_line(error)
                notes.append(f"{provider} fails in {case.op} {case.size} {dtype}: {reason}")
        rows = rows_of(case, dtype, times, copy)
        table.add(rows)
        _print(rows)
        done.add(case.op)
    if late:
        notes.append(f"no time for: {'; '.join(late)}")
    table.finish(notes)
    print("\n".join(notes))
    return 1 if any(note.startswith("tpcore") for note in notes) else 0


def _print(rows: list[dict]) -> None:
    for row in rows:
        if row["provider"] in OURS and row["best_peer"]:
            case = " ".join(row[c] for c in ("op", "size", "dtype", "direction", "provider"))
            share, ratio = row["percent_of_copy"], row["best_peer_over_this"]
            figures = f"{row['median_ms']:.4f} ms, {share:.0f} % of copy"
            print(f"{case}: {figures}, {ratio:.2f} x {row['best_peer']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
