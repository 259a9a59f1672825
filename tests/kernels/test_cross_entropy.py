from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.harness import (
    DEVICE,
    assert_grad_not_modified,
    assert_same_bits_for_any_threads,
    by_backends,
    compare,
    compiled,
    leaves,
    require,
    run,
)
from tpcore.kernels import cross_entropy, record_backends, reference, use_backend
from tpcore.kernels.backend import raw_ops

by_backend = by_backends("reference", "cpu")
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
OP = "cross_entropy"


def _plain(logits, target, label_smoothing=0.0):
    """PyTorch's own, in float32 where logits are in half precision, as the loss is there."""
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    return F.cross_entropy(wide, target, reduction="none", label_smoothing=label_smoothing)


def _targets(tokens, classes):
    target = torch.randint(classes, (tokens,))
    target[::5] = -100
    return target


@by_backend
@by_dtype
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 129), (33, 1000), (5, 30522)], ids=str)
def test_accuracy(backend, dtype, label_smoothing, shape):
    target = _targets(*shape)
    target[-1] = shape[1] - 1
    compare(
        lambda x: run(OP, backend, cross_entropy, x, target, label_smoothing=label_smoothing),
        lambda x: _plain(x, target, label_smoothing),
        ((torch.randn(shape) * 5).to(dtype),),
    )


@by_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("num_classes", [None, 8])
def test_gradcheck(backend, label_smoothing, num_classes):
    require(backend)
    logits = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    target = _targets(6, 8)

    def function(x):
        return cross_entropy(x, target, num_classes=num_classes, label_smoothing=label_smoothing)

    with use_backend(backend), record_backends() as calls:
        assert torch.autograd.gradcheck(function, (logits,))
    assert set(calls) == {(OP, backend)}


@by_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_padding_columns_are_left_out(backend, label_smoothing):
    logits = torch.randn(9, 50)
    logits[:, 37:] = float("nan")
    logits.requires_grad_()
    target = _targets(9, 37)
    options = {"num_classes": 37, "label_smoothing": label_smoothing}
    loss = run(OP, backend, cross_entropy, logits, target, **options)
    torch.testing.assert_close(loss, _plain(logits[:, :37], target, label_smoothing))
    loss.sum().backward()
    assert not logits.grad[:, 37:].any()
    assert logits.grad[:, :37].isfinite().all()


def _combined(shards):
    """What a collective would make of the statistics of all shards."""
    maxima, sums, targets, totals = (torch.stack(s) for s in zip(*shards, strict=True))
    maximum = maxima.amax(0)
    return maximum, (sums * (maxima - maximum).exp()).sum(0), targets.sum(0), totals.sum(0)


@by_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_shards_make_the_whole(backend, label_smoothing, num_shards):
    # With eight shards of 16 the last one holds nothing but padding.
    num_classes, padded, tokens = 107, 128, 21
    logits = torch.randn(tokens, padded) * 3
    target = _targets(tokens, num_classes)
    whole, grad = logits[:, :num_classes].clone().requires_grad_(), torch.randn(tokens)
    expected = _plain(whole, target, label_smoothing)
    expected.backward(grad)

    pieces = leaves(*logits.chunk(num_shards, dim=1))
    width = padded // num_shards
    statistics = []
    options = {"num_classes": num_classes, "label_smoothing": label_smoothing}
    for rank, piece in enumerate(pieces):
        collect = lambda *s: (statistics.append(s), s)[1]  # noqa: E731
        run(
            OP,
            backend,
            cross_entropy,
            piece,
            target,
            vocab_start=rank * width,
            combine=collect,
            **options,
        )
    assert all(
        s.dtype == torch.float32 and s.shape == (tokens,) for four in statistics for s in four
    )
    for rank, piece in enumerate(pieces):
        combine = lambda *_: _combined(statistics)  # noqa: E731
        loss = run(
            OP,
            backend,
            cross_entropy,
            piece,
            target,
            vocab_start=rank * width,
            combine=combine,
            **options,
        )
        torch.testing.assert_close(loss, expected)
        loss.backward(grad)
    found = torch.cat([p.grad for p in pieces], dim=1)
    torch.testing.assert_close(found[:, :num_classes], whole.grad)
    assert not found[:, num_classes:].any()


@by_backend
def test_ignored_tokens_have_no_loss_and_no_gradient(backend):
    logits = torch.randn(4, 9)
    logits[1] = float("nan")
    logits.requires_grad_()
    target = torch.tensor([3, -1, 8, -1])
    loss = run(OP, backend, cross_entropy, logits, target, ignore_index=-1)
    assert loss[[1, 3]].tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert not logits.grad[[1, 3]].any()
    assert logits.grad[[0, 2]].abs().sum() > 0


@by_backend
@by_dtype
def test_nan_and_infinity(backend, dtype):
    logits = torch.randn(4, 70).to(dtype)
    logits[0, 69] = float("nan")
    logits[1, 5] = float("inf")
    logits[2, 5] = -float("inf")
    target = torch.tensor([1, 2, 3, 4])
    loss = run(OP, backend, cross_entropy, logits, target)
    assert loss[:2].isnan().all()
    assert loss[2:].isfinite().all()


@by_backend
def test_large_logits_do_not_overflow(backend):
    logits = torch.tensor([[3e4, 3e4 - 2.0, -3e4]], requires_grad=True)
    loss = run(OP, backend, cross_entropy, logits, torch.tensor([1]))
    torch.testing.assert_close(loss, _plain(logits, torch.tensor([1])))


def test_a_target_that_is_no_class():
    logits = torch.randn(3, 5, device="cpu")
    with pytest.raises(ValueError, match=r"target\[1\] is 5; expected a class 0\.\.4"):
        cross_entropy(logits, torch.tensor([0, 5, 1], device="cpu"))


@by_backend
def test_without_the_check_the_loss_itself_is_nan(backend):
    """Where checking would mean waiting for the device, every shard says so in its statistics."""
    require(backend)
    ops = reference if backend == "reference" else raw_ops(backend)
    for start in (0, 5):
        target = torch.tensor([0, 12, 7, -1, -100])
        four = ops.cross_entropy_statistics(torch.randn(5, 5), target, start, 10, -100)
        assert four[2].isnan().tolist() == [False, True, False, True, False]


@by_backend
def test_a_shard_of_minus_infinity_takes_no_part(backend):
    logits = torch.randn(3, 8)
    logits[:, 4:] = -float("inf")
    target = torch.tensor([0, 3, 1])
    statistics = []
    for start in (0, 4):
        collect = lambda *s: (statistics.append(s), s)[1]  # noqa: E731
        options = {"vocab_start": start, "num_classes": 8, "combine": collect}
        run(OP, backend, cross_entropy, logits[:, start : start + 4], target, **options)
    assert torch.equal(statistics[1][1], torch.zeros(3))
    loss = run(OP, backend, cross_entropy, logits, target)
    torch.testing.assert_close(loss, _plain(logits, target))
    nothing = run(OP, backend, cross_entropy, torch.full((1, 8), -float("inf")), target[:1])
    assert nothing.isnan().all()


@by_backend
def test_strides_and_empty(backend):
    wide = torch.randn(40, 75)
    target = _targets(40, 37)
    for logits, some in (
        (wide[:, 5:42], target),
        (wide[::3, 1:38], target[::3]),
        (wide[:1, :37].expand(9, 37), target[:9]),
        (wide[:37, :37].t(), target[:37]),
    ):
        ours = run(OP, backend, cross_entropy, logits, some)
        torch.testing.assert_close(ours, _plain(logits, some))
    logits = torch.randn(0, 37, requires_grad=True)
    run(OP, backend, cross_entropy, logits, target[:0]).sum().backward()
    assert logits.grad.shape == (0, 37)


@by_backend
def test_grad_output_is_not_modified(backend):
    target = _targets(6, 33)
    function = lambda x: run(OP, backend, cross_entropy, x, target)  # noqa: E731
    assert_grad_not_modified(function, torch.randn(6, 33))


@by_backend
def test_compiles_to_one_graph(backend):
    require(backend)

    def function(logits, target):
        return cross_entropy(logits, target, num_classes=20, label_smoothing=0.1)

    graph = compiled(function)
    with use_backend(backend):
        for tokens in (6, 11):
            (logits,) = leaves(torch.randn(tokens, 24))
            target = _targets(tokens, 20)
            ours, plain = graph(logits, target), function(logits, target)
            torch.testing.assert_close(ours, plain)
            grad = torch.randn_like(plain)
            mine, theirs = (torch.autograd.grad(y, logits, grad) for y in (ours, plain))
            torch.testing.assert_close(mine, theirs)


@by_backend
def test_autocast_changes_nothing(backend):
    logits, target = torch.randn(5, 16, dtype=torch.bfloat16), _targets(5, 16)
    outside = run(OP, backend, cross_entropy, logits, target)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = run(OP, backend, cross_entropy, logits, target)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_bits_do_not_depend_on_threads():
    require("cpu")
    target = _targets(50, 700)
    assert_same_bits_for_any_threads(
        lambda x: run(OP, "cpu", cross_entropy, x, target), torch.randn(50, 700)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_opcheck(dtype, tokens):
    require(DEVICE)
    ops = torch.ops.tpcore
    logits, target = torch.randn(tokens, 40)[:, 4:23].to(dtype), _targets(tokens, 25)
    torch.library.opcheck(ops.cross_entropy_statistics, (logits, target, 10, 25, -100))
    maximum, sum_exp, _, _ = ops.cross_entropy_statistics(logits, target, 10, 25, -100)
    arguments = (torch.randn(tokens), logits, target, maximum, sum_exp, 10, 25, -100, 0.1)
    torch.library.opcheck(ops.cross_entropy_backward, arguments)


def test_errors_name_the_argument():
    logits, target = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    for arguments, options, message in (
        ((logits, target[:3]), {}, r"logits has shape \(4, 8\) and target \(3,\)"),
        ((logits, target.int()), {}, r"target is torch.int32; expected int64"),
        ((logits, target), {"label_smoothing": 1.0}, r"label_smoothing=1.0"),
        ((logits, target), {"vocab_start": 8}, r"num_classes is None on a shard"),
        ((logits, target), {"num_classes": 9}, r"classes 0\.\.7 of num_classes=9; pass combine"),
    ):
        with pytest.raises(ValueError, match=message):
            cross_entropy(*arguments, **options)
