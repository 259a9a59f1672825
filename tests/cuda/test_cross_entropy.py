"""The CUDA kernels of cross entropy on a shard of the vocabulary, emulated, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.device import Output, matrix, sums_dtype, vector
from tests.helpers.numerics import assert_as_accurate_as_torch
from tpcore.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
IGNORE = -100
STATISTICS = ("max", "sum_exp", "target_logit", "sum_logits")


def _shard(logits, target, vocab_start, num_classes, padding=0, offset=0):
    tokens, columns = logits.shape
    return {
        "tokens": tokens,
        "columns": columns,
        "live": max(0, min(columns, num_classes - vocab_start)),
        "vocab_start": vocab_start,
        "num_classes": num_classes,
        "ignore_index": IGNORE,
        "dtype": {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}[
            logits.dtype
        ],
        "logits": matrix(logits, padding, offset),
        "target": vector(target),
    }


def _statistics(device, logits, target, vocab_start, num_classes, padding=0, offset=0, **settings):
    found = device.run(
        "cross_entropy_statistics",
        shard=_shard(logits, target, vocab_start, num_classes, padding, offset),
        **{n: Output(target.shape, sums_dtype(logits.dtype)) for n in STATISTICS},
        **settings,
    )
    return [found[name] for name in STATISTICS]


def _backward(
    device, grad_loss, logits, target, maximum, sum_exp, start, classes, smoothing, **how
):
    settings = {k: how.pop(k) for k in ("order", "multiprocessors") if k in how}
    return device.run(
        "cross_entropy_backward",
        shard=_shard(logits, target, start, classes, **how),
        label_smoothing=smoothing,
        grad_loss=vector(grad_loss),
        max=vector(maximum),
        sum_exp=vector(sum_exp),
        grad_logits=Output(logits.shape, logits.dtype, how.get("offset", 0)),
        **settings,
    )["grad_logits"]


def _check(device, shape, dtype, start=0, classes=None, smoothing=0.0, **how):
    tokens, columns = shape
    classes = start + columns if classes is None else classes
    logits = torch.randn(shape).mul(4).to(dtype)
    target = torch.randint(0, classes, (tokens,))
    target[: tokens // 3] = IGNORE
    found = _statistics(device, logits, target, start, classes, **how)
    key = (start, classes, IGNORE)
    same = reference.cross_entropy_statistics(logits, target, *key)
    exact = reference.cross_entropy_statistics(logits.double(), target, *key)
    for name, f, s, e in zip(STATISTICS, found, same, exact, strict=True):
        assert_as_accurate_as_torch(f, s, e, name)
    grad_loss = torch.randn(tokens).to(sums_dtype(dtype))
    # Those of the whole vocabulary; this shard is some of it.
    maximum, sum_exp = found[0] + 0.5, found[1] + 1.0
    arguments = (maximum, sum_exp, start, classes)
    grad = _backward(device, grad_loss, logits, target, *arguments, smoothing, **how)
    rest = (start, classes, IGNORE, smoothing)
    same = reference.cross_entropy_backward(grad_loss, logits, target, maximum, sum_exp, *rest)
    exact = reference.cross_entropy_backward(
        *(t.double() for t in (grad_loss, logits)),
        target,
        maximum.double(),
        sum_exp.double(),
        *rest,
    )
    assert_as_accurate_as_torch(grad, same, exact, "grad_logits")
    dead = max(0, min(columns, classes - start))
    assert torch.equal(grad[:, dead:], torch.zeros_like(grad[:, dead:]))
    assert torch.equal(grad[: tokens // 3], torch.zeros_like(grad[: tokens // 3]))


@by_dtype
@pytest.mark.parametrize("columns", [1, 3, 17, 64, 129, 1000, 4099])
def test_accuracy(device, dtype, columns):
    _check(device, (4, columns), dtype)


@by_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_shard_with_padding(device, dtype, smoothing):
    """Columns beyond the last class are no classes; targets may be on another shard."""
    _check(device, (7, 120), dtype, start=240, classes=347, smoothing=smoothing)
    _check(device, (7, 40), dtype, start=400, classes=347, smoothing=smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_addresses(device, dtype):
    _check(device, (5, 64), dtype, padding=8)
    _check(device, (5, 64), dtype, padding=3)
    _check(device, (5, 64), dtype, offset=dtype.itemsize)


def test_targets_that_are_no_classes(device):
    logits, target = torch.randn(4, 10), torch.tensor([-3, 10, 4, IGNORE])
    found = _statistics(device, logits, target, 0, 10)[2]
    assert found[:2].isnan().all()
    assert found[2] == logits[2, 4]
    assert found[3] == 0


def test_infinite_logits(device):
    logits = torch.randn(3, 37)
    logits[0] = float("-inf")
    logits[1, 5] = float("-inf")
    logits[2, 5] = float("nan")
    target = torch.tensor([0, 1, 2])
    found = _statistics(device, logits, target, 0, 37)
    expected = reference.cross_entropy_statistics(logits, target, 0, 37, IGNORE)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f[:2], e[:2])
    assert found[1][2].isnan()
    assert found[3][2].isnan()


def test_a_growing_maximum(device):
    """Sums are rescaled again and again, and nothing overflows."""
    logits = torch.linspace(-3000, 3000, 5000).repeat(2, 1)
    logits[1] = logits[1].flip(0)
    target = torch.tensor([7, 7])
    found = _statistics(device, logits, target, 0, 5000)
    expected = reference.cross_entropy_statistics(logits.double(), target, 0, 5000, IGNORE)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=0)


def test_few_rows_are_split_and_many_take_turns(device):
    _check(device, (2, 9000), torch.float32, multiprocessors=40)
    for multiprocessors in (1, 3):
        _check(device, (3000, 5), torch.float32, multiprocessors=multiprocessors, order=1)


def test_nothing(device):
    empty, target = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    found = _statistics(device, empty, target, 0, 5)
    assert all(f.shape == (0,) for f in found)
    assert _backward(device, found[0], empty, target, found[0], found[1], 0, 5, 0.0).shape == (0, 5)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [30522, 50257, 131072])
def test_real_vocabularies(device, columns):
    _check(device, (3, columns), torch.bfloat16, smoothing=0.1)


def test_same_bits_in_every_order_of_threads(device):
    logits, target = torch.randn(3, 5000), torch.tensor([1, 2, 3])
    results = [_statistics(device, logits, target, 0, 5000, order=order) for order in (0, 1, 6)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
