"""Tensors that start anywhere, with gaps between rows, give what aligned, dense ones give.

Around and between the rows stands NaN: to read it would show in the results.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.harness import by_backends, run
from tpcore.kernels import (
    add_layer_norm,
    bias_dropout_residual,
    bias_gelu,
    cross_entropy,
    layer_norm,
    masked_softmax,
    packed_attention,
)

SEED = torch.tensor([1234567])
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _moved(dense: Tensor, offset: int, gap: int) -> Tensor:
    """The same values, `offset` elements after an aligned address, `gap` elements between rows."""
    if dense.dim() == 0:
        return dense
    strides, step = [1], dense.shape[-1] + gap
    for size in reversed(dense.shape[:-1]):
        strides.insert(0, step)
        step = step * size + gap
    buffer = torch.full((offset + step + 64,), float("nan")).to(dense.dtype)
    view = buffer.as_strided(dense.shape, strides, offset)
    return view.copy_(dense)


def _row_ids(rows: int) -> Tensor:
    return torch.arange(rows) * 0x3_0000_0007


# Op -> a function of its differentiable inputs, and these for a number of rows and columns.
def _cases(rows: int, columns: int) -> dict:
    x, residual = torch.randn(rows, columns), torch.randn(rows, columns)
    weight, bias = torch.rand(columns) + 0.5, torch.randn(columns)
    key = {"p": 0.3, "seed": SEED, "row_ids": _row_ids(rows)}
    attention = {"dropout_p": 0.3, "seed": SEED, "row_ids": _row_ids(rows)[None]}
    mask = torch.rand(1, 1, rows, columns) < 0.2
    target = torch.arange(rows) % columns
    cases = {
        "layer_norm": (layer_norm, (x, weight, bias)),
        "add_layer_norm": (add_layer_norm, (x, residual, weight, bias)),
        "bias_dropout_residual": (
            lambda *a: bias_dropout_residual(*a, **key),
            (x, bias, residual),
        ),
        "masked_softmax": (
            lambda s: masked_softmax(s, mask, 0.5, **attention),
            (torch.randn(1, 2, rows, columns),),
        ),
        "cross_entropy": (lambda x: cross_entropy(x, target, label_smoothing=0.1), (x,)),
    }
    for kind in ("none", "tanh", "erf_1.41421"):
        cases[f"bias_gelu_{kind}"] = (lambda x, b, kind=kind: bias_gelu(x, b, kind), (x, bias))
    lengths = torch.tensor([0, rows // 2, rows], dtype=torch.int32)
    cases["packed_attention"] = (
        lambda qkv: packed_attention(
            qkv, lengths, dropout_p=0.3, seed=SEED, row_ids=_row_ids(rows)
        ),
        (torch.randn(rows, 2, 3, columns),),
    )
    return cases


NAMES = list(_cases(1, 1))


def _results(name: str, backend: str, function, inputs, place) -> list[Tensor]:
    """Outputs and gradients, with every tensor where `place` puts it."""
    inputs = [place(t).detach().requires_grad_() for t in inputs]
    op = "bias_gelu" if name.startswith("bias_gelu") else name
    outputs = run(op, backend, function, *inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.manual_seed(1)
    dense = [torch.randn(o.shape).to(o.dtype) for o in outputs]
    grads = [place(g) for g in dense]
    found = torch.autograd.grad(outputs, inputs, grads)
    assert all(torch.equal(g, d) for g, d in zip(grads, dense, strict=True)), "grad_output changed"
    return [*outputs, *found]


by_backend = by_backends("cpu")


@by_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (4, 64), (3, 1), (1, 129), (0, 7)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_addresses(name, shape, dtype, backend):
    """In every bit on the CPU. On CUDA the address decides which thread adds what."""
    if name == "packed_attention" and backend != "cpu":
        pytest.skip("packed attention is on the CPU alone")
    function, inputs = _cases(*shape)[name]
    inputs = [t.to(dtype) for t in inputs]
    expected = _results(name, backend, function, inputs, Tensor.clone)
    for offset, gap in ((1, 0), (3, 5), (0, 1), (7, 16)):
        found = _results(
            name, backend, function, inputs, lambda t, o=offset, g=gap: _moved(t, o, g)
        )
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            where = f"result {number} at offset {offset}, gap {gap}"
            if backend == "cpu":
                assert torch.equal(a, b), where
            else:
                torch.testing.assert_close(a, b, rtol=ROUNDING[a.dtype], atol=1e-5, msg=where)
