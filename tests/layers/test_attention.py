from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.device import DEVICE
from tests.helpers.ranks import run_ranks
from tests.kernels.harness import require
from tests.layers.plain_attention import attention
from tests.layers.twins import build_sharded_and_full, check_against_twin
from tpcore._native import dropout_keep_mask
from tpcore.kernels import record_backends
from tpcore.layers import attention as attention_module
from tpcore.layers.attention import (
    FREE_PADDED_SCORES,
    MAX_BUCKET_SCORES,
    MAX_PADDED_WORK,
    PackedSequences,
    SelfAttention,
)
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.random import DropoutContext, Site, dropout_stream, make_row_ids
from tpcore.parallel.sharding import Replicated, Sharded, sharding_table

SIZES = [1, 2, 4]
H, HEADS, LAYER = 24, 4, 3
# 171 tokens in two buckets, of which one is padded.
LENGTHS = (5, 130, 1, 9, 2, 17, 7)
STREAM = dropout_stream(LAYER, Site.ATTENTION_PROBS)

by_path = pytest.mark.parametrize("fused", [True, False], ids=["fused", "buckets"])


def _require(fused: bool) -> None:
    if fused:
        require("cpu")


@contextmanager
def _path(fused: bool) -> Iterator[None]:
    """Attention by the fused kernel, or by buckets."""
    original = attention_module.has_kernel
    assert not fused or original("packed_attention", torch.zeros(1))
    attention_module.has_kernel = lambda op, x: fused
    try:
        yield
    finally:
        attention_module.has_kernel = original


def _build(tp, *, dtype=torch.float32, p=0.0, causal=False):
    return SelfAttention(
        H, HEADS, tp=tp, attention_dropout=p, layer_number=LAYER, causal=causal, dtype=dtype
    )


def _context(lengths=LENGTHS, seed=7):
    samples = torch.arange(100, 100 + len(lengths)).repeat_interleave(torch.tensor(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return DropoutContext(torch.tensor([seed]), make_row_ids(samples, positions))


def _x(dtype=torch.float32, lengths=LENGTHS):
    return torch.randn(sum(lengths), H, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)


def _run(module, x, dropout, lengths=LENGTHS):
    y, bias = module(x, PackedSequences.from_lengths(lengths), dropout)
    return y + bias


def _check_twin(tp, dtype, causal, p, fused):
    dropout = _context() if p > 0 else None

    def twin(parameters, x):
        return attention(
            parameters, x, LENGTHS, HEADS, causal=causal, p=p, stream=STREAM, dropout=dropout
        )

    with _path(fused):
        check_against_twin(
            tp,
            lambda group: _build(group, dtype=dtype, p=p, causal=causal),
            twin,
            _x(dtype),
            run=lambda module, x: _run(module, x, dropout),
        )


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@by_path
@pytest.mark.parametrize("size", SIZES)
def test_equals_its_twin(size, fused, causal, p):
    _require(fused)
    run_ranks(_check_twin, size, torch.float32, causal, p, fused)


@by_path
@pytest.mark.parametrize("size", SIZES)
def test_equals_its_twin_in_bfloat16(size, fused):
    _require(fused)
    run_ranks(_check_twin, size, torch.bfloat16, False, 0.3, fused)


def _check_dropout_bits(tp):
    """The zero pattern of the probabilities, against bits asked for by global coordinates."""
    p, dropout = 0.4, _context()
    module, _ = build_sharded_and_full(lambda group: _build(group, p=p), tp)
    seen = []
    original = attention_module.masked_softmax

    def recorded(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    attention_module.masked_softmax = recorded
    try:
        sequences = PackedSequences.from_lengths(LENGTHS)
        with _path(fused=False):
            module(_x(), sequences, dropout)
    finally:
        attention_module.masked_softmax = original
    num_checked = 0
    starts = sequences.cu_seqlens.tolist()
    for bucket, probs in zip(sequences.buckets, seen, strict=True):
        for own, own_probs in zip(bucket.index, probs, strict=True):
            sequence = starts.index(int(own[0]))
            n = LENGTHS[sequence]
            ids = dropout.row_ids[starts[sequence] : starts[sequence] + n]
            for local_head in range(own_probs.shape[0]):
                head = tp.rank * own_probs.shape[0] + local_head
                keep = dropout_keep_mask(p, dropout.seed, STREAM, ids, n, head=head)
                assert torch.equal(own_probs[local_head, :n, :n] != 0, keep)
                num_checked += keep.numel()
    assert num_checked == sum(n * n for n in LENGTHS) * HEADS // tp.size


@pytest.mark.parametrize("size", SIZES)
def test_dropout_bits_follow_global_coordinates(size):
    run_ranks(_check_dropout_bits, size)


def test_evaluation_and_no_context_mean_no_dropout():
    module = _build(TensorParallelGroup.single(), p=0.5)
    x = _x()
    without = _run(module, x, None)
    assert not torch.equal(_run(module, x, _context()), without)
    assert torch.equal(_run(module.eval(), x, _context()), without)


@by_path
def test_order_and_company_do_not_change_a_sequence(fused):
    _require(fused)
    with _path(fused):
        _check_order_and_company()


def _check_order_and_company():
    module = _build(TensorParallelGroup.single(), p=0.3)
    x, dropout = _x(), _context()
    together = _run(module, x, dropout).split(LENGTHS)
    order = [3, 0, 6, 1, 5, 2, 4]
    shuffled = _run(
        module,
        torch.cat([x.split(LENGTHS)[i] for i in order]),
        DropoutContext(dropout.seed, torch.cat([dropout.row_ids.split(LENGTHS)[i] for i in order])),
        [LENGTHS[i] for i in order],
    ).split([LENGTHS[i] for i in order])
    for place, i in enumerate(order):
        alone = _run(
            module,
            x.split(LENGTHS)[i],
            DropoutContext(dropout.seed, dropout.row_ids.split(LENGTHS)[i]),
            [LENGTHS[i]],
        )
        torch.testing.assert_close(together[i], shuffled[place], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-6)


@by_path
def test_a_nan_stays_in_its_sequence(fused):
    _require(fused)
    module = _build(TensorParallelGroup.single())
    x = _x()
    x[3] = float("nan")
    with _path(fused):
        y = _run(module, x, None).split(LENGTHS)
    assert y[0].isnan().all()
    assert not torch.cat(y[1:]).isnan().any()


def test_a_wrong_key_mask_is_noticed(monkeypatch):
    original = attention_module.masked_softmax

    def without_mask(scores, mask, *args, **kwargs):
        return original(scores, None, *args, **kwargs)

    monkeypatch.setattr(attention_module, "masked_softmax", without_mask)
    with pytest.raises(AssertionError, match="output on rank 0 of 1"):
        _check_twin(TensorParallelGroup.single(), torch.float32, False, 0.0, fused=False)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=40))
def test_buckets_hold_every_token_once_and_little_padding(lengths):
    sequences = PackedSequences.from_lengths(lengths)
    assert sequences.lengths == tuple(lengths)
    assert sequences.num_tokens == sum(lengths)
    ends = torch.tensor(lengths).cumsum(0)
    assert sequences.cu_seqlens.tolist() == [0, *ends.tolist()]
    assert sequences.cu_seqlens.dtype == torch.int32
    real = []
    for bucket in sequences.buckets:
        b, s = bucket.index.shape
        padding = torch.zeros(b, s, dtype=torch.bool)
        if bucket.key_mask is not None:
            assert bucket.key_mask.shape == (b, 1, 1, s)
            padding = bucket.key_mask[:, 0, 0]
            assert padding.any()
        real.append(bucket.index[~padding])
        own_lengths = (~padding).sum(1)
        real_scores = int((own_lengths**2).sum())
        assert own_lengths.max() == s
        assert b == 1 or b * s * s <= MAX_BUCKET_SCORES
        assert b * s * s <= max(MAX_PADDED_WORK * real_scores, real_scores + FREE_PADDED_SCORES)
        # Padding repeats a token of the same sequence.
        same = torch.bucketize(bucket.index, ends, right=True)
        assert torch.equal(same, same[:, :1].expand(b, s))
    assert torch.equal(torch.cat(real).sort().values, torch.arange(sum(lengths)))


def test_equal_lengths_make_one_bucket_without_a_mask():
    sequences = PackedSequences.from_lengths([20] * 8)
    (bucket,) = sequences.buckets
    assert bucket.key_mask is None
    assert torch.equal(bucket.index.flatten(), torch.arange(160))


def test_packed_sequences_refuse_nothing_and_empty_sequences():
    with pytest.raises(ValueError, match="lengths is empty"):
        PackedSequences.from_lengths([])
    with pytest.raises(ValueError, match=r"lengths\[1\]=0; expected sequences of one or more"):
        PackedSequences.from_lengths([3, 0])


def test_sharding_and_errors():
    single = TensorParallelGroup.single()
    assert sharding_table(_build(single)) == {
        "qkv.weight": Sharded(0),
        "qkv.bias": Sharded(0),
        "dense.weight": Sharded(1),
        "dense.bias": Replicated(),
    }
    with pytest.raises(
        ValueError, match="hidden_size=24 is not a multiple of num_attention_heads=5"
    ):
        SelfAttention(24, 5, tp=single)
    with pytest.raises(ValueError, match="x has 3 tokens, but sequences has 171"):
        _run(_build(single), torch.zeros(3, H), None)
    run_ranks(_check_heads_do_not_divide, 4)


def _check_heads_do_not_divide(tp):
    with pytest.raises(ValueError) as error:
        SelfAttention(24, 6, tp=tp)
    assert "num_attention_heads=6 cannot be split over a tensor-parallel size of 4" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("dtype", "length", "has_amx", "fused"),
    [
        (torch.float32, 200, False, True),
        (torch.bfloat16, 100, False, True),
        (torch.bfloat16, 200, False, False),
        (torch.bfloat16, 200, True, True),
        (torch.float16, 200, True, False),
    ],
)
def test_long_sequences_in_half_precision_take_the_matrix_products(
    dtype, length, has_amx, fused, monkeypatch
):
    require("cpu")
    monkeypatch.setattr(attention_module._native, "has_amx", lambda: has_amx)
    sequences = PackedSequences.from_lengths([length, length])
    layer = SelfAttention(16, 2, tp=TensorParallelGroup.single(), dtype=dtype)
    with record_backends() as calls:
        layer(torch.randn(2 * length, 16, dtype=dtype), sequences)
    assert {op for op, _ in calls} == {"packed_attention" if fused else "masked_softmax"}


def test_mean_keys_weighs_sequences_by_their_queries():
    assert PackedSequences.from_lengths([1, 3]).mean_keys == 2.5
