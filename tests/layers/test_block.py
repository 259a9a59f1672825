from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.device import DEVICE
from tests.helpers.ranks import run_ranks
from tests.layers.plain_attention import attention, dropped
from tests.layers.twins import check_against_twin
from tpcore._native import dropout_keep_mask
from tpcore.layers.attention import PackedSequences
from tpcore.layers.block import TransformerBlock
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.random import DropoutContext, Site, dropout_stream, make_row_ids
from tpcore.parallel.sharding import Sharded, sharding_table

SIZES = [1, 2, 4]
H, HEADS, INNER, LAYER, LAYERS, EPS = 16, 4, 32, 1, 5, 1e-5
LENGTHS = (3, 90, 11, 1, 8)  # 113 tokens
P_HIDDEN, P_ATTENTION = 0.2, 0.3
VARIANTS = {
    "pre": {},
    "post": {"post_layernorm": True},
    "original-bert-layer-0": {"post_layernorm": True, "input_dropout": True},
    "gpt": {"causal": True, "gelu": "tanh"},
}


def _build(tp, dtype=torch.float32, *, hidden_dropout=0.0, attention_dropout=0.0, **options):
    return TransformerBlock(
        H,
        HEADS,
        INNER,
        tp=tp,
        layer_number=LAYER,
        num_layers=LAYERS,
        layernorm_eps=EPS,
        hidden_dropout=hidden_dropout,
        attention_dropout=attention_dropout,
        dtype=dtype,
        **options,
    )


def _context():
    samples = torch.tensor([9, 2, 5, 4, 7]).repeat_interleave(torch.tensor(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return DropoutContext(torch.tensor([123456789012345]), make_row_ids(samples, positions))


def _twin(p, x, options, dropout):
    def norm(name, value):
        return F.layer_norm(value, (H,), p[f"{name}.weight"], p[f"{name}.bias"], EPS)

    def attend(value):
        own = {k.removeprefix("attention."): v for k, v in p.items() if k.startswith("attention.")}
        return attention(
            own,
            value,
            LENGTHS,
            HEADS,
            causal=options.get("causal", False),
            p=P_ATTENTION,
            stream=dropout_stream(LAYER, Site.ATTENTION_PROBS),
            dropout=dropout,
        )

    def mlp(value):
        inner = F.linear(value, p["mlp.dense_in.weight"], p["mlp.dense_in.bias"])
        inner = F.gelu(inner, approximate=options.get("gelu", "none"))
        return F.linear(inner, p["mlp.dense_out.weight"], p["mlp.dense_out.bias"])

    def drop(value, site, layer=LAYER):
        return dropped(value, P_HIDDEN, dropout_stream(layer, site), dropout)

    post = options.get("post_layernorm", False)
    u = norm("input_norm", x)
    if options.get("input_dropout"):
        u = drop(u, Site.EMBEDDING, LAYERS)
    a = (u if post else x) + drop(attend(u), Site.ATTENTION_OUTPUT)
    w = norm("post_attention_norm", a)
    return (w if post else a) + drop(mlp(w), Site.MLP_OUTPUT)


def _check_twin(tp, options, with_dropout, dtype):
    dropout = _context() if with_dropout else None
    sequences = PackedSequences.from_lengths(LENGTHS)
    x = torch.randn(sum(LENGTHS), H, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)
    check_against_twin(
        tp,
        lambda group: _build(
            group,
            dtype,
            hidden_dropout=P_HIDDEN,
            attention_dropout=P_ATTENTION,
            init_std=0.3,
            **options,
        ),
        lambda parameters, value: _twin(parameters, value, options, dropout),
        x,
        run=lambda module, value: module(value, sequences, dropout),
    )


@pytest.mark.parametrize("with_dropout", [False, True], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_its_twin(size, variant, with_dropout):
    run_ranks(_check_twin, size, VARIANTS[variant], with_dropout, torch.float32)


@pytest.mark.parametrize("size", SIZES)
def test_equals_its_twin_in_bfloat16(size):
    run_ranks(_check_twin, size, {}, True, torch.bfloat16)


def _check_hidden_dropout_bits(tp):
    """With zero weights and unit biases the output shows both masks of the block."""
    p, dropout = 0.25, _context()
    block = _build(tp, hidden_dropout=p)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith(("dense.weight", "dense_out.weight")):
                parameter.zero_()
            if name.endswith(("dense.bias", "dense_out.bias")):
                parameter.fill_(1.0 if "attention" in name else 2.0)
    x = torch.zeros(sum(LENGTHS), H)
    y = block(x, PackedSequences.from_lengths(LENGTHS), dropout)

    def keep(site):
        stream = dropout_stream(LAYER, site)
        return dropout_keep_mask(p, dropout.seed, stream, dropout.row_ids, H)

    code = (y * (1 - p)).round().int()
    assert torch.equal(code, keep(Site.ATTENTION_OUTPUT) * 1 + keep(Site.MLP_OUTPUT) * 2)


@pytest.mark.parametrize("size", SIZES)
def test_hidden_dropout_bits_follow_global_coordinates(size):
    run_ranks(_check_hidden_dropout_bits, size)


def _check_frozen(tp):
    block = _build(tp, hidden_dropout=0.1, attention_dropout=0.1).requires_grad_(False)
    x = torch.randn(sum(LENGTHS), H, requires_grad=True)
    sequences = PackedSequences.from_lengths(LENGTHS)
    block(x, sequences, _context()).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in block.parameters())
    assert not block(x.detach(), sequences, _context()).requires_grad


@pytest.mark.parametrize("size", [1, 2])
def test_frozen(size):
    run_ranks(_check_frozen, size)


def _check_autocast(tp):
    block = _build(tp, hidden_dropout=0.1, attention_dropout=0.1, init_std=0.3)
    sequences = PackedSequences.from_lengths(LENGTHS)
    x = torch.randn(sum(LENGTHS), H, generator=torch.Generator(DEVICE).manual_seed(1))
    results = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        block.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            y = block(leaf, sequences, _context())
        assert y.dtype == torch.float32, "the residual stream left the dtype of the input"
        y.square().mean().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in block.parameters())])
    for exact, low in zip(*results, strict=True):
        assert low.dtype == torch.float32
        assert (low - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("size", SIZES)
def test_autocast(size):
    run_ranks(_check_autocast, size)


def _check_copies(tp):
    block = _build(tp)
    x, sequences = torch.randn(sum(LENGTHS), H), PackedSequences.from_lengths(LENGTHS)
    expected = block(x, sequences)
    for clone in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(clone(x, sequences), expected)


def test_survives_deepcopy_and_pickle():
    run_ranks(_check_copies, 2)


def test_initial_values_are_those_of_megatron():
    torch.manual_seed(0)
    single = TensorParallelGroup.single()
    block = TransformerBlock(256, 4, 1024, tp=single, layer_number=0, num_layers=8, init_std=0.1)
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.1 / 4 if name.endswith(("dense.weight", "dense_out.weight")) else 0.1
            assert parameter.std().item() == pytest.approx(expected, rel=0.02)


def test_sharding_table():
    sharded = {k: v for k, v in sharding_table(_build(TensorParallelGroup.single())).items()}
    assert len(sharded) == 12
    assert sharded["attention.qkv.bias"] == Sharded(0)
    assert sharded["mlp.dense_out.weight"] == Sharded(1)


@pytest.mark.parametrize(
    "checkpointing",
    ["full", *(pytest.param(kind, marks=pytest.mark.slow) for kind in (None, "selective"))],
)
def test_compiles_to_one_graph(checkpointing):
    torch.manual_seed(0)
    block = _build(
        TensorParallelGroup.single(),
        hidden_dropout=0.1,
        attention_dropout=0.1,
        activation_checkpointing=checkpointing,
    )
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    sequences, results = PackedSequences.from_lengths(LENGTHS), []
    for function in (block, compiled):
        x = torch.randn(sum(LENGTHS), H, generator=torch.Generator(DEVICE).manual_seed(1))
        y = function(x.requires_grad_(), sequences, _context())
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0])
