from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.harness import (
    DEVICE,
    assert_grad_not_modified,
    assert_same,
    assert_same_bits_for_any_threads,
    by_backends,
    by_dtype,
    compare,
    compiled,
    leaves,
    require,
    run,
)
from tpcore.kernels import add_layer_norm, layer_norm, record_backends, use_backend

by_backend = by_backends("reference", "cpu")
OPS = torch.ops.tpcore
# Rows and columns that are odd, single, wider than every unrolled loop, and a row-block multiple.
SHAPES = [(1, 3), (5, 17), (7, 1023), (33, 384), (2, 3, 129), (100, 64), (3, 5000)]


def _plain(x, weight, bias, eps=1e-5):
    dtype = torch.float64 if x.dtype == torch.float64 else x.dtype
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _inputs(shape, dtypes=(torch.float64, torch.float64), weight=True, bias=True):
    x_dtype, parameter_dtype = dtypes
    columns = shape[-1]
    return (
        (torch.randn(shape) * 2 + 0.5).to(x_dtype),
        (torch.rand(columns) + 0.5).to(parameter_dtype) if weight else None,
        torch.randn(columns).to(parameter_dtype) if bias else None,
    )


@by_backend
@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(backend, dtypes, shape):
    compare(lambda *a: run("layer_norm", backend, layer_norm, *a), _plain, _inputs(shape, dtypes))


@by_backend
@by_dtype
@pytest.mark.parametrize("shape", [(5, 17), (33, 384)], ids=str)
def test_add_layer_norm_accuracy(backend, dtypes, shape):
    x, weight, bias = _inputs(shape, dtypes)

    def plain(x, residual, weight, bias):
        total = x + residual
        # The sum is rounded before it is normalized; so is that of the exact result.
        rounded = total + (total.to(dtypes[0]).to(total.dtype) - total).detach()
        return _plain(rounded, weight, bias), rounded

    inputs = x, torch.randn(shape).to(dtypes[0]), weight, bias
    compare(lambda *a: run("add_layer_norm", backend, add_layer_norm, *a), plain, inputs)


@by_backend
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no_weight"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradcheck(backend, weight, bias):
    inputs = leaves(*_inputs((6, 7), weight=weight, bias=bias))
    residual = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    require(backend)
    with use_backend(backend), record_backends() as calls:
        assert torch.autograd.gradcheck(layer_norm, inputs)
        assert torch.autograd.gradcheck(add_layer_norm, (inputs[0], residual, *inputs[1:]))
    assert set(calls) == {("layer_norm", backend), ("add_layer_norm", backend)}


@by_backend
@by_dtype
def test_one_column(backend, dtypes):
    x, weight, bias = leaves(*_inputs((6, 1), dtypes))
    y = run("layer_norm", backend, layer_norm, x, weight, bias)
    y.sum().backward()
    # The mean of one number is that number; torch may be off by a rounding, times 1 / sqrt(eps).
    tolerance = 1e-4 if backend == "reference" else 0
    torch.testing.assert_close(y, bias.to(x.dtype).expand(6, 1), rtol=0, atol=tolerance)
    assert x.grad.abs().max() < 1e-4  # zero, but for rounding times 1 / sqrt(eps)
    assert weight.grad.abs().max() < 1e-4


@by_backend
def test_add_layer_norm_is_its_composition(backend):
    x, weight, bias = leaves(*_inputs((9, 65), (torch.float32, torch.float32)))
    residual = torch.randn(9, 65, requires_grad=True)
    y, total = run("add_layer_norm", backend, add_layer_norm, x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, run("layer_norm", backend, layer_norm, total, weight, bias))
    # Either output alone carries gradient to both inputs.
    (only_total,) = torch.autograd.grad(total, x, torch.ones_like(y), retain_graph=True)
    assert torch.equal(only_total, torch.ones_like(x))
    from_y = torch.autograd.grad(y, (x, residual), torch.randn_like(y))
    assert torch.equal(*from_y)


@by_backend
def test_mixed_residual_dtype_is_promoted(backend):
    x, residual = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(4, 8)
    y, total = run("add_layer_norm", backend, add_layer_norm, x, residual)
    assert y.dtype == total.dtype == torch.float32
    assert torch.equal(total, x + residual)


@by_backend
@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (2, 0, 5)], ids=str)
def test_empty(backend, shape):
    if 0 in shape[-1:]:
        backend = "reference"  # a row of nothing has no kernel
        call = layer_norm
    else:
        call = lambda *a: run("layer_norm", backend, layer_norm, *a)  # noqa: E731
    x, weight, bias = leaves(*_inputs(shape, (torch.float32, torch.float32)))
    y = call(x, weight, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert not weight.grad.any()


@by_backend
@by_dtype
def test_strides(backend, dtypes):
    wide = torch.randn(40, 75).to(dtypes[0])
    _, weight, bias = _inputs((1, 37), dtypes)
    views = {
        "columns": wide[:, 5:42],  # rows start off every alignment
        "every_third_row": wide[::3, 1:38],
        "expanded": wide[:1, :37].expand(9, 37),
        "transposed": wide[:37].t(),
        "three_dimensions": wide[:, :74].view(40, 2, 37)[:, 1:, :],
    }
    for name, x in views.items():
        ours = run("layer_norm", backend, layer_norm, x, weight, bias)
        again = run("layer_norm", backend, layer_norm, x.contiguous(), weight, bias)
        assert_same(backend, ours, again)
        assert ours.is_contiguous(), name


def test_strided_rows_are_not_copied():
    require(DEVICE)
    x = torch.randn(64, 256)[:, 3:131]
    y, _, _ = OPS.layer_norm_forward(x, None, None, 1e-5)
    assert torch.equal(y, layer_norm(x.contiguous()))
    with pytest.raises(RuntimeError, match=r"columns that are not contiguous"):
        OPS.layer_norm_forward(torch.randn(8, 8).t(), None, None, 1e-5)


@by_backend
def test_normalized_shape(backend):
    x = torch.randn(3, 4, 5)
    weight, bias = torch.randn(4, 5), torch.randn(4, 5)
    ours = run("layer_norm", backend, layer_norm, x, weight, bias)
    torch.testing.assert_close(ours, F.layer_norm(x, (4, 5), weight, bias))
    bare = run("layer_norm", backend, layer_norm, x, normalized_shape=(4, 5))
    torch.testing.assert_close(bare, F.layer_norm(x, (4, 5)))
    arguments = leaves(x, weight, bias)
    run("layer_norm", backend, layer_norm, *arguments).pow(2).sum().backward()
    assert [a.grad.shape for a in arguments] == [x.shape, weight.shape, bias.shape]


@by_backend
def test_large_mean_keeps_the_variance(backend):
    x = torch.randn(4, 512) + 1e4
    ours = run("layer_norm", backend, layer_norm, x)
    exact = F.layer_norm(x.double(), (512,))
    assert (ours - exact).abs().max() < 1e-3


@by_backend
@by_dtype
def test_nan_and_infinity_stay_in_their_row(backend, dtypes):
    x = torch.randn(6, 50).to(dtypes[0])
    x[1, 7], x[4, 49] = float("nan"), float("inf")
    y = run("layer_norm", backend, layer_norm, x)
    assert y[[1, 4]].isnan().all()
    clean = [0, 2, 3, 5]
    assert torch.equal(y[clean], run("layer_norm", backend, layer_norm, x[clean]))


@by_backend
def test_grad_output_is_not_modified(backend):
    inputs = _inputs((6, 33), (torch.float32, torch.float32))
    assert_grad_not_modified(lambda *a: run("layer_norm", backend, layer_norm, *a), *inputs)
    residual = torch.randn(6, 33)
    assert_grad_not_modified(
        lambda *a: run("add_layer_norm", backend, add_layer_norm, *a),
        inputs[0],
        residual,
        *inputs[1:],
    )


def test_frozen_inputs_cost_nothing():
    require(DEVICE)
    x, weight, bias = _inputs((40, 8), (torch.float32, torch.float32))
    mean, rstd = OPS.layer_norm_forward(x, weight, bias, 1e-5)[1:]
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        grads = OPS.layer_norm_backward(x, x, mean, rstd, weight, None, *needs)
        assert [g.numel() > 0 for g in grads] == list(needs)
    x.requires_grad_()
    y = layer_norm(x, weight, bias)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_modified_sum_is_noticed():
    require(DEVICE)
    x = torch.randn(2, 3, 8, requires_grad=True)
    y, total = add_layer_norm(x, torch.randn(2, 3, 8))
    with torch.no_grad():
        total.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_result_may_be_modified_in_place():
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = layer_norm(x)
    y += 1
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_bits_do_not_depend_on_threads():
    require("cpu")
    inputs = _inputs((333, 200), (torch.float32, torch.float32))
    assert_same_bits_for_any_threads(lambda *a: run("layer_norm", "cpu", layer_norm, *a), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_opcheck(dtype, rows):
    require(DEVICE)
    x, weight, bias = _inputs((rows, 19), (dtype, torch.float32))
    residual = torch.randn(rows, 40)[:, 4:23].to(dtype)
    torch.library.opcheck(OPS.layer_norm_forward, (x, weight, bias, 1e-5))
    torch.library.opcheck(OPS.layer_norm_forward, (residual, None, None, 1e-5))
    torch.library.opcheck(OPS.add_layer_norm_forward, (x, residual, weight, bias, 1e-5))
    _, total, mean, rstd = OPS.add_layer_norm_forward(x, residual, weight, bias, 1e-5)
    for needs in ((True, True, True), (True, False, False)):
        arguments = (x, total, mean, rstd, weight, residual, *needs)
        torch.library.opcheck(OPS.layer_norm_backward, arguments)


@by_backend
def test_compiles_to_one_graph(backend):
    require(backend)

    def function(x, residual, weight, bias):
        y, total = add_layer_norm(x, residual, weight, bias)
        return layer_norm(y, weight, None) + total

    graph = compiled(function)
    with use_backend(backend):
        for rows in (6, 11):
            x, weight, bias = leaves(*_inputs((rows, 24), (torch.float32, torch.float32)))
            residual = torch.randn(rows, 24, requires_grad=True)
            inputs = x, residual, weight, bias
            ours, plain = graph(*inputs), function(*inputs)
            torch.testing.assert_close(ours, plain)
            grad = torch.randn_like(plain)
            for a, b in zip(
                torch.autograd.grad(ours, inputs, grad),
                torch.autograd.grad(plain, inputs, grad),
                strict=True,
            ):
                torch.testing.assert_close(a, b)


@by_backend
def test_autocast_changes_nothing(backend):
    x, weight, bias = _inputs((5, 16), (torch.bfloat16, torch.float32))
    outside = run("layer_norm", backend, layer_norm, x, weight, bias)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = run("layer_norm", backend, layer_norm, x, weight, bias)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, outside)


def test_errors_name_the_argument():
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"does not end in the normalized shape \(7,\)"):
        layer_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\)"):
        layer_norm(x, torch.ones(8), torch.ones(4))
    with pytest.raises(ValueError, match=r"residual \(4, 7\)"):
        add_layer_norm(x, torch.randn(4, 7))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    require(DEVICE)
    rows = 2**21 + 3
    x = torch.randn(1, 1024).to(torch.bfloat16).expand(rows, 1024)
    y = run("layer_norm", DEVICE, layer_norm, x)
    expected = run("layer_norm", DEVICE, layer_norm, x[:1])
    assert torch.equal(y[-3:], expected.expand(3, 1024))
