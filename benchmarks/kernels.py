"""Every kernel against torch eager and torch.compile, forward and backward, on one device.

    python benchmarks/run.py                  all cases, table and CSV under benchmarks/results/
    pytest benchmarks/kernels.py -k layer_norm

A case is op x direction x dtype x provider. Its figure of merit is the bandwidth a kernel that
moved only the unavoidable bytes would need for the same time (`min_bytes` below, one read of each
input and one write of each output), as a share of the bandwidth of a plain copy that is measured
in the same run. The working sets lie beyond the last-level cache of small machines; the table
says which device it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
PROVIDERS = ("tpcore", "eager", "compile")
QUICK = bool(os.environ.get("TPCORE_BENCH_QUICK"))

# One layer of BERT-large at 4096 tokens; `quick` is a tenth of it.
TOKENS = 512 if QUICK else 4096
HIDDEN, FEED_FORWARD, HEADS, LENGTH = 1024, 4096, 16, 256
VOCAB = 4096 if QUICK else 30592
BATCH = TOKENS // LENGTH
P = 0.1


@dataclass(frozen=True)
class Op:
    """One op: its inputs, its providers, and the bytes it cannot avoid."""

    inputs: Callable[[torch.dtype], list[Tensor]]
    tpcore: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    forward_bytes: Callable[[int], int]
    backward_bytes: Callable[[int], int]


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE).requires_grad_()


def _row_ids(*shape: int) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.arange(count, device=DEVICE).reshape(shape)


SEED = torch.tensor([1234], device=DEVICE)
TOKEN_ROWS = _row_ids(TOKENS)
QUERY_ROWS = _row_ids(BATCH, LENGTH)
KEY_MASK = torch.zeros(BATCH, 1, 1, LENGTH, dtype=torch.bool, device=DEVICE)
KEY_MASK[:, :, :, LENGTH - 16 :] = True
TARGETS = torch.arange(TOKENS, device=DEVICE) % VOCAB
SCALE = 64**-0.5


OPS = {
    "layer_norm": Op(
        inputs=lambda t: [
            _leaf(TOKENS, HIDDEN, dtype=t),
            _leaf(HIDDEN, dtype=t),
            _leaf(HIDDEN, dtype=t),
        ],
        tpcore=lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
        eager=lambda x, w, b: F.layer_norm(x, (HIDDEN,), w, b, 1e-5),
        forward_bytes=lambda s: 2 * s * TOKENS * HIDDEN,
        backward_bytes=lambda s: 3 * s * TOKENS * HIDDEN,
    ),
    "bias_gelu": Op(
        inputs=lambda t: [_leaf(TOKENS, FEED_FORWARD, dtype=t), _leaf(FEED_FORWARD, dtype=t)],
        tpcore=lambda x, b: kernels.bias_gelu(x, b),
        eager=lambda x, b: F.gelu(x + b),
        forward_bytes=lambda s: 2 * s * TOKENS * FEED_FORWARD,
        backward_bytes=lambda s: 3 * s * TOKENS * FEED_FORWARD,
    ),
    "masked_softmax": Op(
        inputs=lambda t: [_leaf(BATCH, HEADS, LENGTH, LENGTH, dtype=t)],
        tpcore=lambda x: kernels.masked_softmax(
            x, KEY_MASK, SCALE, dropout_p=P, seed=SEED, row_ids=QUERY_ROWS
        ),
        eager=lambda x: F.dropout(
            torch.softmax((x.float() * SCALE).masked_fill(KEY_MASK, -torch.inf), -1).to(x.dtype), P
        ),
        forward_bytes=lambda s: 2 * s * BATCH * HEADS * LENGTH * LENGTH,
        backward_bytes=lambda s: 3 * s * BATCH * HEADS * LENGTH * LENGTH,
    ),
    "bias_dropout_residual": Op(
        inputs=lambda t: [
            _leaf(TOKENS, HIDDEN, dtype=t),
            _leaf(HIDDEN, dtype=t),
            _leaf(TOKENS, HIDDEN, dtype=t),
        ],
        tpcore=lambda x, b, r: kernels.bias_dropout_residual(
            x, b, r, p=P, seed=SEED, row_ids=TOKEN_ROWS
        ),
        eager=lambda x, b, r: r + F.dropout(x + b, P),
        forward_bytes=lambda s: 3 * s * TOKENS * HIDDEN,
        backward_bytes=lambda s: 2 * s * TOKENS * HIDDEN,
    ),
    "cross_entropy": Op(
        inputs=lambda t: [_leaf(TOKENS, VOCAB, dtype=t)],
        tpcore=lambda x: kernels.cross_entropy(x, TARGETS),
        eager=lambda x: F.cross_entropy(x.float(), TARGETS, reduction="none"),
        forward_bytes=lambda s: s * TOKENS * VOCAB,
        backward_bytes=lambda s: 2 * s * TOKENS * VOCAB,
    ),
}


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _measure(benchmark, run: Callable[[], object], moved_bytes: int, **labels: str) -> None:
    def timed() -> None:
        run()
        _synchronize()

    timed()  # compile and warm up
    benchmark.extra_info.update(labels, min_bytes=moved_bytes)
    benchmark.pedantic(timed, rounds=5 if QUICK else 11, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_copy(benchmark, dtype):
    source = torch.randn(TOKENS, FEED_FORWARD, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    labels = {"op": "copy", "direction": "forward", "dtype": str(dtype), "provider": "torch"}
    _measure(benchmark, lambda: target.copy_(source), moved, **labels)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_kernel(benchmark, op, dtype, direction, provider):
    case = OPS[op]
    torch.manual_seed(0)
    inputs = case.inputs(dtype)
    function = case.tpcore if provider == "tpcore" else case.eager
    if provider == "compile":
        torch.compiler.reset()
        function = torch.compile(function, dynamic=False)
    labels = {"op": op, "direction": direction, "dtype": str(dtype), "provider": provider}
    size = inputs[0].element_size()
    if direction == "forward":
        _measure(benchmark, lambda: function(*inputs), case.forward_bytes(size), **labels)
    else:
        output = function(*inputs)
        grad = torch.randn_like(output)
        _measure(
            benchmark,
            lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True),
            case.backward_bytes(size),
            **labels,
        )
