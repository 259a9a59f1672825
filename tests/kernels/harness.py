"""What the tests of all ops share: run an op on a backend, and know which backend it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.helpers.device import DEVICE
from tests.helpers.numerics import assert_as_accurate_as_torch
from tpcore import _native
from tpcore.kernels import record_backends, use_backend
from tpcore.kernels.triton import refusal

# (dtype of x, dtype of the parameters)
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32": (torch.float16, torch.float32),
    "fp64": (torch.float64, torch.float64),
}


def by_backends(*names: str) -> pytest.MarkDecorator:
    """Runs a test on these backends, and on triton where it serves DEVICE.

    "cpu" stands for the compiled kernels of DEVICE.
    """
    names = tuple(DEVICE if name == "cpu" else name for name in names)
    return pytest.mark.parametrize("backend", names if refusal(DEVICE) else (*names, "triton"))


by_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())


def require(backend: str) -> None:
    """Skips where the library was knowingly not built; anything else is a failure later on."""
    if backend in ("cpu", "cuda"):
        if backend != DEVICE:
            pytest.skip(f"the tests run on {DEVICE}")
        status, built = _native.status(backend), _native.build_record().get(backend, {})
        if not status.loaded and not built.get("built", False):
            pytest.skip(f"no compiled library: {status.reason}")


def run(op: str, backend: str, function: Callable, *args, **kwargs):
    """Calls function, and asserts that `op` ran on `backend` and nowhere else."""
    require(backend)
    with use_backend(backend), record_backends() as calls:
        result = function(*args, **kwargs)
    assert set(calls) == {(op, backend)}, calls
    return result


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    """Detached copies that require grad."""
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def in_float64(*tensors: Tensor | None) -> list[Tensor | None]:
    return leaves(*(None if t is None else t.double() for t in tensors))


def gradients(outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor | None], grads):
    """The gradients of the inputs that are there."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = [grads] if isinstance(grads, Tensor) else list(grads)
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return torch.autograd.grad(outputs, [i for i in inputs if i is not None], grads)


def compare(ours: Callable, plain: Callable, inputs: Sequence[Tensor | None]) -> None:
    """Forward and every gradient of `ours` by the accuracy rule.

    Args:
        ours: the op under test, a function of the inputs.
        plain: the same from PyTorch's own ops, in whatever dtype its inputs have.
        inputs: tensors, or None where an optional one is left out.
    """
    mine, theirs, exact = leaves(*inputs), leaves(*inputs), in_float64(*inputs)
    results = [ours(*mine), plain(*theirs), plain(*exact)]
    results = [[r] if isinstance(r, Tensor) else list(r) for r in results]
    grads = [torch.randn(r.shape).to(m.dtype) for r, m in zip(results[2], results[0], strict=True)]
    for number, (y, t, e) in enumerate(zip(*results, strict=True)):
        assert_as_accurate_as_torch(y, t, e, f"output {number}")
    everything = [
        gradients(r, i, grads) for r, i in zip(results, (mine, theirs, exact), strict=True)
    ]
    for number, (y, t, e) in enumerate(zip(*everything, strict=True)):
        assert_as_accurate_as_torch(y, t, e, f"gradient {number}")


def assert_same(backend: str, a: Tensor, b: Tensor) -> None:
    """Equal bit for bit, but for the reference off the CPU: torch sums in any order."""
    bits = DEVICE == "cpu" or backend != "reference"
    torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if bits else {}))


def assert_grad_not_modified(function: Callable, *inputs: Tensor | None) -> None:
    """grad_output belongs to the caller: it comes back as it went in, and may be expanded."""
    arguments = leaves(*inputs)
    outputs = function(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = [torch.randn_like(o) for o in outputs]
    copies = [g.clone() for g in grads]
    wanted = [a for a in arguments if a is not None]
    first = torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
    assert all(torch.equal(g, c) for g, c in zip(grads, copies, strict=True))
    again = torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    expanded = [torch.ones((), dtype=o.dtype).expand(o.shape) for o in outputs]
    dense = [e.contiguous() for e in expanded]
    for a, b in zip(
        torch.autograd.grad(outputs, wanted, expanded, retain_graph=True),
        torch.autograd.grad(outputs, wanted, dense),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_same_bits_for_any_threads(function: Callable, *inputs: Tensor | None) -> None:
    """Forward and every gradient are equal bit for bit on one, two and three threads."""
    before, results, grad = torch.get_num_threads(), [], None
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            arguments = leaves(*inputs)
            y = function(*arguments)
            grad = torch.randn_like(y) if grad is None else grad
            results.append([y, *gradients(y, arguments, grad)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def compiled(function: Callable) -> Callable:
    """The function as one graph with symbolic shapes."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
