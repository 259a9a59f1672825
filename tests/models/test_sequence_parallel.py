"""The encoder with 1/tp of the tokens on each rank, and with activations computed again."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.models.test_bert import BATCH, IDS, MASK, TINY
from tpcore.kernels import record_backends, use_backend
from tpcore.layers.attention import SelfAttention
from tpcore.layers.block import TransformerBlock
from tpcore.models.bert import BertModel
from tpcore.models.heads import build_head
from tpcore.models.packing import pack
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import shard

SINGLE = TensorParallelGroup.single()
CONFIG = TINY.replace(
    vocab_size=250, padded_vocab_size=512, hidden_dropout=0.2, attention_dropout=0.2
)
POST = CONFIG.replace(post_layernorm=True, embedding_dropout_after_norm=True)
HEADS = {
    "pretraining": ({}, (torch.where(MASK == 1, IDS, -100), torch.tensor([0, 1, 0]))),
    "sequence_classification": ({"num_labels": 3}, torch.tensor([2, 0, 1])),
    "token_classification": ({"num_labels": 5}, torch.where(MASK == 1, IDS % 5, -100)),
    "question_answering": ({}, torch.tensor([[2, 5], [1, 3], [0, 0]])),
}


def _build(config, head, tp, **options):
    kwargs, labels = HEADS[head]
    torch.manual_seed(3)
    built = build_head(head, config, tp=tp, **kwargs)
    return BertModel(config, tp=tp, head=built, **options).train(), labels


def _step(config, head, tp, **options):
    model, labels = _build(config, head, tp, **options)
    output = model(**BATCH, labels=labels, seed=12)
    output.loss.backward()
    return model, output


def _check_equals_one_process(tp, config, head, options):
    whole, expected = _step(config, head, SINGLE)
    model, output = _step(config, head, tp, **options)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-6, atol=0)
    for field in dataclasses.fields(output):
        theirs = getattr(expected, field.name)
        if theirs is not None:
            torch.testing.assert_close(getattr(output, field.name), theirs, rtol=1e-5, atol=5e-6)
    table, full = model.sharding_table(), dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        theirs = full[name].grad
        if theirs is None:
            assert parameter.grad is None, name
            continue
        part = shard(theirs, table[name], tp.rank, tp.size)
        error, scale = (parameter.grad - part).abs().max(), theirs.abs().max()
        assert error <= 2e-5 * scale + 1e-7, f"{name}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize(
    ("config", "head", "checkpointing"),
    [
        (CONFIG, "pretraining", None),
        (CONFIG, "sequence_classification", "full"),
        (POST, "token_classification", "selective"),
        (POST, "question_answering", None),
    ],
    ids=["pretraining", "sequence", "token", "question"],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_one_process(size, config, head, checkpointing):
    options = {"sequence_parallel": True, "activation_checkpointing": checkpointing}
    run_ranks(_check_equals_one_process, size, config, head, options)


def _check_each_rank_computes_its_share(tp):
    model, labels = _build(CONFIG, "pretraining", tp, sequence_parallel=True)
    shapes = []

    def note(module, args, output):
        shapes.append((args[0].shape[0], output.shape[0]))

    for block in model.blocks:
        block.register_forward_hook(note)
    model.final_norm.register_forward_hook(note)
    model(**BATCH, labels=labels, seed=12)
    assert shapes == [(6, 6)] * 3  # 23 tokens and a dummy over 4 ranks


def test_norms_and_residuals_see_a_quarter_of_the_tokens():
    run_ranks(_check_each_rank_computes_its_share, 4)


# --- the dummy sequence ---------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [2, 64, 1000])
@pytest.mark.parametrize("head", HEADS)
def test_the_dummy_sequence_changes_nothing(head, multiple):
    labels = HEADS[head][1]
    packed = pack(**BATCH)

    def packed_labels(x):
        return x.reshape(-1)[packed.padded_index] if x.shape == MASK.shape else x

    labels = tuple(map(packed_labels, labels)) if isinstance(labels, tuple) else labels
    labels = labels if isinstance(labels, tuple) else packed_labels(labels)
    results = []
    for batch in (packed, pack(**BATCH, pad_to_multiple=multiple)):
        assert len(batch) % (1 if batch is packed else multiple) == 0
        model, _ = _build(CONFIG, head, SINGLE)
        output = model.forward_packed(batch, labels, seed=12)
        output.loss.backward()
        results.append((output, dict(model.named_parameters())))
    (plain, parameters), (padded, others) = results
    for field in dataclasses.fields(plain):
        ours, theirs = getattr(padded, field.name), getattr(plain, field.name)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(
                others[name].grad, parameter.grad, rtol=0, atol=1e-5 * scale + 3e-8
            )


# --- activation checkpointing ---------------------------------------------------------------------


def _check_bit_equal(tp, config, options, backend):
    with use_backend(backend) if backend else record_backends():
        plain, expected = _step(config, "pretraining", tp, **options)
        for checkpointing in ("full", "selective"):
            model, output = _step(
                config, "pretraining", tp, activation_checkpointing=checkpointing, **options
            )
            assert torch.equal(output.loss, expected.loss)
            for (name, ours), theirs in zip(
                model.named_parameters(), plain.parameters(), strict=True
            ):
                assert torch.equal(ours.grad, theirs.grad), (checkpointing, name)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["plain", "sequence"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_checkpointing_changes_no_bit(size, sequence_parallel, backend):
    options = {"sequence_parallel": sequence_parallel}
    run_ranks(_check_bit_equal, size, CONFIG, options, backend)


def _kept_bytes(checkpointing):
    """Bytes that autograd keeps for the backward of one step, by the classical attention path."""
    kept = {}

    def note(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    model, labels = _build(
        CONFIG, "sequence_classification", SINGLE, activation_checkpointing=checkpointing
    )
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with use_backend("reference"), hooks:
        model(**BATCH, labels=labels, seed=1)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    return sum(size for address, size in kept.items() if address not in weights)


def test_checkpointing_keeps_less():
    everything, selective, full = map(_kept_bytes, (None, "selective", "full"))
    assert full < 0.5 * selective
    assert selective < everything


@pytest.mark.parametrize(
    ("checkpointing", "expected"),
    [(None, (2, 2, 2)), ("selective", (2, 2, 4)), ("full", (2, 4, 4))],
)
def test_what_is_computed_twice(monkeypatch, checkpointing, expected):
    counts = {"block": 0, "attention": 0, "core": 0}

    def count(cls, method, name):
        original = getattr(cls, method)

        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(cls, method, counted)

    count(TransformerBlock, "forward", "block")
    count(SelfAttention, "forward", "attention")
    count(SelfAttention, "_by_buckets", "core")
    with use_backend("reference"):
        _step(CONFIG, "pretraining", SINGLE, activation_checkpointing=checkpointing)
    assert tuple(counts.values()) == expected


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="activation_checkpointing='some' is unknown; expected"):
        BertModel(CONFIG, activation_checkpointing="some")
