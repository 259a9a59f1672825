"""The CUDA kernels of bias, dropout and residual, and of the mask, emulated."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.device import Output, dropout_key, matrix, sums_dtype, vector
from tests.helpers.numerics import assert_as_accurate_as_torch
from tests.kernels.harness import by_dtype
from tpcore._philox import philox_keep_mask

SHAPES = [(5, 3), (70, 67), (3, 264), (2, 1103)]
SEED, STREAM = -(7 << 40) - 12345, 77


def _row_ids(rows):
    return (torch.arange(rows) * 3 << 20) + 5


def _keep(p, rows, columns, column_offset=0):
    seed = torch.tensor([SEED])
    ids = _row_ids(rows)[None]
    return philox_keep_mask(seed, ids, p, STREAM, columns, column_offset, 0, 1)[0, 0]


def _forward(device, x, bias, residual, p, column_offset=0, padding=0, offset=0, **settings):
    rows, columns = x.shape
    return device.run(
        "bias_dropout_residual_forward",
        rows=rows,
        columns=columns,
        dtype=x.dtype,
        parameter_dtype=x.dtype if bias is None else bias.dtype,
        x=matrix(x, padding, offset),
        bias=vector(bias, offset and bias.element_size()),
        residual=matrix(residual, 2 * padding, offset),
        key=dropout_key(p, SEED, STREAM, _row_ids(rows), column_offset),
        scale=1 / (1 - p),
        y=Output(x.shape, x.dtype, offset),
        **settings,
    )["y"]


def _backward(device, grad_y, p, column_offset=0, padding=0, offset=0, **settings):
    rows, columns = grad_y.shape
    sums = device.partial_sums(rows, settings.get("multiprocessors", 1))
    found = device.run(
        "bias_dropout_residual_backward",
        rows=rows,
        columns=columns,
        dtype=grad_y.dtype,
        grad_y=matrix(grad_y, padding, offset),
        key=dropout_key(p, SEED, STREAM, _row_ids(rows), column_offset),
        scale=1 / (1 - p),
        grad_x=Output(grad_y.shape, grad_y.dtype, offset),
        grad_bias=Output((columns,), sums_dtype(grad_y.dtype)),
        partials=Output((sums, columns), sums_dtype(grad_y.dtype)),
        **settings,
    )
    return found["grad_x"], found["grad_bias"]


def _plain(x, bias, residual, grad_y, keep, p):
    """y, grad_x and grad_bias in the dtype of x."""
    y = torch.where(keep, (x + bias) * (1 / (1 - p)), 0) + residual
    grad_x = torch.where(keep, grad_y * (1 / (1 - p)), 0)
    return y, grad_x, grad_x.sum(0)


def _check(device, shape, dtypes, p=0.25, column_offset=0, **how):
    x, residual, grad_y = (torch.randn(shape).to(dtypes[0]) for _ in range(3))
    bias = torch.randn(shape[1]).to(dtypes[1])
    keep = _keep(p, *shape, column_offset)
    y = _forward(device, x, bias, residual, p, column_offset, **how)
    grad_x, grad_bias = _backward(device, grad_y, p, column_offset, **how)
    inputs = x, bias, residual, grad_y
    exact = _plain(*(t.double() for t in inputs), keep, p)
    same = _plain(*(t.to(dtypes[0]) for t in inputs), keep, p)
    for name, found, e, s in zip("yxb", (y, grad_x, grad_bias), exact, same, strict=True):
        assert_as_accurate_as_torch(found.to(s.dtype), s, e, name)
    # Where the mask says no, there is exactly nothing.
    assert torch.equal(grad_x == 0, ~keep | (grad_y == 0))


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(device, dtypes, shape):
    _check(device, shape, dtypes)


@pytest.mark.parametrize("column_offset", [1, 2, 3, 4, 1 << 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_first_column(device, dtype, column_offset):
    _check(device, (3, 45), (dtype, dtype), column_offset=column_offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_addresses(device, dtype):
    _check(device, (5, 40), (dtype, dtype), padding=8)
    _check(device, (5, 40), (dtype, dtype), padding=3)
    _check(device, (5, 40), (dtype, dtype), offset=dtype.itemsize)


def test_without_bias_residual_and_dropout(device):
    x = torch.randn(5, 19)
    assert torch.equal(_forward(device, x, None, None, 0.0), x)
    grad_x, grad_bias = _backward(device, x, 0.0)
    assert torch.equal(grad_x, x)
    torch.testing.assert_close(grad_bias, x.sum(0))


def test_only_what_is_wanted(device):
    grad_y = torch.randn(9, 40)
    grad_x, _ = _backward(device, grad_y, 0.5)
    key = dropout_key(0.5, SEED, STREAM, _row_ids(9))
    common = {"rows": 9, "columns": 40, "dtype": grad_y.dtype, "key": key, "scale": 2.0}
    alone = Output((9, 40), grad_y.dtype)
    found = device.run(
        "bias_dropout_residual_backward", **common, grad_y=matrix(grad_y), grad_x=alone
    )
    assert torch.equal(found["grad_x"], grad_x)


def test_what_is_dropped_is_zero_whatever_it_was(device):
    x = torch.full((3, 64), float("nan"))
    y = _forward(device, x, None, None, 0.5)
    assert torch.equal(y.isnan(), _keep(0.5, 3, 64))
    assert torch.equal(y[~y.isnan()], torch.zeros_like(y[~y.isnan()]))


def test_zero_rows_and_many(device):
    empty = torch.empty(0, 5)
    assert _forward(device, empty, None, None, 0.5).shape == (0, 5)
    assert torch.equal(_backward(device, empty, 0.5)[1], torch.zeros(5))
    for multiprocessors in (1, 3):
        _check(device, (2100, 9), (torch.float32,) * 2, multiprocessors=multiprocessors)


def test_same_bits_in_every_order_of_threads(device):
    grad_y = torch.randn(50, 40)
    results = [
        _backward(device, grad_y, 0.5, order=order, multiprocessors=2) for order in (0, 1, 9)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("columns", [1, 16, 33, 160])
@pytest.mark.parametrize("column_offset", [0, 3])
def test_the_mask(device, columns, column_offset):
    """Bit-equal to the generator in plain PyTorch, for every head and row."""
    ids, heads, head_offset = _row_ids(6).view(2, 3), 4, 11
    found = device.run(
        "dropout_mask",
        batch=2,
        heads=heads,
        queries=3,
        columns=columns,
        key=dropout_key(0.3, SEED, STREAM, ids, column_offset, head_offset),
        keep=Output((2, heads, 3, columns), torch.bool),
    )["keep"]
    expected = philox_keep_mask(
        torch.tensor([SEED]), ids, 0.3, STREAM, columns, column_offset, head_offset, heads
    )
    assert torch.equal(found, expected)
