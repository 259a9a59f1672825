"""The CUDA kernels of bias and GeLU, emulated, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.device import Output, matrix, sums_dtype, vector
from tests.helpers.numerics import assert_as_accurate_as_torch
from tests.helpers.units import EXACT_GELU, every_magnitude, units_in_the_last_place
from tests.kernels.harness import by_dtype
from tpcore.kernels import reference

KINDS = {"none": 0, "tanh": 1, "erf_1.41421": 2}
SHAPES = [(5, 3), (70, 67), (2, 1103)]


def _forward(device, x, bias, kind, padding=0, offset=0, **settings):
    rows, columns = x.shape
    return device.run(
        "bias_gelu_forward",
        rows=rows,
        columns=columns,
        dtype=x.dtype,
        parameter_dtype=x.dtype if bias is None else bias.dtype,
        gelu=KINDS[kind],
        x=matrix(x, padding, offset),
        bias=vector(bias, offset and bias.element_size()),
        y=Output(x.shape, x.dtype, offset),
        **settings,
    )["y"]


def _backward(device, grad_y, x, bias, kind, padding=0, offset=0, **settings):
    rows, columns = x.shape
    sums = device.partial_sums(rows, settings.get("multiprocessors", 1))
    found = device.run(
        "bias_gelu_backward",
        rows=rows,
        columns=columns,
        dtype=x.dtype,
        parameter_dtype=x.dtype if bias is None else bias.dtype,
        gelu=KINDS[kind],
        grad_y=matrix(grad_y, padding, offset),
        x=matrix(x, 2 * padding, offset),
        bias=vector(bias),
        grad_x=Output(x.shape, x.dtype, offset),
        grad_bias=Output((columns,), sums_dtype(x.dtype)),
        partials=Output((sums, columns), sums_dtype(x.dtype)),
        **settings,
    )
    return found["grad_x"], found["grad_bias"]


def _plain(x, bias, grad_y, kind):
    """y, grad_x and grad_bias from PyTorch in the dtype of x."""
    inputs = [x.clone().requires_grad_(), bias.to(x.dtype).clone().requires_grad_()]
    z = inputs[0] + inputs[1]
    if kind == "erf_1.41421":
        y = z * 0.5 * (1.0 + torch.erf(z / 1.41421))
    else:
        y = torch.nn.functional.gelu(z, approximate=kind)
    return y.detach(), *torch.autograd.grad(y, inputs, grad_y)


def _check(device, shape, dtypes, kind, **how):
    x, grad_y = (torch.randn(shape).mul(3).to(dtypes[0]) for _ in range(2))
    bias = torch.randn(shape[1]).to(dtypes[1])
    y = _forward(device, x, bias, kind, **how)
    grad_x, grad_bias = _backward(device, grad_y, x, bias, kind, **how)
    exact = _plain(x.double(), bias.double(), grad_y.double(), kind)
    same = _plain(x, bias, grad_y, kind)
    for name, found, e, s in zip("yxb", (y, grad_x, grad_bias), exact, same, strict=True):
        assert_as_accurate_as_torch(found.to(s.dtype), s, e, name)


@by_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device, dtypes, shape, kind):
    _check(device, shape, dtypes, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_addresses(device, dtype):
    _check(device, (5, 40), (dtype, dtype), "none", padding=8)
    _check(device, (5, 40), (dtype, dtype), "tanh", padding=3)
    _check(device, (5, 40), (dtype, dtype), "none", offset=dtype.itemsize)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_magnitude(device, dtype, kind):
    """Tails keep their relative accuracy; infinities and NaN come out as from PyTorch."""
    x = torch.cat([torch.linspace(-15, 15, 401), torch.logspace(-30, 30, 61), torch.zeros(1)])
    special = torch.tensor([float("inf"), float("nan"), -1e30, 1e30, -40.0])
    x = torch.cat([x, special])[None].to(dtype)
    found = _forward(device, x, None, kind)
    expected = reference.bias_gelu(x.double(), None, kind).to(dtype)
    finite = expected.isfinite()
    torch.testing.assert_close(found[~finite], expected[~finite], equal_nan=True)
    # PyTorch's own tails lose relative accuracy in float64 too: compare where it does not matter.
    tolerance = (
        {"rtol": 3e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    )
    torch.testing.assert_close(found[finite], expected[finite], **tolerance)
    ones = torch.ones_like(x)
    slope, _ = _backward(device, ones, x, None, kind)
    assert slope[0, -2] == 1
    assert abs(slope[0, -3].item()) < 1e-100


@pytest.mark.parametrize("kind", KINDS)
def test_units_in_the_last_place(device, kind):
    """As on the CPU: both evaluate tpcore/math.h."""
    x = torch.cat([every_magnitude(499979), torch.linspace(-13.5, 5, 6000)])
    y = _forward(device, x[None], None, kind)[0]
    assert units_in_the_last_place(y, EXACT_GELU[kind](x.double())) <= 2.0


def test_without_bias_and_only_what_is_wanted(device):
    x, grad_y = torch.randn(9, 40), torch.randn(9, 40)
    both = _backward(device, grad_y, x, None, "none")
    common = {"rows": 9, "columns": 40, "dtype": x.dtype, "parameter_dtype": x.dtype, "gelu": 0}
    common |= {"x": matrix(x), "grad_y": matrix(grad_y)}
    alone = device.run("bias_gelu_backward", **common, grad_x=Output((9, 40), x.dtype))
    assert torch.equal(alone["grad_x"], both[0])
    partials = Output((device.partial_sums(9), 40), x.dtype)
    alone = device.run(
        "bias_gelu_backward", **common, grad_bias=Output((40,), x.dtype), partials=partials
    )
    assert torch.equal(alone["grad_bias"], both[1])


def test_zero_rows_and_many(device):
    empty = torch.empty(0, 5)
    assert _forward(device, empty, None, "none").shape == (0, 5)
    assert torch.equal(_backward(device, empty, empty, None, "none")[1], torch.zeros(5))
    for multiprocessors in (1, 3):
        how = {"multiprocessors": multiprocessors, "order": multiprocessors}
        _check(device, (2100, 9), (torch.float32,) * 2, "tanh", **how)
