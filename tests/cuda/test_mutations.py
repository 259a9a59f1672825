"""Tests of the tests: mistakes that are planted in the kernels must be caught."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import test_layer_norm
from tests.cuda.device import COMPILER, Device, Mutation, SanitizerError

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

OUT_OF_BOUNDS = {
    "a store that ignores how many elements exist": Mutation(
        "common.cuh",
        "    if (i >= lanes.first && i < lanes.last) {\n      reinterpret_cast<Bits*>(target)",
        "    if (i >= lanes.first) {\n      reinterpret_cast<Bits*>(target)",
        "layer_norm.cu",
    ),
    "a vector access to a row that stands unaligned": Mutation(
        "common.cuh",
        "reinterpret_cast<uintptr_t>(pointer) % alignof(V) == 0",
        "reinterpret_cast<uintptr_t>(pointer) % alignof(T) == 0",
        "layer_norm.cu",
    ),
    "one row too many": Mutation(
        "layer_norm.cu",
        "if (threadIdx.x == 0 && row < args.rows) {",
        "if (threadIdx.x == 0 && row <= args.rows) {",
        "layer_norm.cu",
    ),
}
MISSING_BARRIER = Mutation(
    "rows.cuh",
    "    block_barrier();\n#pragma unroll\n    for (int n = 0; n < N; ++n) {\n      const A part",
    "#pragma unroll\n    for (int n = 0; n < N; ++n) {\n      const A part",
    "layer_norm.cu",
)
WRONG_TAILS = {
    "missing elements count in the variance": Mutation(
        "layer_norm.cu",
        "i < lanes.last ? widen(vector[i]) - mean : A(0)",
        "widen(vector[i]) - mean",
        "layer_norm.cu",
    ),
    "a vector too short": Mutation(
        "common.cuh",
        "return {0, size - begin < N ? static_cast<int>(size - begin) : N};",
        "return {0, size - begin < N ? static_cast<int>(size - begin) - 1 : N};",
        "layer_norm.cu",
    ),
}


def _exercise(mutation, sanitizer="address"):
    """Rows with a tail, over several warps, some of them at odd addresses."""
    device = Device(sanitizer, mutation)
    try:
        for shape in ((5, 41), (5, 1033)):
            test_layer_norm._check(device, shape, (torch.float32, torch.float32))
        test_layer_norm.test_same_bits_in_every_order_of_threads(device, (9, 600))
    finally:
        device.close()


@pytest.mark.parametrize("mutation", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS.keys())
def test_an_access_out_of_bounds_is_caught(mutation):
    with pytest.raises(SanitizerError, match=r"AddressSanitizer|misaligned"):
        _exercise(mutation)


@pytest.mark.parametrize("mutation", WRONG_TAILS.values(), ids=WRONG_TAILS.keys())
def test_a_wrong_tail_is_caught(mutation):
    with pytest.raises(AssertionError):
        _exercise(mutation)


def test_a_missing_barrier_is_caught_by_the_order_of_threads():
    with pytest.raises(AssertionError):
        _exercise(MISSING_BARRIER)


@pytest.mark.slow
def test_a_missing_barrier_is_caught_by_the_thread_sanitizer():
    with pytest.raises(SanitizerError, match="data race"):
        _exercise(MISSING_BARRIER, "thread")


@pytest.mark.slow
def test_the_thread_sanitizer_has_no_complaint_of_the_kernels():
    _exercise(None, "thread")
