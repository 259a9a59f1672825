from __future__ import annotations

import pytest
import torch

from tests.helpers.device import DEVICE, on_the_cpu
from tests.helpers.ranks import run_ranks
from tests.kernels.harness import require
from tpcore.parallel import collectives, shared_memory
from tpcore.parallel.collectives import (
    all_gather,
    all_reduce,
    all_reduce_in_place,
    barrier,
    broadcast,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]

# name -> (arguments after tp, kind of value before, kind after); the kinds are explained in
# tpcore/parallel/collectives.py.
AUTOGRAD = {
    "copy_to": ((), "one", "copies"),
    "reduce_from": ((), "parts", "one"),
    "scatter_to": ((-1,), "one", "shards"),
    "gather_from": ((-1,), "shards", "one"),
    "gather_from_sequence": ((), "shards", "copies"),
    "reduce_scatter_to_sequence": ((), "parts", "shards"),
    "scatter_to_sequence": ((), "one", "shards"),
    "copy_all_to": ((), "one", "copies"),
}


def _function(name):
    if name != "copy_all_to":
        return getattr(collectives, name)

    def in_two_pieces(x, tp):
        """copy_all_to as a function of one tensor: of its halves, one of them in another shape."""
        first, second = x.chunk(2)
        nothing, first, second = collectives.copy_all_to((None, first, second.t()), tp)
        assert nothing is None
        return torch.cat((first, second.t()))

    return in_two_pieces


def _of_rank(rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small integers [4, 8], another table on each rank; their sums are exact in every dtype."""
    return ((torch.arange(32).view(4, 8) * 7 + rank * 5) % 11).to(dtype)


def _strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with the strides of a transposed tensor."""
    y = x.t().contiguous().t()
    assert not y.is_contiguous()
    return y


def _check_raw(tp, dtype):
    every = [_of_rank(rank, dtype) for rank in range(tp.size)]
    mine = _of_rank(tp.rank, dtype)
    for x in (mine.clone(), _strided(mine)):
        assert torch.equal(all_reduce(x, tp), sum(every))
        assert torch.equal(all_reduce(x, tp, "max"), torch.stack(every).amax(0))
        assert torch.equal(all_gather(x, tp), torch.cat(every))
        assert torch.equal(all_gather(x, tp, dim=-1), torch.cat(every, dim=-1))
        assert torch.equal(reduce_scatter(x, tp), sum(every).chunk(tp.size)[tp.rank])
        for source in range(tp.size):
            assert torch.equal(broadcast(x, tp, source), every[source])
        assert torch.equal(x, mine), "a collective modified its input"
        assert all_reduce(x, tp).dtype == dtype
    assert all_reduce(torch.ones(3, 0, dtype=dtype), tp).shape == (3, 0)
    buffer = mine.clone()
    assert all_reduce_in_place(buffer, tp) is buffer
    assert torch.equal(buffer, sum(every))
    barrier(tp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_raw_collectives(size, dtype):
    run_ranks(_check_raw, size, dtype)


def _check_started(tp, shared, rows):
    every = [_of_rank(rank).repeat(rows, 1) for rank in range(tp.size)]
    x = every[tp.rank]
    expected = {
        start_all_reduce: sum(every),
        start_all_gather: torch.cat(every),
        start_reduce_scatter: sum(every).chunk(tp.size)[tp.rank],
    }
    channel = shared_memory.channel_of(tp)
    assert channel is not None
    shared_memory._CHANNELS[tp.process_group] = channel if shared else None
    try:
        for start, value in expected.items():
            started = start(x, tp)
            product = x.t() @ x
            assert torch.equal(wait(started), value), start.__name__
            assert torch.equal(product, x.t() @ x)
        # Two under way: whichever is waited for first, both are what they should be.
        first, second = start_all_gather(x, tp), start_reduce_scatter(x, tp)
        assert torch.equal(wait(second), expected[start_reduce_scatter])
        assert torch.equal(wait(first), expected[start_all_gather])
    finally:
        shared_memory._CHANNELS[tp.process_group] = channel


@pytest.mark.parametrize("rows", [1, 5000], ids=["small", "several-steps"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "gloo"])
@pytest.mark.parametrize("size", [2, 4])
def test_work_between_start_and_wait(size, shared, rows):
    if shared:
        require("cpu")
    run_ranks(_check_started, size, shared, rows)


def _expected(name, rank, size, mine, every):
    return {
        "copy_to": lambda: mine,
        "copy_all_to": lambda: mine,
        "reduce_from": lambda: sum(every),
        "scatter_to": lambda: mine.chunk(size, -1)[rank],
        "gather_from": lambda: torch.cat(every, -1),
        "gather_from_sequence": lambda: torch.cat(every),
        "reduce_scatter_to_sequence": lambda: sum(every).chunk(size)[rank],
        "scatter_to_sequence": lambda: mine.chunk(size)[rank],
    }[name]()


def _check_forward(tp, name, dtype):
    function = _function(name)
    args, before, _ = AUTOGRAD[name]
    every = [_of_rank(0 if before == "one" else rank, dtype) for rank in range(tp.size)]
    mine = every[tp.rank]
    for x in (mine.clone(), _strided(mine)):
        y = function(x.requires_grad_(), tp, *args)
        assert torch.equal(y, _expected(name, tp.rank, tp.size, mine, every))
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert torch.equal(x, mine)
    assert not function(mine, tp, *args).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", AUTOGRAD)
def test_forward(name, size, dtype):
    run_ranks(_check_forward, size, name, dtype)


def _value(kind, shape, tp, seed):
    """A random value of one kind: equal on all ranks, or another one on each."""
    own = 0 if kind == "one" else tp.rank
    generator = torch.Generator(DEVICE).manual_seed(1000 * seed + own)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _inner_product(a, b, kind, tp):
    local = (a * b).sum().view(1)
    return local if kind == "one" else all_reduce(local, tp)


def _check_adjoint(tp, name):
    function = _function(name)
    args, before, after = AUTOGRAD[name]
    x = _value(before, (8, 12), tp, seed=1).requires_grad_()
    output = function(x, tp, *args)
    y = _value(after, output.shape, tp, seed=2)
    (pulled_back,) = torch.autograd.grad(output, x, y)
    left = _inner_product(output.detach(), y, after, tp)
    right = _inner_product(x.detach(), pulled_back, before, tp)
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)
    assert left.abs().item() > 1e-3
    if before == "one":
        everyone = all_gather(pulled_back[None], tp)
        assert all(torch.equal(other, pulled_back) for other in everyone), (
            "ranks got other gradients"
        )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", AUTOGRAD)
def test_backward_is_the_adjoint(name, size):
    run_ranks(_check_adjoint, size, name)


def _check_copy_all_to(tp):
    frozen, weight, bias = torch.ones(3), torch.ones(4, 2), torch.ones(2, dtype=torch.bfloat16)
    weight.requires_grad_()
    bias.requires_grad_()
    calls = []

    def counted(x, group):
        calls.append(x.shape)
        return all_reduce(x, group)

    collectives.all_reduce = counted
    try:
        copies = collectives.copy_all_to((frozen, weight, bias), tp)
        assert copies[0] is frozen
        (copies[1].sum() * (tp.rank + 1) + copies[2].float().sum()).backward()
    finally:
        collectives.all_reduce = all_reduce
    assert calls == ([(10,)] if tp.size > 1 else [])
    assert frozen.grad is None
    assert torch.equal(weight.grad, torch.full((4, 2), sum(range(1, tp.size + 1)) * 1.0))
    assert torch.equal(bias.grad, torch.full((2,), tp.size, dtype=torch.bfloat16))
    assert collectives.copy_all_to((None, frozen), tp)[0] is None
    assert not collectives.copy_all_to((frozen,), tp)[0].requires_grad


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_of_several_tensors_share_one_all_reduce(size):
    run_ranks(_check_copy_all_to, size)


def _check_uneven(tp):
    with pytest.raises(ValueError, match="size of 2; use 1 or 5"):
        collectives.scatter_to(torch.zeros(4, 5), tp)
    for function in (collectives.reduce_scatter_to_sequence, start_reduce_scatter):
        with pytest.raises(ValueError, match="the size of dim 0=5 cannot be split"):
            function(torch.zeros(5, 4), tp)


def test_a_dimension_that_does_not_divide_is_refused():
    run_ranks(_check_uneven, 2)


def _compiled_body(x, tp):
    y = collectives.copy_to(x, tp) * 2
    return collectives.reduce_from(y * y, tp)


def _check_compiled(tp):
    compiled = torch.compile(_compiled_body, backend="aot_eager", fullgraph=True)
    results = []
    for function in (_compiled_body, compiled):
        x = _of_rank(tp.rank).requires_grad_()
        y = function(x, tp)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@on_the_cpu
def test_compiles_to_one_graph():
    run_ranks(_check_compiled, 2)


def _check_no_such_dimension(tp):
    for x, dim in ((torch.ones(2), 1), (torch.ones(2, 2), -3), (torch.tensor(1.0), 0)):
        with pytest.raises(ValueError, match=f"no dimension dim={dim}"):
            all_gather(x, tp, dim)


@pytest.mark.parametrize("size", [1, 2])
def test_a_gather_needs_its_dimension(size):
    run_ranks(_check_no_such_dimension, size)


def _check_second_derivative(tp, name):
    function = _function(name)
    arguments = AUTOGRAD[name][0] if name != "copy_all_to" else ()
    x = torch.ones(4, 8, requires_grad=True)
    y = function(x, tp, *arguments)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    # Beside a term that has a second derivative, one that lacks its own would go unnoticed.
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad * x).sum().backward()


@pytest.mark.parametrize("name", AUTOGRAD)
def test_a_second_derivative_is_refused(name):
    run_ranks(_check_second_derivative, 2, name)


def _check_wrong_calls_over_gloo(tp):
    first = tp.rank == 0
    narrow, wide = torch.ones(4), torch.ones(8)
    wrong = [
        (
            lambda: all_gather(narrow if first else wide, tp),
            "all_gather of 4 el",
            "all_gather of 8",
        ),
        (lambda: all_reduce(narrow if first else wide, tp), "all_reduce sum of 4", "sum of 8"),
        (lambda: all_reduce(wide, tp, "sum" if first else "max"), "reduce sum", "reduce max"),
        (
            lambda: all_reduce_in_place(wide.clone() if first else wide.double(), tp),
            "elements of torch.float32",
            "elements of torch.float64",
        ),
        (
            lambda: reduce_scatter(wide if first else torch.ones(12), tp),
            "reduce_scatter of 8",
            "reduce_scatter of 12",
        ),
        (lambda: broadcast(wide, tp, tp.rank), "float32 from rank 0", "float32 from rank 1"),
        (
            lambda: all_gather(wide, tp) if first else all_reduce(wide, tp),
            "all_gather of 8",
            "all_reduce sum of 8",
        ),
    ]
    channel = shared_memory.channel_of(tp)
    shared_memory._CHANNELS[tp.process_group] = None
    try:
        for call, one, other in wrong:
            with pytest.raises(RuntimeError, match=f"rank 0: .*{one}.*; rank 1: .*{other}"):
                call()
            assert all_reduce(narrow, tp).tolist() == [tp.size] * 4  # nothing is lost
    finally:
        shared_memory._CHANNELS[tp.process_group] = channel


@on_the_cpu
def test_wrong_calls_over_gloo_raise_on_every_rank():
    """gloo itself ends one of the processes."""
    run_ranks(_check_wrong_calls_over_gloo, 2)
