"""The CUDA kernels of layer norm, emulated, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.cuda.device import Output, matrix, sums_dtype, vector
from tests.helpers.numerics import assert_as_accurate_as_torch
from tests.kernels.harness import by_dtype

# Odd; one warp exactly; a warp's row of some vectors; several warps; a tail in each.
SHAPES = [(5, 3), (2, 256), (70, 67), (3, 1032), (2, 2309)]
EPS = 1e-5


def _forward(device, x, weight, bias, residual=None, padding=0, offset=0, **settings):
    rows, columns = x.shape
    parameter = next((p.dtype for p in (weight, bias) if p is not None), x.dtype)
    return device.run(
        "layer_norm_forward",
        rows=rows,
        columns=columns,
        eps=EPS,
        dtype=x.dtype,
        parameter_dtype=parameter,
        x=matrix(x, padding, offset),
        residual=matrix(residual, 2 * padding, offset),
        weight=vector(weight, offset and weight.element_size()),
        bias=vector(bias, offset and bias.element_size()),
        total=Output(x.shape, x.dtype, offset) if residual is not None else None,
        y=Output(x.shape, x.dtype, offset),
        mean=Output((rows,), sums_dtype(x.dtype)),
        rstd=Output((rows,), sums_dtype(x.dtype)),
        **settings,
    )


def _backward(device, grad_y, x, saved, weight, grad_total=None, padding=0, offset=0, **settings):
    rows, columns = x.shape
    sums = device.partial_sums(rows, settings.get("multiprocessors", 1))
    found = device.run(
        "layer_norm_backward",
        rows=rows,
        columns=columns,
        dtype=x.dtype,
        parameter_dtype=x.dtype if weight is None else weight.dtype,
        grad_y=matrix(grad_y, padding, offset),
        x=matrix(x, 2 * padding, offset),
        grad_total=matrix(grad_total, padding, offset),
        mean=vector(saved["mean"]),
        rstd=vector(saved["rstd"]),
        weight=vector(weight),
        grad_x=Output(x.shape, x.dtype, offset),
        grad_weight=Output((columns,), sums_dtype(x.dtype)),
        grad_bias=Output((columns,), sums_dtype(x.dtype)),
        partials=Output((sums, 2, columns), sums_dtype(x.dtype)),
        **settings,
    )
    del found["partials"]  # of which some may never have been needed
    return found


def _plain(x, weight, bias, grad_y):
    """PyTorch's y and gradients in the dtype of x."""
    inputs = [t.clone().requires_grad_() for t in (x, weight.to(x.dtype), bias.to(x.dtype))]
    y = F.layer_norm(inputs[0], x.shape[-1:], *inputs[1:], EPS)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


def _check(device, shape, dtypes, padding=0, offset=0, **settings):
    x = (torch.randn(shape) * 2 + 0.5).to(dtypes[0])
    weight, bias = (torch.rand(shape[1]) + 0.5).to(dtypes[1]), torch.randn(shape[1]).to(dtypes[1])
    grad_y = torch.randn(shape).to(dtypes[0])
    forward = _forward(device, x, weight, bias, None, padding, offset, **settings)
    backward = _backward(device, grad_y, x, forward, weight, None, padding, offset, **settings)
    exact = _plain(*(t.double() for t in (x, weight, bias, grad_y)))
    same = _plain(x, weight, bias, grad_y)
    for name, e, s in zip(("y", "grad_x", "grad_weight", "grad_bias"), exact, same, strict=True):
        found = (forward | backward)[name]
        # Ours come in float32 and are rounded by the caller.
        assert_as_accurate_as_torch(found.to(s.dtype), s, e, name)


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device, dtypes, shape):
    _check(device, shape, dtypes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_addresses(device, dtype):
    """Rows with gaps; a first element that no vector may start at."""
    _check(device, (5, 40), (dtype, dtype), padding=8)
    _check(device, (5, 40), (dtype, dtype), padding=3)
    _check(device, (5, 40), (dtype, dtype), offset=dtype.itemsize)


def test_one_column(device):
    x, weight, bias = torch.randn(70, 1), torch.randn(1), torch.randn(1)
    grad_y = torch.randn(70, 1)
    forward = _forward(device, x, weight, bias)
    assert torch.equal(forward["y"], bias.expand(70, 1))
    backward = _backward(device, grad_y, x, forward, weight)
    assert torch.equal(backward["grad_x"], torch.zeros(70, 1))
    torch.testing.assert_close(backward["grad_bias"], grad_y.sum(0))


def test_zero_rows(device):
    x, weight = torch.empty(0, 5), torch.ones(5)
    forward = _forward(device, x, weight, None)
    backward = _backward(device, x, x, forward, weight)
    assert forward["y"].shape == (0, 5)
    assert torch.equal(backward["grad_weight"], torch.zeros(5))
    assert torch.equal(backward["grad_bias"], torch.zeros(5))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 4102), torch.float64), ((1, 8200), torch.bfloat16), ((3, 8195), torch.float64)],
    ids=str,
)
def test_rows_longer_than_the_registers(device, shape, dtype):
    """Beyond the limit of backward alone, and of both."""
    _check(device, shape, (dtype, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [768, 1024, 2048, 4096, 8192, 16392, 33000])
def test_usual_and_long_rows(device, columns, dtype):
    _check(device, (3, columns), (dtype, dtype), order=1)


def test_more_rows_than_a_grid(device):
    """Blocks take several turns, and sums several rows; on one multiprocessor and on three."""
    for multiprocessors in (1, 3):
        _check(device, (700, 9), (torch.float32,) * 2, multiprocessors=multiprocessors)
        _check(device, (90, 300), (torch.bfloat16,) * 2, multiprocessors=multiprocessors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [67, 1032, 8200])
def test_residual(device, columns, dtype):
    x, residual, weight = (
        torch.randn(s).to(dtype) for s in ((3, columns), (3, columns), (columns,))
    )
    found = _forward(device, x, weight, None, residual, padding=1)
    assert torch.equal(found["total"], x + residual)
    alone = _forward(device, found["total"], weight, None)
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    # The gradient that reaches the sum from elsewhere is added.
    grad_y, extra = torch.randn(3, columns).to(dtype), torch.randn(3, columns).to(dtype)
    with_extra = _backward(device, grad_y, x, alone, weight, extra)["grad_x"]
    without = _backward(device, grad_y, x, alone, weight)["grad_x"]
    tolerance = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(with_extra, without + extra, rtol=tolerance, atol=tolerance)


def test_without_parameters(device):
    x, grad_y = torch.randn(5, 40), torch.randn(5, 40)
    forward = _forward(device, x, None, None)
    torch.testing.assert_close(forward["y"], F.layer_norm(x, (40,)))
    backward = _backward(device, grad_y, x, forward, None)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.layer_norm(leaf, (40,)), leaf, grad_y)
    torch.testing.assert_close(backward["grad_x"], expected)


@pytest.mark.parametrize("columns", [40, 4200])
def test_only_what_is_wanted(device, columns):
    """A null result is not written, and the others do not change."""
    x, grad_y = torch.randn(2, 9, columns, dtype=torch.float64)
    weight = torch.randn(columns, dtype=torch.float64)
    saved = _forward(device, x, weight, None)
    everything = _backward(device, grad_y, x, saved, weight)
    common = {
        "rows": 9,
        "columns": columns,
        "dtype": x.dtype,
        "parameter_dtype": x.dtype,
        "grad_y": matrix(grad_y),
        "x": matrix(x),
        "mean": vector(saved["mean"]),
        "rstd": vector(saved["rstd"]),
        "weight": vector(weight),
    }
    partials = Output((device.partial_sums(9), 2, columns), x.dtype)
    for wanted in ({"grad_x"}, {"grad_weight"}, {"grad_bias"}, {"grad_x", "grad_bias"}):
        outputs = {name: Output(everything[name].shape, x.dtype) for name in wanted}
        if wanted != {"grad_x"}:
            outputs["partials"] = partials
        found = device.run("layer_norm_backward", **common, **outputs)
        assert all(torch.equal(found[name], everything[name]) for name in wanted)


def test_a_large_mean_costs_no_digits(device):
    x = torch.randn(4, 300) + 3000
    exact = F.layer_norm(x.double(), (300,))
    torch.testing.assert_close(
        _forward(device, x, None, None)["y"].double(), exact, rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("shape", [(9, 40), (9, 600)], ids=str)
def test_same_bits_in_every_order_of_threads(device, shape):
    x, weight, grad_y = torch.randn(shape), torch.randn(shape[1]), torch.randn(shape)
    results = []
    for order in (0, 1, 5):
        forward = _forward(device, x, weight, None, order=order, multiprocessors=2)
        backward = _backward(device, grad_y, x, forward, weight, order=order, multiprocessors=2)
        results.append(forward | backward)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_a_refused_launch_is_reported(device):
    x = torch.randn(3, 5)
    common = {"rows": 3, "columns": 5, "eps": EPS, "dtype": x.dtype, "parameter_dtype": x.dtype}
    outputs = {"y": Output((3, 5), x.dtype), "mean": Output((3,), x.dtype)}
    outputs["rstd"] = Output((3,), x.dtype)
    status, _ = device.launch("layer_norm_forward", refuse=719, **common, x=matrix(x), **outputs)
    assert status == 719
    status, _ = device.launch("layer_norm_forward", **common, x=matrix(x), **outputs)
    assert status == 0
