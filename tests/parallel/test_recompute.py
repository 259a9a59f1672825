from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.ranks import run_ranks
from tpcore.parallel.collectives import all_reduce, copy_to, reduce_from
from tpcore.parallel.random import RandomStreams
from tpcore.parallel.recompute import checkpoint_activations


def _noisy(x, weight, streams, calls):
    """Draws from torch's default stream and from a named one."""
    calls.append(None)
    y = F.dropout(x @ weight, 0.5)
    with streams.fork("own"):
        y = F.dropout(torch.tanh(y), 0.5)
        with streams.fork("other"):
            y = y + torch.randn_like(y)
    return y @ weight


def _run(checkpointed, backwards=1):
    torch.manual_seed(0)
    streams, calls = RandomStreams("cpu"), []
    streams.add("own", 7)
    streams.add("other", 8)
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    y = x
    for _ in range(3):
        if checkpointed:
            y = checkpoint_activations(_noisy, y, weight, streams, calls, streams=[streams])
        else:
            y = _noisy(y, weight, streams, calls)
    between = torch.rand(3)
    for left in reversed(range(backwards)):
        y.square().sum().backward(retain_graph=left > 0)
    with streams.fork("own"):
        after = torch.rand(3)
    return [y.detach(), x.grad, weight.grad, between, after, torch.rand(3)], len(calls)


@pytest.mark.parametrize("backwards", [1, 2])
def test_every_stream_is_replayed_and_then_goes_on(backwards):
    plain, once = _run(False, backwards)
    ours, calls = _run(True, backwards)
    assert (once, calls) == (3, 3 * (1 + backwards))
    for name, expected, got in zip(
        ("output", "x", "weight", "default", "own", "later"), plain, ours, strict=True
    ):
        assert torch.equal(expected, got), name


def test_a_stream_that_is_not_named_gives_other_numbers(monkeypatch):
    """What the argument is for: without it the second call draws on."""
    plain, _ = _run(False)
    original = checkpoint_activations
    monkeypatch.setitem(
        globals(),
        "checkpoint_activations",
        lambda *args, streams: original(*args),
    )
    forgetful, _ = _run(True)
    assert torch.equal(plain[0], forgetful[0])
    assert not torch.equal(plain[2], forgetful[2])


def test_nothing_is_computed_again_without_gradients():
    calls = []
    streams = RandomStreams("cpu")
    streams.add("own", 7)
    streams.add("other", 8)
    with torch.no_grad():
        y = checkpoint_activations(
            _noisy, torch.ones(2, 4), torch.ones(4, 4), streams, calls, streams=[streams]
        )
    assert not y.requires_grad
    assert len(calls) == 1


def test_autocast_is_the_same_in_the_second_call():
    dtypes = []

    def function(x, weight):
        y = x @ weight
        dtypes.append(y.dtype)
        return y.sin()

    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint_activations(function, x, weight)
    y.float().sum().backward()
    assert dtypes == [torch.bfloat16] * 2


def _check_collectives(tp):
    def function(x):
        return reduce_from(torch.tanh(copy_to(x, tp) * (1 + tp.rank)), tp)

    results = []
    for checkpointed in (False, True):
        x = torch.randn(5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = x
        for _ in range(2):
            y = checkpoint_activations(function, y) if checkpointed else function(y)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(all_reduce(x.grad, tp), tp.size * x.grad)


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_are_repeated_in_step(size):
    run_ranks(_check_collectives, size)
