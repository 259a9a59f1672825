"""Attention between its two projections: the fused kernel, buckets, and torch's SDPA per bucket.

    python -m benchmarks.attention [--rounds 7] [--dtypes bfloat16] [--lengths 384 short]

About 4,096 packed tokens; ways take turns, medians of forward and of backward in milliseconds.
SDPA draws dropout bits of its own, so it takes part without dropout only. TPCORE_CPU_ISA pins the
instruction set of the fused kernel and of masked_softmax in the buckets. Writes Markdown into
benchmarks/results/, named by device, instruction set and date.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.run import device_name
from tpcore import _native, memory
from tpcore.kernels import packed_attention
from tpcore.layers.attention import PackedSequences, SelfAttention
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.random import DropoutContext

RESULTS = Path(__file__).parent / "results"
TOKENS = 4096
SIZES = {"384 / 12": (384, 12), "1024 / 16": (1024, 16)}
_DRAW = random.Random(0)
LENGTHS = {
    "short": lambda: _DRAW.choice((8, 12, 16, 20, 24, 28, 32, 36, 48)),
    "64-192": lambda: _DRAW.randint(64, 192),
    "256": lambda: 256,
    "384": lambda: 384,
    "512": lambda: 512,
    "16-512": lambda: _DRAW.choice((16, 64, 200, 512)),
}
COLUMNS = ("dtype", "hidden / heads", "lengths", "dropout", "fused", "buckets", "SDPA")
Way = Callable[[Tensor], Tensor]


def ways(heads: int, hidden: int, sequences: PackedSequences, p: float) -> dict[str, Way]:
    """Functions of qkv [t, n, 3, d], each with the context as its result."""
    layer = SelfAttention(hidden, heads, tp=TensorParallelGroup.single(), attention_dropout=p)
    dropout = None
    if p > 0:
        dropout = DropoutContext(torch.tensor([1]), torch.arange(sequences.num_tokens))
    key = layer._key(dropout)
    found: dict[str, Way] = {
        "fused": lambda qkv: packed_attention(qkv, sequences.cu_seqlens, **key),
        "buckets": lambda qkv: layer._by_buckets(qkv, sequences, dropout),
    }
    if p == 0:
        found["SDPA"] = lambda qkv: _sdpa(qkv, sequences)
    return found


def _sdpa(qkv: Tensor, sequences: PackedSequences) -> Tensor:
    contexts, places = [], []
    for bucket in sequences.buckets:
        q, k, v = qkv[bucket.index].permute(3, 0, 2, 1, 4)
        mask = None if bucket.key_mask is None else ~bucket.key_mask
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        real = slice(None) if bucket.key_mask is None else ~bucket.key_mask[:, 0, 0]
        contexts.append(y[real].reshape(-1, *y.shape[2:]))
        places.append(bucket.index[real].reshape(-1))
    context = torch.cat(contexts)
    return torch.zeros_like(context).index_copy(0, torch.cat(places), context)


def measure(found: dict[str, Way], qkv: Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of forward and backward of each way."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for number in range(rounds + 2):
        for name, way in found.items():
            start = time.perf_counter()
            y = way(qkv)
            middle = time.perf_counter()
            torch.autograd.grad(y, qkv, torch.ones_like(y))
            if number >= 2:
                end = time.perf_counter()
                times[name].append((1e3 * (middle - start), 1e3 * (end - middle)))
    return {name: tuple(map(statistics.median, zip(*t, strict=True))) for name, t in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    isa = _native.status("cpu").info["isa"]
    lines, load = [], os.getloadavg()[0]
    for dtype in options.dtypes:
        for size in options.sizes:
            hidden, heads = SIZES[size]
            for name in options.lengths:
                lengths = []
                while sum(lengths) < TOKENS:
                    lengths.append(min(LENGTHS[name](), TOKENS - sum(lengths)))
                sequences = PackedSequences.from_lengths(lengths)
                qkv = torch.randn(TOKENS, heads, 3, hidden // heads).to(getattr(torch, dtype))
                for p in (0.0, 0.1):
                    found = ways(heads, hidden, sequences, p)
                    medians = measure(found, qkv.requires_grad_(), options.rounds)
                    cells = [dtype, size, name, str(p)]
                    ours = sum(medians["fused"])
                    for way in COLUMNS[4:]:
                        forward, backward = medians.get(way, (math.nan, math.nan))
                        ratio = "" if way == "fused" else f" ({(forward + backward) / ours:.2f})"
                        shown = f"{forward:.1f} + {backward:.1f}{ratio}"
                        cells.append(shown if way in medians else "")
                    lines.append("| " + " | ".join(cells) + " |")
                    print(lines[-1], flush=True)
    now = datetime.datetime.now(datetime.timezone.utc)
    device = device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = RESULTS / f"attention_{slug}_{isa}_{now:%Y-%m-%d}.md"
    title = [
        f"# Attention on {device}, {isa}",
        "",
        f"`python -m benchmarks.attention`, torch {torch.__version__}, {now:%Y-%m-%d %H:%M} UTC, "
        f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after; {TOKENS} tokens, "
        "milliseconds of forward + backward, medians; in brackets the time over that of fused.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    path.write_text("\n".join([*title, *lines]) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    memory.restart_process()
    sys.exit(main())
