"""Row orders of the fused query-key-value weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcore.checkpoint.formats import qkv

sizes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2))


def _rows(heads, head_size, columns):
    shape = (3 * heads * head_size, columns) if columns else (3 * heads * head_size,)
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(size=sizes, layout=st.sampled_from(list(qkv.LAYOUTS)))
def test_each_order_has_an_inverse(size, layout):
    rows = _rows(*size)
    there = qkv.from_canonical(rows, layout, size[0])
    assert there.shape == rows.shape
    assert torch.equal(qkv.to_canonical(there, layout, size[0]), rows)
    back = qkv.from_canonical(qkv.to_canonical(rows, layout, size[0]), layout, size[0])
    assert torch.equal(back, rows)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_orders_are_the_described_ones(heads):
    d = 3
    for head in range(heads):
        for part in range(3):
            for column in range(d):
                places = {
                    "v0": (part * heads + head) * d + column,
                    "v1": (head * d + column) * 3 + part,
                    "v2": (head * 3 + part) * d + column,
                    "v3": (head * 3 + part) * d + column,
                }
                for layout, place in places.items():
                    rows = torch.zeros(3 * heads * d)
                    rows[place] = 1
                    canonical = qkv.to_canonical(rows, layout, heads)
                    assert canonical.nonzero().item() == places["v3"], layout


@settings(max_examples=30, deadline=None, derandomize=True)
@given(size=sizes)
def test_joining_separate_parts_inverts_splitting(size):
    rows = _rows(*size)
    parts = qkv.split(rows, size[0])
    assert torch.equal(qkv.join(*parts, size[0]), rows)
    stacked = torch.cat(parts)
    assert torch.equal(qkv.to_canonical(stacked, "v0", size[0]), rows)


def test_shards_of_version_0_are_reordered_before_they_are_joined():
    heads, d = 4, 2
    full = _rows(heads, d, 0)
    shards = [qkv.from_canonical(part, "v0", 2) for part in full.chunk(2)]
    joined = torch.cat([qkv.to_canonical(shard, "v0", 2) for shard in shards])
    assert torch.equal(joined, full)
    assert not torch.equal(qkv.to_canonical(torch.cat(shards), "v0", heads), full)
