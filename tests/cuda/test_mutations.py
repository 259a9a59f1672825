"""Tests of the tests: mistakes that are planted in the kernels must be caught."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import (
    test_bias_dropout_residual,
    test_bias_gelu,
    test_cross_entropy,
    test_layer_norm,
    test_masked_softmax,
)
from tests.cuda.device import COMPILER, Device, Mutation, SanitizerError

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
FLOAT = (torch.float32, torch.float32)


def _layer_norm(device):
    """Rows with a tail, over several warps, some of them at odd addresses."""
    for shape in ((5, 41), (5, 1033)):
        test_layer_norm._check(device, shape, FLOAT)
    test_layer_norm.test_same_bits_in_every_order_of_threads(device, (9, 600))


def _bias_dropout_residual(device):
    test_bias_dropout_residual._check(device, (70, 67), FLOAT, column_offset=3)
    test_bias_dropout_residual.test_same_bits_in_every_order_of_threads(device)


def _bias_gelu(device):
    test_bias_gelu._check(device, (70, 67), FLOAT, "tanh", order=1)


def _masked_softmax(device):
    mask = torch.rand(2, 1, 1, 131) < 0.3
    test_masked_softmax._check(device, (2, 3, 4, 131), FLOAT[0], mask, causal=True, p=0.25)
    test_masked_softmax.test_causal(device, (1, 1, 9, 4))
    test_masked_softmax.test_not_a_number_and_infinity(device)
    test_masked_softmax.test_same_bits_in_every_order_of_threads(device)


def _cross_entropy(device):
    test_cross_entropy._check(device, (7, 123), FLOAT[0], start=240, classes=347, smoothing=0.1)
    test_cross_entropy.test_few_rows_are_split_and_many_take_turns(device)
    test_cross_entropy.test_same_bits_in_every_order_of_threads(device)


EXERCISES = {
    "layer_norm": _layer_norm,
    "bias_dropout_residual": _bias_dropout_residual,
    "bias_gelu": _bias_gelu,
    "masked_softmax": _masked_softmax,
    "cross_entropy": _cross_entropy,
}


def _exercise(op, mutation=None, sanitizer="address"):
    device = Device(sanitizer, mutation)
    try:
        EXERCISES[op](device)
    finally:
        device.close()


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
    "shared memory for half of the warps": Mutation(
        "rows.cuh",
        "using Scratch = A[2][N][kMaxWarps];",
        "using Scratch = A[2][N][4];",
        "layer_norm.cu",
    ),
}
MISSING_BARRIERS = {
    "between the warps of a row": Mutation(
        "rows.cuh",
        "    block_barrier();\n#pragma unroll\n    for (int n = 0; n < N; ++n) {",
        "#pragma unroll\n    for (int n = 0; n < N; ++n) {",
        "layer_norm.cu",
    ),
    "between the rows of a sum": Mutation(
        "columns.cuh",
        "    block_barrier();\n    if (threadIdx.y + half < rows) {",
        "    if (threadIdx.y + half < rows) {",
        "bias_gelu.cu",
    ),
    "between two sums": Mutation(
        "columns.cuh", "if (blockDim.y > 1) block_barrier();", "", "layer_norm.cu"
    ),
    "before scratch is used again": Mutation("rows.cuh", "turn_ ^= 1;", "", "layer_norm.cu"),
}
WRONG_TAILS = {
    "missing elements count in the variance": Mutation(
        "layer_norm.cu",
        "i < lanes.last ? vector[i] - mean : A(0)",
        "vector[i] - mean",
        "layer_norm.cu",
    ),
    "a vector too short": Mutation(
        "common.cuh",
        "rest >= N ? N : static_cast<int>(rest)};",
        "rest >= N ? N : static_cast<int>(rest) - 1};",
        "cross_entropy.cu",
    ),
    "keys beyond the causal limit": Mutation(
        "masked_softmax.cu",
        "at.query + args.keys - args.queries + 1, 0",
        "at.query + args.keys - args.queries + 2, 0",
        "masked_softmax.cu",
    ),
    "classes beyond the last": Mutation(
        "cross_entropy.cu",
        "grad[i] = i < live_lanes ?",
        "grad[i] = i <= live_lanes ?",
        "cross_entropy.cu",
    ),
    "bits of a neighbour": Mutation(
        "dropout.cuh", "return bits >> skip;", "return bits;", "bias_dropout_residual.cu"
    ),
    "a row without keys": Mutation(
        "masked_softmax.cu",
        "const A norm = dead ? A(0) : A(1) / sum[0];",
        "const A norm = A(1) / sum[0];",
        "masked_softmax.cu",
    ),
}


@pytest.mark.parametrize("mutation", OUT_OF_BOUNDS.values(), ids=OUT_OF_BOUNDS.keys())
def test_an_access_out_of_bounds_is_caught(mutation):
    with pytest.raises(SanitizerError, match=r"AddressSanitizer|misaligned|out of bounds"):
        _exercise(mutation.op, mutation)


@pytest.mark.parametrize("mutation", WRONG_TAILS.values(), ids=WRONG_TAILS.keys())
def test_a_wrong_tail_is_caught(mutation):
    with pytest.raises(AssertionError):
        _exercise(mutation.op, mutation)


def test_a_missing_barrier_is_caught_by_the_order_of_threads():
    mutation = next(iter(MISSING_BARRIERS.values()))
    with pytest.raises(AssertionError):
        _exercise(mutation.op, mutation)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MISSING_BARRIERS.values(), ids=MISSING_BARRIERS.keys())
def test_a_missing_barrier_is_caught_by_the_thread_sanitizer(mutation):
    with pytest.raises(SanitizerError, match="data race"):
        _exercise(mutation.op, mutation, "thread")


@pytest.mark.slow
@pytest.mark.parametrize("op", EXERCISES)
def test_the_thread_sanitizer_has_no_complaint_of_the_kernels(op):
    _exercise(op, sanitizer="thread")
