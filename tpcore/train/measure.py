"""Speeds of the device at hand: what kernels, steps and plans are compared with."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

_MIN_DURATION_S = 0.2
_MIN_REPETITIONS = 5


def matrix_flops_per_s(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = 2048,
    size: int = 1024,
) -> float:
    """Operations per second of [rows, size] x [size, 4 size], the median of several products.

    That is the shape of a feed-forward layer; a multiplication and an addition are two operations.
    """
    x = torch.randn(rows, size, device=device).to(dtype)
    weight = torch.randn(4 * size, size, device=device).to(dtype)
    seconds = _median_s(lambda: torch.nn.functional.linear(x, weight), x.device)
    return 2.0 * rows * size * 4 * size / seconds


def copy_bytes_per_s(device: torch.device | str = "cpu", *, num_bytes: int = 2**28) -> float:
    """Bytes read and written per second by a copy into memory that is there already."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.ones_like(source)
    return 2.0 * num_bytes / _median_s(lambda: target.copy_(source), source.device)


def memory_bytes(device: torch.device | str = "cpu") -> int:
    """Memory of the device; of this machine on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _median_s(run: Callable[[], object], device: torch.device) -> float:
    def finish() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    run()
    durations: list[float] = []
    started = finish()
    while len(durations) < _MIN_REPETITIONS or finish() - started < _MIN_DURATION_S:
        before = finish()
        run()
        durations.append(finish() - before)
    return statistics.median(durations)
