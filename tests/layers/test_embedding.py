from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.device import DEVICE, on_the_cpu
from tests.helpers.ranks import run_ranks
from tpcore.layers.embedding import VocabParallelEmbedding
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import Sharded, shard, sharding_table

SIZES = [1, 2, 4]
V, PADDED, H = 13, 16, 6


def _check_equals_plain(tp, dtype):
    torch.manual_seed(1)
    layer = VocabParallelEmbedding(V, H, tp=tp, padded_num_embeddings=PADDED, dtype=dtype)
    torch.manual_seed(1)
    plain = nn.Embedding(V, H).to(dtype)
    full = torch.cat((plain.weight, plain.weight[-1:].expand(PADDED - V, H))).detach()
    assert torch.equal(layer.weight, shard(full, Sharded(0), tp.rank, tp.size))
    ids = torch.tensor([[0, 12, 5, 5], [7, 3, 12, 4]])
    y = layer(ids)
    full.requires_grad_()
    expected = F.embedding(ids, full)
    # One rank has the row and the others add zeros: no rounding in any dtype.
    assert torch.equal(y, expected)
    grad_y = torch.randint(-4, 5, y.shape, generator=torch.Generator(DEVICE).manual_seed(2)).to(
        dtype
    )
    y.backward(grad_y)
    expected.backward(grad_y)
    assert torch.equal(layer.weight.grad, shard(full.grad, Sharded(0), tp.rank, tp.size))
    assert layer(ids[:0]).shape == (0, 4, H)
    assert layer(ids.int()).shape == (2, 4, H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_equals_nn_embedding_bit_by_bit(size, dtype):
    run_ranks(_check_equals_plain, size, dtype)


def _check_ids_out_of_range(tp):
    layer = VocabParallelEmbedding(V, H, tp=tp, padded_num_embeddings=PADDED)
    for bad in (-1, V, PADDED):
        with pytest.raises(ValueError, match=f"ids contain {bad}; expected 0 to 12"):
            layer(torch.tensor([0, bad]))


@on_the_cpu  # a GPU stops: torch asserts on the device
@pytest.mark.parametrize("size", [1, 2])
def test_an_id_outside_the_vocabulary_is_an_error_at_every_size(size):
    run_ranks(_check_ids_out_of_range, size)


def _check_frozen(tp):
    layer = VocabParallelEmbedding(16, H, tp=tp).requires_grad_(False)
    assert not layer(torch.tensor([1, 9])).requires_grad


def test_frozen():
    run_ranks(_check_frozen, 2)


def _check_uneven(tp):
    with pytest.raises(ValueError, match="num_embeddings=13 cannot be split"):
        VocabParallelEmbedding(13, H, tp=tp)
    with pytest.raises(ValueError, match="padded_num_embeddings=15 cannot be split"):
        VocabParallelEmbedding(13, H, tp=tp, padded_num_embeddings=15)


def test_errors():
    run_ranks(_check_uneven, 2)
    with pytest.raises(ValueError, match="padding can only add rows"):
        VocabParallelEmbedding(13, H, tp=TensorParallelGroup.single(), padded_num_embeddings=12)


def test_sharding():
    layer = VocabParallelEmbedding(13, H, tp=TensorParallelGroup.single())
    assert sharding_table(layer) == {"weight": Sharded(0)}
