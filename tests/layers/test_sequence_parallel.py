"""Every layer with 1/tp of the tokens on each rank, against its unsharded twin on all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.device import DEVICE
from tests.helpers.ranks import run_ranks
from tests.layers import test_block as block
from tests.layers.plain_attention import attention
from tests.layers.twins import check_against_twin
from tpcore.layers import norm as norm_module
from tpcore.layers.attention import PackedSequences, SelfAttention
from tpcore.layers.embedding import VocabParallelEmbedding
from tpcore.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpcore.layers.mlp import MLP
from tpcore.layers.norm import LayerNorm
from tpcore.parallel.collectives import copy_all_to
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.random import DropoutContext, Site, dropout_stream, make_row_ids
from tpcore.parallel.sharding import Replicated, Sharded, shard

SIZES = [1, 2, 4]
DTYPES = [torch.float32, torch.bfloat16]
IN, OUT, HEADS = 24, 40, 4
LENGTHS = (3, 90, 11, 1, 7)  # 112 tokens
SHARE, LAST = Sharded(0), Sharded(-1)

by_size_and_dtype = pytest.mark.parametrize(
    ("size", "dtype"), [(size, dtype) for size in SIZES for dtype in DTYPES], ids=str
)


def _x(dtype, *shape):
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)


def _plus_bias(module, *args):
    y, bias = module(*args)
    return y if bias is None else y + bias


def _linear_twin(parameters, x):
    return F.linear(x, parameters["weight"], parameters.get("bias"))


def _check_column(tp, dtype, options, shape=(8,)):
    def build(group):
        return ColumnParallelLinear(
            IN, OUT, tp=group, dtype=dtype, sequence_parallel=True, **options
        )

    check_against_twin(
        tp,
        build,
        _linear_twin,
        _x(dtype, *shape, IN),
        run=_plus_bias if options.get("skip_bias_add") else None,
        input_sharding=SHARE,
        output_sharding=Replicated() if options.get("gather_output") else LAST,
    )


def _check_row(tp, dtype, options, shape=(8,)):
    def build(group):
        return RowParallelLinear(IN, OUT, tp=group, dtype=dtype, sequence_parallel=True, **options)

    check_against_twin(
        tp,
        build,
        _linear_twin,
        _x(dtype, *shape, IN),
        run=_plus_bias if options.get("skip_bias_add") else None,
        input_sharding=LAST if options.get("input_is_parallel", True) else Replicated(),
        output_sharding=SHARE,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"gather_output": True}, {"skip_bias_add": True}],
    ids=lambda options: "-".join(options) or "plain",
)
@by_size_and_dtype
def test_column(size, dtype, options):
    run_ranks(_check_column, size, dtype, options)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"input_is_parallel": False}, {"skip_bias_add": True}],
    ids=lambda options: "-".join(options) or "plain",
)
@by_size_and_dtype
def test_row(size, dtype, options):
    run_ranks(_check_row, size, dtype, options)


@pytest.mark.parametrize("shape", [(0,), (4, 3), (2, 1, 5)], ids=str)
def test_dimension_0_is_the_sequence_whatever_follows(shape):
    run_ranks(_check_column, 2, torch.float32, {}, shape)
    run_ranks(_check_row, 2, torch.float32, {}, shape)


def _check_norm(tp, dtype, options):
    def twin(p, x):
        return F.layer_norm(x, (IN,), p.get("weight"), p.get("bias"), 1e-5)

    check_against_twin(
        tp,
        lambda group: LayerNorm(IN, tp=group, sequence_parallel=True, dtype=dtype, **options),
        twin,
        _x(dtype, 16, IN),
        input_sharding=SHARE,
        output_sharding=SHARE,
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"elementwise_affine": False}],
    ids=lambda options: "-".join(options) or "plain",
)
@by_size_and_dtype
def test_norm(size, dtype, options):
    run_ranks(_check_norm, size, dtype, options)


def _check_partial_gradients_are_noticed(tp):
    norm_module.copy_all_to = lambda tensors, group: list(tensors)
    try:
        with pytest.raises(AssertionError, match="gradient of weight on rank"):
            _check_norm(tp, torch.float32, {})
    finally:
        norm_module.copy_all_to = copy_all_to


def test_the_twin_notices_a_partial_gradient():
    run_ranks(_check_partial_gradients_are_noticed, 2)


def _check_embedding(tp, dtype):
    torch.manual_seed(1)
    layer = VocabParallelEmbedding(
        13, 6, tp=tp, padded_num_embeddings=16, sequence_parallel=True, dtype=dtype
    )
    torch.manual_seed(1)
    full = VocabParallelEmbedding(
        13, 6, tp=TensorParallelGroup.single(), padded_num_embeddings=16, dtype=dtype
    )
    ids = torch.tensor([0, 12, 5, 5, 7, 3, 12, 4])
    y, expected = layer(ids), full(ids)
    assert torch.equal(y, shard(expected, SHARE, tp.rank, tp.size))
    grad = torch.randint(-4, 5, (8, 6), generator=torch.Generator(DEVICE).manual_seed(2)).to(dtype)
    y.backward(shard(grad, SHARE, tp.rank, tp.size))
    expected.backward(grad)
    assert torch.equal(layer.weight.grad, shard(full.weight.grad, SHARE, tp.rank, tp.size))


@by_size_and_dtype
def test_embedding(size, dtype):
    run_ranks(_check_embedding, size, dtype)


def _check_mlp(tp, dtype):
    def twin(p, x):
        inner = F.gelu(F.linear(x, p["dense_in.weight"], p["dense_in.bias"]))
        return F.linear(inner, p["dense_out.weight"], p["dense_out.bias"])

    check_against_twin(
        tp,
        lambda group: MLP(IN, OUT, tp=group, dtype=dtype, sequence_parallel=True),
        twin,
        _x(dtype, 8, IN),
        run=_plus_bias,
        input_sharding=SHARE,
        output_sharding=SHARE,
    )


@by_size_and_dtype
def test_mlp(size, dtype):
    run_ranks(_check_mlp, size, dtype)


def _context():
    samples = torch.tensor([9, 2, 5, 4, 7]).repeat_interleave(torch.tensor(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return DropoutContext(torch.tensor([123456789012345]), make_row_ids(samples, positions))


def _check_attention(tp, dtype):
    dropout, sequences = _context(), PackedSequences.from_lengths(LENGTHS)
    p, stream = 0.3, dropout_stream(2, Site.ATTENTION_PROBS)
    check_against_twin(
        tp,
        lambda group: SelfAttention(
            IN,
            HEADS,
            tp=group,
            attention_dropout=p,
            layer_number=2,
            dtype=dtype,
            sequence_parallel=True,
        ),
        lambda parameters, x: attention(
            parameters, x, LENGTHS, HEADS, p=p, stream=stream, dropout=dropout
        ),
        _x(dtype, sum(LENGTHS), IN),
        run=lambda module, x: _plus_bias(module, x, sequences, dropout),
        input_sharding=SHARE,
        output_sharding=SHARE,
    )


@by_size_and_dtype
def test_attention(size, dtype):
    run_ranks(_check_attention, size, dtype)


def _check_block(tp, dtype, variant, checkpointing):
    options, dropout = block.VARIANTS[variant], _context()
    sequences = PackedSequences.from_lengths(LENGTHS)
    lengths, block.LENGTHS = block.LENGTHS, LENGTHS  # the twin splits by them
    try:
        check_against_twin(
            tp,
            lambda group: block._build(
                group,
                dtype,
                hidden_dropout=block.P_HIDDEN,
                attention_dropout=block.P_ATTENTION,
                init_std=0.3,
                sequence_parallel=True,
                activation_checkpointing=checkpointing,
                **options,
            ),
            lambda parameters, value: block._twin(parameters, value, options, dropout),
            _x(dtype, sum(LENGTHS), block.H),
            run=lambda module, value: module(value, sequences, dropout),
            input_sharding=SHARE,
            output_sharding=SHARE,
        )
    finally:
        block.LENGTHS = lengths


@pytest.mark.parametrize(
    ("variant", "checkpointing"),
    [("pre", None), ("post", None), ("original-bert-layer-0", "selective"), ("gpt", "full")],
)
@by_size_and_dtype
def test_block(size, dtype, variant, checkpointing):
    run_ranks(_check_block, size, dtype, variant, checkpointing)


def _check_errors(tp):
    with pytest.raises(ValueError, match=r"x has 3 tokens on each of 2 ranks, but sequences has 8"):
        SelfAttention(IN, HEADS, tp=tp, sequence_parallel=True)(
            torch.zeros(3, IN), PackedSequences.from_lengths([8])
        )
    with pytest.raises(ValueError, match="the size of dim 0=5 cannot be split"):
        RowParallelLinear(IN, OUT, tp=tp, sequence_parallel=True)(torch.zeros(5, IN // 2))
    with pytest.raises(ValueError, match=r"x has shape \[24\]; expected \[t/tp, ..., in\]"):
        ColumnParallelLinear(IN, OUT, tp=tp, sequence_parallel=True)(torch.zeros(IN))


def test_errors():
    run_ranks(_check_errors, 2)
    with pytest.raises(ValueError, match="sequence_parallel=True needs tp"):
        LayerNorm(IN, sequence_parallel=True)


def _check_autocast(tp):
    """float32 weights, bfloat16 products: the sequence-parallel block against the plain one."""
    sequences, dropout = PackedSequences.from_lengths(LENGTHS), _context()
    x = _x(torch.float32, sum(LENGTHS), block.H)
    results = []
    for sequence in (False, True):
        torch.manual_seed(0)
        module = block._build(tp, hidden_dropout=0.1, init_std=0.3, sequence_parallel=sequence)
        leaf = (shard(x, SHARE, tp.rank, tp.size) if sequence else x).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(leaf, sequences, dropout)
        assert y.dtype == torch.float32, "the residual stream left the dtype of the input"
        y.square().sum().backward()
        y, grad_x = y.detach(), leaf.grad
        if not sequence:
            y, grad_x = (shard(value, SHARE, tp.rank, tp.size) for value in (y, grad_x))
        results.append([y, grad_x, *(parameter.grad for parameter in module.parameters())])
    for plain, ours in zip(*results, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - plain).norm() <= 0.03 * plain.norm()


@pytest.mark.parametrize("size", SIZES)
def test_autocast(size):
    run_ranks(_check_autocast, size)
