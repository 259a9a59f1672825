"""The CUDA kernels of masked softmax, emulated, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.device import Buffer, Output, _bytes, dropout_key, vector
from tests.helpers.numerics import assert_as_accurate_as_torch
from tpcore._philox import philox_keep_mask
from tpcore.kernels import reference

SEED, STREAM, HEAD_OFFSET = 99, 5, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KEYS = [1, 2, 3, 17, 31, 33, 127, 128, 129, 1000, 1100]


def _row_ids(batch, queries):
    return (torch.arange(batch * queries) * 7 << 20).view(batch, queries)


def _scores(tensor, offset=0):
    """Data and strides of a [b, n, sq, sk] tensor, gaps included."""
    size = 1 + sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((size if tensor.numel() else 0,), (1,))
    return Buffer(_bytes(flat), offset), tensor.stride()[:3]


def _forward(device, scores, mask=None, scale=1.0, causal=False, p=0.0, offset=0, **settings):
    batch, heads, queries, keys = scores.shape
    data, strides = _scores(scores, offset)
    values = {"scores": data, "scores_strides": strides}
    if mask is not None:
        full = mask.expand(scores.shape)
        strides = tuple(0 if f == 1 else s for f, s in zip(mask.shape, full.stride(), strict=True))
        values |= {"mask": vector(mask.contiguous()), "mask_strides": strides}
    if p > 0:
        values["probs"] = Output(scores.shape, scores.dtype, offset)
    return device.run(
        "masked_softmax_forward",
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        dtype=scores.dtype,
        scale=scale,
        causal=causal,
        key=dropout_key(p, SEED, STREAM, _row_ids(batch, queries), 0, HEAD_OFFSET),
        dropout_scale=1 / (1 - p),
        y=Output(scores.shape, scores.dtype, offset),
        **values,
        **settings,
    )


def _backward(device, grad_y, probs, scale=1.0, p=0.0, offset=0, **settings):
    batch, heads, queries, keys = probs.shape
    (grad_data, grad_strides), (data, strides) = _scores(grad_y, offset), _scores(probs, offset)
    return device.run(
        "masked_softmax_backward",
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        dtype=probs.dtype,
        grad_y=grad_data,
        grad_y_strides=grad_strides,
        probs=data,
        probs_strides=strides,
        scale=scale,
        key=dropout_key(p, SEED, STREAM, _row_ids(batch, queries), 0, HEAD_OFFSET),
        dropout_scale=1 / (1 - p),
        grad_scores=Output(probs.shape, probs.dtype, offset),
        **settings,
    )["grad_scores"]


def _plain(scores, grad_y, mask, scale, causal, keep, p):
    """y and grad_scores from PyTorch in the dtype of scores."""
    leaf = scores.clone().requires_grad_()
    z = leaf * scale
    masked = reference.masked_positions(scores, mask, causal)
    if masked is not None:
        z = z.masked_fill(masked, float("-inf"))
    y = torch.softmax(z, dim=-1)
    if masked is not None:
        y = y.masked_fill(masked.all(dim=-1, keepdim=True), 0.0)
    if keep is not None:
        y = torch.where(keep, y * (1 / (1 - p)), 0)
    (grad,) = torch.autograd.grad(y, leaf, grad_y)
    return y.detach(), grad.nan_to_num()  # PyTorch's gradient of a dead row is NaN


def _check(device, shape, dtype, mask=None, causal=False, p=0.0, scale=0.7, **how):
    scores, grad_y = torch.randn(shape).mul(2).to(dtype), torch.randn(shape).to(dtype)
    keep = None
    if p > 0:
        ids = _row_ids(shape[0], shape[2])
        seed = torch.tensor([SEED])
        keep = philox_keep_mask(seed, ids, p, STREAM, shape[3], 0, HEAD_OFFSET, shape[1])
    forward = _forward(device, scores, mask, scale, causal, p, **how)
    probs = forward.get("probs", forward["y"])
    grad_scores = _backward(device, grad_y, probs, scale, p, **how)
    exact = _plain(scores.double(), grad_y.double(), mask, scale, causal, keep, p)
    same = _plain(scores, grad_y, mask, scale, causal, keep, p)
    assert_as_accurate_as_torch(forward["y"], same[0], exact[0], "y")
    assert_as_accurate_as_torch(grad_scores, same[1], exact[1], "grad_scores")
    if keep is not None:
        assert torch.equal(forward["y"] == 0, ~keep | (probs == 0))
    return forward["y"]


@by_dtype
@pytest.mark.parametrize("keys", KEYS)
def test_accuracy(device, dtype, keys):
    """Any number of keys: rows start at every address, and tails have every length."""
    _check(device, (1, 2, 3, keys), dtype)


@pytest.mark.parametrize("keys", [5, 64, 129])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("broadcast", range(16))
def test_every_shape_of_mask(device, keys, causal, broadcast):
    shape = (2, 3, 4, keys)
    mask = torch.rand([1 if broadcast >> i & 1 else s for i, s in enumerate(shape)]) < 0.4
    mask[-1, -1, -1, :] = True  # at least one row has no live key
    dtype = DTYPES[broadcast % 4]
    y = _check(device, shape, dtype, mask, causal)
    assert torch.equal(y[-1, -1, -1], torch.zeros(keys, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 2, 5, 5), (1, 1, 9, 4), (1, 2, 3, 70)], ids=str)
def test_causal(device, shape):
    """Aligned at the end; queries before the first key see nothing."""
    y = _check(device, shape, torch.float32, causal=True)
    future = torch.ones(shape[2:], dtype=torch.bool).triu(shape[3] - shape[2] + 1)
    assert torch.equal(y[..., future], torch.zeros_like(y[..., future]))


@by_dtype
@pytest.mark.parametrize("keys", [7, 64, 131])
def test_dropout(device, dtype, keys):
    mask = torch.rand(2, 1, 1, keys) < 0.3
    _check(device, (2, 3, 4, keys), dtype, mask, p=0.25)


def test_scores_beyond_the_causal_limit_are_not_looked_at(device):
    scores = torch.randn(1, 1, 6, 40)
    future = torch.ones(6, 40, dtype=torch.bool).triu(35)
    expected = _forward(device, scores, causal=True)["y"]
    scores[0, 0, future] = float("nan")
    assert torch.equal(_forward(device, scores, causal=True)["y"], expected)


def test_not_a_number_and_infinity(device):
    scores = torch.randn(1, 1, 5, 9)
    scores[..., 0, 3] = float("nan")
    scores[..., 1, :] = float("-inf")  # live, and yet nothing
    scores[..., 2, 4] = float("inf")
    scores[..., 3, 4] = float("-inf")
    mask = torch.zeros(1, 1, 5, 9, dtype=torch.bool)
    mask[..., 4, :] = True
    found = _forward(device, scores, mask)["y"]
    expected = reference.masked_softmax(scores, mask, 1.0, False, 0.0, None, 0, None, 0)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_addresses(device, dtype):
    """Scores that are a slice of a wider tensor, and transposed; vectors that cannot be whole."""
    wide = torch.randn(2, 4, 3, 80).to(dtype)
    for scores in (wide[..., 3:67], wide.transpose(1, 2), wide[:, ::2, :, 8:72]):
        expected = _forward(device, scores.contiguous())["y"]
        assert torch.equal(_forward(device, scores)["y"], expected)
        grad = _backward(device, scores, expected)
        assert torch.equal(grad, _backward(device, scores.contiguous(), expected))
    _check(device, (1, 2, 3, 64), dtype, offset=dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_longer_than_the_registers(device, dtype):
    keys = 4100 if dtype == torch.float64 else 8200
    _check(device, (1, 1, 2, keys), dtype, torch.rand(1, 1, 1, keys) < 0.4, causal=True, p=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [4096, 4097, 16385, 33000])
def test_long_rows(device, keys):
    _check(device, (1, 1, 2, keys), torch.bfloat16, torch.rand(1, 1, 1, keys) < 0.4, p=0.25)


def test_more_rows_than_a_grid(device):
    for multiprocessors in (1, 3):
        how = {"multiprocessors": multiprocessors, "order": 2}
        _check(device, (7, 9, 19, 6), torch.float32, causal=True, p=0.5, **how)


def test_nothing(device):
    for shape in ((0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)):
        assert _forward(device, torch.empty(shape))["y"].shape == shape


def test_same_bits_in_every_order_of_threads(device):
    scores = torch.randn(1, 2, 3, 1100)
    results = [_forward(device, scores, order=order)["y"] for order in (0, 1, 4)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
