"""A transformer layer with sequence parallelism, as it is written against Megatron-Core.

[s, b, h] throughout; outside the matrix products each rank has s/tp positions. The loss and every
gradient are those of one process, without any loop over parameters that sums gradients.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.interop.ranks import run_megatron
from tpcore.interop.megatron import (
    AttnMaskType,
    FusedLayerNorm,
    FusedScaleMaskSoftmax,
    ModelParallelConfig,
    bias_dropout_add,
    bias_gelu_impl,
    tensor_parallel,
)
from tpcore.parallel.sharding import shard, sharding_table

VOCAB, HIDDEN, HEADS, SEQUENCE, BATCH = 32, 16, 4, 8, 3
INIT = partial(nn.init.normal_, std=0.4)


class Model(nn.Module):
    def __init__(self, sequence_parallel):
        super().__init__()
        self.sequence_parallel = sequence_parallel
        config = ModelParallelConfig(
            sequence_parallel=sequence_parallel, params_dtype=torch.float64
        )
        column = partial(tensor_parallel.ColumnParallelLinear, config=config, init_method=INIT)
        row = partial(
            tensor_parallel.RowParallelLinear,
            config=config,
            init_method=INIT,
            input_is_parallel=True,
            skip_bias_add=True,
        )
        self.embedding = tensor_parallel.VocabParallelEmbedding(
            VOCAB,
            HIDDEN,
            init_method=INIT,
            config=config,
            reduce_scatter_embeddings=sequence_parallel,
        )
        self.positions = nn.Parameter(INIT(torch.empty(SEQUENCE, 1, HIDDEN)).double())
        self.norm1 = FusedLayerNorm(config, HIDDEN).double()
        self.qkv = column(HIDDEN, 3 * HIDDEN)
        self.softmax = FusedScaleMaskSoftmax(
            False, False, AttnMaskType.causal, True, None, True, 0.5
        )
        self.dense = row(HIDDEN, HIDDEN)
        self.norm2 = FusedLayerNorm(config, HIDDEN, memory_efficient=True).double()
        self.up = column(HIDDEN, 4 * HIDDEN, skip_bias_add=True)
        self.down = row(4 * HIDDEN, HIDDEN)
        self.norm3 = FusedLayerNorm(config, HIDDEN).double()

    def attention(self, x):
        qkv, _ = self.qkv(x)
        heads = qkv.shape[-1] // (3 * HIDDEN // HEADS)
        qkv = qkv.view(SEQUENCE, BATCH, heads, -1).permute(1, 2, 0, 3)
        q, k, v = tensor_parallel.split_tensor_along_last_dim(qkv, 3)
        context = self.softmax(q @ k.transpose(-1, -2), None) @ v
        return self.dense(context.permute(2, 0, 1, 3).reshape(SEQUENCE, BATCH, -1))

    def layer(self, x):
        x = bias_dropout_add(*self.attention(self.norm1(x)), x, 0.0, self.training)
        hidden, bias = self.up(self.norm2(x))
        return bias_dropout_add(*self.down(bias_gelu_impl(hidden, bias)), x, 0.0, self.training)

    def forward(self, ids, targets):
        if self.sequence_parallel:
            x = self.embedding(ids)
            positions = tensor_parallel.scatter_to_sequence_parallel_region(self.positions)
        else:
            x = self.embedding(ids).transpose(0, 1)
            positions = self.positions
        x = tensor_parallel.checkpoint(self.layer, False, x + positions)
        logits = tensor_parallel.linear_with_grad_accumulation_and_async_allreduce(
            self.norm3(x),
            self.embedding.weight,
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=not self.sequence_parallel,
            sequence_parallel=self.sequence_parallel,
        )
        return tensor_parallel.vocab_parallel_cross_entropy(logits, targets.t(), 0.1).mean()


def _plain_loss(p, ids, targets):
    """The same in a few lines of torch, from full parameters."""
    norm = lambda x, name: F.layer_norm(  # noqa: E731
        x, (HIDDEN,), p[f"{name}.weight"], p[f"{name}.bias"]
    )
    x = F.embedding(ids, p["embedding.weight"]).transpose(0, 1) + p["positions"]
    qkv = F.linear(norm(x, "norm1"), p["qkv.weight"], p["qkv.bias"])
    q, k, v = qkv.view(SEQUENCE, BATCH, HEADS, -1).permute(1, 2, 0, 3).chunk(3, -1)
    future = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    probs = (0.5 * q @ k.transpose(-1, -2)).masked_fill(future, -torch.inf).softmax(-1)
    context = (probs @ v).permute(2, 0, 1, 3).reshape(SEQUENCE, BATCH, -1)
    x = x + F.linear(context, p["dense.weight"], p["dense.bias"])
    hidden = F.gelu(F.linear(norm(x, "norm2"), p["up.weight"], p["up.bias"]), approximate="tanh")
    x = x + F.linear(hidden, p["down.weight"], p["down.bias"])
    logits = norm(x, "norm3") @ p["embedding.weight"].t()
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(-1, targets.t()[..., None])[..., 0]
    others = (log_probs.sum(-1) - chosen) / (VOCAB - 1)
    return -(0.9 * chosen + 0.1 * others).mean()


def _check_model(tp, sequence_parallel):
    torch.manual_seed(11)
    model = Model(sequence_parallel)
    generator = torch.Generator().manual_seed(12)
    table = sharding_table(model)
    full = {}
    for name, own in model.named_parameters():
        shape = list(own.shape)
        if hasattr(table[name], "dim"):
            shape[table[name].dim] *= tp.size
        full[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4
        with torch.no_grad():
            own.copy_(shard(full[name], table[name], tp.rank, tp.size))
    ids = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    targets = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    leaves = {name: tensor.requires_grad_() for name, tensor in full.items()}
    expected = _plain_loss(leaves, ids, targets)
    expected.backward()
    loss = model(ids, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    for name, own in model.named_parameters():
        twin = shard(leaves[name].grad, table[name], tp.rank, tp.size)
        torch.testing.assert_close(own.grad, twin, rtol=1e-8, atol=1e-10, msg=name)
        assert not getattr(own, "sequence_parallel", False)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_transformer_layer(size, sequence_parallel):
    run_megatron(_check_model, size, sequence_parallel)
