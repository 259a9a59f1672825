from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.harness import (
    DEVICE,
    assert_grad_not_modified,
    assert_same_bits_for_any_threads,
    by_backends,
    by_dtype,
    compare,
    compiled,
    leaves,
    require,
    run,
)
from tpcore.kernels import bias_gelu, record_backends, use_backend

by_backend = by_backends("reference", "cpu")
by_formula = pytest.mark.parametrize("approximate", ["none", "tanh", "erf_1.41421"])


def _plain(x, bias, approximate):
    z = x if bias is None else x + bias.to(x.dtype)
    if approximate == "erf_1.41421":
        return z * 0.5 * (1.0 + torch.erf(z / 1.41421))
    return F.gelu(z, approximate=approximate)


def _inputs(shape, dtypes=(torch.float64, torch.float64)):
    return (torch.randn(shape) * 3).to(dtypes[0]), torch.randn(shape[-1:]).to(dtypes[1])


@by_backend
@by_dtype
@by_formula
@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (2, 3, 33), (70, 384)], ids=str)
def test_accuracy(backend, dtypes, approximate, shape):
    compare(
        lambda *a: run("bias_gelu", backend, bias_gelu, *a, approximate),
        lambda *a: _plain(*a, approximate),
        _inputs(shape, dtypes),
    )


@by_backend
@by_formula
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_without_bias_over_the_whole_range(backend, approximate, dtype):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-38, 4, 200), torch.zeros(1)])
    compare(
        lambda x: run("bias_gelu", backend, bias_gelu, x, None, approximate),
        lambda x: _plain(x, None, approximate),
        (torch.cat([x, -x]).to(dtype),),
    )


@by_backend
@by_formula
def test_gradcheck(backend, approximate):
    require(backend)
    with use_backend(backend), record_backends() as calls:
        x, bias = leaves(*_inputs((5, 7)))
        assert torch.autograd.gradcheck(lambda *a: bias_gelu(*a, approximate), (x, bias))
        assert torch.autograd.gradcheck(lambda x: bias_gelu(x, None, approximate), (x,))
    assert set(calls) == {("bias_gelu", backend)}


@by_backend
def test_the_three_formulas_differ(backend):
    x = torch.linspace(-4, 4, 1001)
    y = [run("bias_gelu", backend, bias_gelu, x, None, a) for a in ("none", "tanh", "erf_1.41421")]
    assert 1e-4 < (y[0] - y[1]).abs().max() < 1e-3
    assert 1e-7 < (y[0] - y[2]).abs().max() < 1e-5


@by_backend
@by_formula
def test_limits_and_nan(backend, approximate):
    large = 1e4 if backend == "reference" else 1e30  # beyond, PyTorch itself gives NaN
    x = torch.tensor([float("nan"), large, -large, 0.0, -0.0], requires_grad=True)
    y = run("bias_gelu", backend, bias_gelu, x, None, approximate)
    assert y[0].isnan()
    assert torch.equal(y[1:], torch.tensor([large, 0.0, 0.0, 0.0]))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad[0].isnan()
    assert torch.equal(grad[1:], torch.tensor([1.0, 0.0, 0.5, 0.5]))


@by_backend
def test_strides_and_empty(backend):
    wide = torch.randn(40, 75)
    bias = torch.randn(37)
    for x in (wide[:, 5:42], wide[::3, 1:38], wide[:1, :37].expand(9, 37), wide[:37].t()[:, :37]):
        ours = run("bias_gelu", backend, bias_gelu, x, bias)
        dense = run("bias_gelu", backend, bias_gelu, x.contiguous(), bias)
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-6)
    x, bias = leaves(torch.randn(0, 37), bias)
    run("bias_gelu", backend, bias_gelu, x, bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(37))


@by_backend
def test_grad_output_is_not_modified(backend):
    function = lambda *a: run("bias_gelu", backend, bias_gelu, *a)  # noqa: E731
    assert_grad_not_modified(function, *_inputs((6, 33), (torch.float32, torch.float32)))


@by_backend
@by_formula
def test_compiles_to_one_graph(backend, approximate):
    require(backend)
    function = lambda x, bias: bias_gelu(x, bias, approximate)  # noqa: E731
    graph = compiled(function)
    with use_backend(backend):
        for rows in (6, 11):
            inputs = leaves(*_inputs((rows, 24), (torch.float32, torch.float32)))
            ours, plain = graph(*inputs), function(*inputs)
            torch.testing.assert_close(ours, plain)
            grad = torch.randn_like(plain)
            mine, theirs = (torch.autograd.grad(y, inputs, grad) for y in (ours, plain))
            torch.testing.assert_close(mine, theirs)


@by_backend
def test_autocast_changes_nothing(backend):
    x, bias = _inputs((5, 16), (torch.bfloat16, torch.float32))
    outside = run("bias_gelu", backend, bias_gelu, x, bias)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = run("bias_gelu", backend, bias_gelu, x, bias)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, outside)


def test_frozen_inputs_cost_nothing():
    require(DEVICE)
    x, bias = _inputs((40, 8), (torch.float32, torch.float32))
    for needs in ((True, False), (False, True)):
        grads = torch.ops.tpcore.bias_gelu_backward(x, x, bias, "none", *needs)
        assert [g.numel() > 0 for g in grads] == list(needs)


@by_formula
def test_bits_do_not_depend_on_threads(approximate):
    require("cpu")
    inputs = _inputs((333, 200), (torch.float32, torch.float32))
    assert_same_bits_for_any_threads(
        lambda *a: run("bias_gelu", "cpu", bias_gelu, *a, approximate), *inputs
    )


@by_formula
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 50])
def test_opcheck(approximate, dtype, rows):
    require(DEVICE)
    ops = torch.ops.tpcore
    x, bias = _inputs((rows, 19), (dtype, torch.float32))
    strided = torch.randn(rows, 40)[:, 4:23].to(dtype)
    torch.library.opcheck(ops.bias_gelu_forward, (x, bias, approximate))
    torch.library.opcheck(ops.bias_gelu_forward, (strided, None, approximate))
    torch.library.opcheck(ops.bias_gelu_backward, (strided, x, bias, approximate, True, True))
    torch.library.opcheck(ops.bias_gelu_backward, (x, strided, None, approximate, True, False))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"approximate='erf'; expected one of none, tanh"):
        bias_gelu(torch.randn(2, 4), None, "erf")
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); expected \(4,\)"):
        bias_gelu(torch.randn(2, 4), torch.randn(3))
