from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tpcore.parallel.sharding import (
    Replicated,
    Sharded,
    ShardedParts,
    ShardedQKV,
    full_shape,
    reshard,
    shard,
    shard_shape,
    sharding_table,
    unshard,
)

SIZES = st.sampled_from([1, 2, 3, 4])


@st.composite
def cases(draw):
    """A full tensor of distinct numbers that splits over 1, 2, 3 and 4 ranks, and its sharding."""
    num_dims = draw(st.integers(1, 3))
    dim = draw(st.integers(-num_dims, num_dims - 1))
    sharding = draw(
        st.sampled_from([Replicated(), Sharded(dim), ShardedQKV(dim), ShardedParts(dim, 2)])
    )
    shape = [draw(st.integers(1, 4)) for _ in range(num_dims)]
    shape[dim] = 72 * draw(st.integers(0, 2))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype), sharding


def _shards(full, sharding, size):
    return [shard(full, sharding, rank, size) for rank in range(size)]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(cases(), SIZES)
def test_unshard_inverts_shard(case, size):
    full, sharding = case
    shards = _shards(full, sharding, size)
    assert torch.equal(unshard(shards, sharding), full)
    for piece in shards:
        assert tuple(piece.shape) == shard_shape(full.shape, sharding, size)
    assert full_shape(shards[0].shape, sharding, size) == tuple(full.shape)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(cases(), SIZES, SIZES, SIZES)
def test_resharding_in_two_steps_is_resharding_in_one(case, first, second, third):
    full, sharding = case
    shards = _shards(full, sharding, first)
    in_two = reshard(reshard(shards, sharding, second), sharding, third)
    in_one = reshard(shards, sharding, third)
    assert len(in_two) == len(in_one) == third
    for a, b, c in zip(in_two, in_one, _shards(full, sharding, third), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_rows_columns_and_qkv_by_hand():
    full = torch.arange(12).view(6, 2)
    assert shard(full, Sharded(0), 1, 2).tolist() == [[6, 7], [8, 9], [10, 11]]
    assert shard(full, Sharded(1), 1, 2).tolist() == [[1], [3], [5], [7], [9], [11]]
    # q = rows 0 1, k = rows 2 3, v = rows 4 5: rank 1 holds the second row of each.
    assert shard(full, ShardedQKV(), 1, 2).tolist() == [[2, 3], [6, 7], [10, 11]]
    assert shard(full, ShardedParts(0, 3), 1, 2).tolist() == [[2, 3], [6, 7], [10, 11]]
    assert shard(full[:4], ShardedParts(0, 2), 1, 2).tolist() == [[2, 3], [6, 7]]
    assert shard(full, Replicated(), 1, 2) is full


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: shard(torch.zeros(6, 2), Sharded(0), 0, 4, name="w"),
            "dim 0 of w=6 cannot be split over a tensor-parallel size of 4; use 1, 2, 3 or 6",
        ),
        (lambda: shard(torch.zeros(6), Sharded(1), 0, 2, name="w"), "w of shape [6] has no dim 1"),
        (lambda: shard(torch.zeros(6), Sharded(0), 2, 2, name="w"), "rank=2 of w is not a rank"),
        (
            lambda: shard(torch.zeros(4), ShardedQKV(0), 0, 2, name="qkv.bias"),
            "qkv.bias of shape [4] cannot be [all q | all k | all v]",
        ),
        (lambda: unshard([], Sharded(0), name="w"), "w has no shards"),
        (
            lambda: unshard([torch.zeros(2), torch.zeros(3)], Sharded(0), name="w"),
            "w differs between ranks: [2] torch.float32 on rank 0, [3] torch.float32 on rank 1",
        ),
        (
            lambda: unshard([torch.zeros(2), torch.zeros(2).half()], Sharded(0), name="w"),
            "torch.float16 on rank 1",
        ),
        (
            lambda: unshard(
                [torch.zeros(2), torch.zeros(2), torch.ones(2)], Replicated(), name="n"
            ),
            "n is replicated, but its values on rank 2",
        ),
        (
            lambda: unshard([torch.zeros(4), torch.zeros(4)], ShardedQKV(0), name="qkv.bias"),
            "qkv.bias: a shard of shape [4] cannot be [q | k | v]",
        ),
    ],
)
def test_errors_name_the_parameter(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_replicated_nan_is_equal_to_itself():
    nan = torch.tensor([1.0, float("nan")])
    assert unshard([nan, nan.clone()], Replicated()) is nan
    with pytest.raises(ValueError, match="replicated"):
        unshard([nan, torch.tensor([2.0, float("nan")])], Replicated())


class _Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def own_sharding(self):
        return {"weight": Sharded(1)}


class _Wrong(_Split):
    def own_sharding(self):
        return {"wieght": Sharded(1)}


def test_table_of_any_module():
    module = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"inner": _Split()}))
    assert sharding_table(module) == {
        "0.weight": Replicated(),
        "0.bias": Replicated(),
        "1.inner.weight": Sharded(1),
        "1.inner.steps": Replicated(),
    }
    assert sharding_table(_Split())["weight"] == Sharded(1)


def test_table_refuses_a_name_that_is_not_there():
    with pytest.raises(ValueError, match=r"_Wrong.own_sharding\(\) names 'wieght'"):
        sharding_table(nn.Sequential(_Wrong()))
