"""Every kernel against torch eager and torch.compile, forward and backward, on one device.

    python benchmarks/run.py                  all cases, table and CSV under benchmarks/results/
    pytest benchmarks/kernels.py -k layer_norm

A case is op x regime x direction x dtype x provider. Its figure of merit is the bandwidth that a
kernel which moved only the unavoidable bytes (one read of each input, one write of each output)
would need for the same time, as a share of the bandwidth of a plain copy in the same regime and
run. Regimes:

    inside    an eighth of a BERT-large layer's work, on the same tensors in every round
    beyond    a whole one, on sets of tensors that take turns and are together four times as large
              as the last-level cache; the copy takes turns as well, into memory that exists already
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tpcore import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
PROVIDERS = ("tpcore", "eager", "compile")
QUICK = bool(os.environ.get("TPCORE_BENCH_QUICK"))

# One layer of BERT-large at 4096 tokens; `quick` is an eighth of it.
TOKENS = {"inside": 512, "beyond": 512 if QUICK else 4096}
HIDDEN, FEED_FORWARD, HEADS, LENGTH = 1024, 4096, 16, 256
VOCAB = 4096 if QUICK else 30592
P, SCALE = 0.1, 64**-0.5


@dataclass(frozen=True)
class Case:
    """One op on one number of tokens in one dtype.

    Attributes:
        shapes: of the inputs that have gradients; the first is the largest.
        tpcore, eager: the op on these inputs; eager is what torch.compile compiles.
        forward_elements, backward_elements: how many elements must be read or written.
    """

    shapes: list[tuple[int, ...]]
    tpcore: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    forward_elements: int
    backward_elements: int


def layer_norm(tokens: int) -> Case:
    """Of hidden states."""
    size = tokens * HIDDEN
    return Case(
        [(tokens, HIDDEN), (HIDDEN,), (HIDDEN,)],
        lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, (HIDDEN,), w, b, 1e-5),
        2 * size,
        3 * size,
    )


def bias_gelu(tokens: int) -> Case:
    """Of the feed-forward layer."""
    size = tokens * FEED_FORWARD
    return Case(
        [(tokens, FEED_FORWARD), (FEED_FORWARD,)],
        lambda x, b: kernels.bias_gelu(x, b),
        lambda x, b: F.gelu(x + b),
        2 * size,
        3 * size,
    )


def masked_softmax(tokens: int) -> Case:
    """Of attention scores, with padding and dropout."""
    batch = tokens // LENGTH
    mask = torch.zeros(batch, 1, 1, LENGTH, dtype=torch.bool, device=DEVICE)
    mask[:, :, :, LENGTH - 16 :] = True
    seed = torch.tensor([1234], device=DEVICE)
    row_ids = torch.arange(tokens, device=DEVICE).view(batch, LENGTH)
    size = batch * HEADS * LENGTH * LENGTH

    def eager(x: Tensor) -> Tensor:
        probs = torch.softmax((x.float() * SCALE).masked_fill(mask, -torch.inf), -1)
        return F.dropout(probs.to(x.dtype), P)

    return Case(
        [(batch, HEADS, LENGTH, LENGTH)],
        lambda x: kernels.masked_softmax(x, mask, SCALE, dropout_p=P, seed=seed, row_ids=row_ids),
        eager,
        3 * size,  # the probabilities before dropout are an output too: backward needs them
        3 * size,
    )


def bias_dropout_residual(tokens: int) -> Case:
    """Of hidden states."""
    seed, row_ids = torch.tensor([1234], device=DEVICE), torch.arange(tokens, device=DEVICE)
    size = tokens * HIDDEN
    return Case(
        [(tokens, HIDDEN), (HIDDEN,), (tokens, HIDDEN)],
        lambda x, b, r: kernels.bias_dropout_residual(x, b, r, p=P, seed=seed, row_ids=row_ids),
        lambda x, b, r: r + F.dropout(x + b, P),
        3 * size,
        2 * size,
    )


def cross_entropy(tokens: int) -> Case:
    """Of the vocabulary of BERT."""
    targets = torch.arange(tokens, device=DEVICE) % VOCAB
    size = tokens * VOCAB
    return Case(
        [(tokens, VOCAB)],
        lambda x: kernels.cross_entropy(x, targets),
        lambda x: F.cross_entropy(x.float(), targets, reduction="none"),
        size,
        2 * size,
    )


OPS = {
    op.__name__: op
    for op in (layer_norm, bias_gelu, masked_softmax, bias_dropout_residual, cross_entropy)
}


def last_level_cache_bytes() -> int:
    """Of the device: of the first CPU, or of the GPU."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text()
        return int(text.rstrip("K\n")) << 10
    except (OSError, ValueError):
        return 32 << 20


def number_of_sets(regime: str, bytes_of_one: int) -> int:
    """How many sets of tensors take turns."""
    if regime == "inside":
        return 1
    return max(2, -(-4 * last_level_cache_bytes() // bytes_of_one))


def _measure(benchmark, turns: list[Callable[[], object]], moved_bytes: int, **labels: str) -> None:
    order = itertools.cycle(turns)

    def timed() -> None:
        next(order)()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(labels, min_bytes=moved_bytes)
    # Warm-up compiles, and lets every turn find the memory of its result mapped.
    rounds = 5 if QUICK else 15
    benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=len(turns) + 2)


by_regime = pytest.mark.parametrize("regime", TOKENS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@by_dtype
@by_regime
def test_copy(benchmark, regime, dtype):
    shape = TOKENS[regime], HIDDEN
    moved = 2 * shape[0] * shape[1] * dtype.itemsize
    pairs = []
    for _ in range(number_of_sets(regime, moved)):
        source = torch.randn(shape, device=DEVICE).to(dtype)
        pairs.append((source, torch.zeros_like(source)))
    turns = [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]
    labels = {"op": "copy", "regime": regime, "direction": "forward", "dtype": str(dtype)}
    _measure(benchmark, turns, moved, provider="torch", **labels)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@by_dtype
@by_regime
@pytest.mark.parametrize("op", OPS)
def test_kernel(benchmark, op, regime, dtype, direction, provider):
    case = OPS[op](TOKENS[regime])
    function = case.tpcore if provider == "tpcore" else case.eager
    if provider == "compile":
        torch.compiler.reset()
        function = torch.compile(function, dynamic=False)
    elements = case.forward_elements if direction == "forward" else case.backward_elements
    moved = elements * dtype.itemsize
    torch.manual_seed(0)
    turns: list[Callable[[], object]] = []
    for _ in range(number_of_sets(regime, moved)):
        inputs = [
            torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in case.shapes
        ]
        if direction == "forward":
            turns.append(lambda inputs=inputs: function(*inputs))
            continue
        output = function(*inputs)
        grad = torch.randn_like(output)
        turns.append(
            lambda inputs=inputs, output=output, grad=grad: torch.autograd.grad(
                output, inputs, grad, retain_graph=True
            )
        )
    labels = {"op": op, "regime": regime, "direction": direction, "dtype": str(dtype)}
    _measure(benchmark, turns, moved, provider=provider, **labels)
