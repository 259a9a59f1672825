"""The compiled encoder: results of eager execution, one graph for each kind of call."""

from __future__ import annotations

import contextlib
import copy
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters

from tests.helpers.device import on_the_cpu
from tests.helpers.ranks import run_ranks
from tpcore._native import status
from tpcore.layers import attention, linear_function
from tpcore.models import compiled
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import build_head
from tpcore.models.packing import pack_sequences
from tpcore.parallel.group import TensorParallelGroup

pytestmark = [
    on_the_cpu,
    pytest.mark.skipif(not status("cpu").loaded, reason="a graph holds the fused attention"),
]

CONFIG = BertConfig(
    vocab_size=97, hidden_size=32, num_layers=1, num_attention_heads=4, max_position_embeddings=64
)
# Sizes of every kind: one token, one sequence, many, a number of tokens that no size divides.
BATCHES = ((3, 17, 5), (9,), (1,), (1, 1), (40,), (5, 5, 5, 5, 5), (64, 2))


@contextlib.contextmanager
def _fresh_graphs(backend):
    """Graphs of this backend only; inside, `counters` counts from zero."""
    saved = compiled._graph
    torch._dynamo.reset()
    counters.clear()
    graph = torch.compile(compiled._encode, fullgraph=True, dynamic=True, backend=backend)
    compiled._graph = lambda: graph
    try:
        yield
    finally:
        compiled._graph = saved
        torch._dynamo.reset()


def _call(model, lengths, autocast=False):
    """Hidden states, and in training the gradients."""
    model.zero_grad()
    packed = pack_sequences([[(7 * i + n) % 97 for i in range(n)] for n in lengths])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model.forward_packed(packed, seed=11)
    if not model.training:
        return [output.last_hidden_state, output.pooler_output]
    (output.last_hidden_state.square().sum() + output.pooler_output.sum()).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    return [output.last_hidden_state.detach(), *grads]


def _compare(tp, backend, sequence_parallel=False, autocast=False):
    torch.manual_seed(0)
    model = BertModel(CONFIG, tp=tp, sequence_parallel=sequence_parallel)
    graphs = {}
    # Two tokens are multiplied by another routine than one, so (1,) is close, not equal.
    exact = backend == "aot_eager"
    with _fresh_graphs(backend):
        for training in (True, False):
            model.train(training)
            with torch.inference_mode(not training):
                model.is_compiled = False
                expected = [_call(model, lengths, autocast) for lengths in BATCHES]
                model.compile_encoder()
                for lengths, wanted in zip(BATCHES, expected, strict=True):
                    found = _call(model, lengths, autocast)
                    tolerance = {} if sum(lengths) > 1 and exact else {"rtol": 2e-4, "atol": 2e-4}
                    torch.testing.assert_close(
                        found, wanted, **(tolerance or {"rtol": 0, "atol": 0})
                    )
            graphs[training] = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    return graphs


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_equals_eager(size):
    expected = {True: 1, False: 2}
    assert run_ranks(_compare, size, "aot_eager") == [expected] * size


@pytest.mark.slow
def test_equals_eager_under_sequence_parallelism():
    graphs = run_ranks(_compare, 2, "aot_eager", True)
    # A share of one token counts as a constant, so small batches have a graph of their own.
    assert all(found[False] <= 4 for found in graphs)


@pytest.mark.slow
def test_equals_eager_under_autocast():
    assert run_ranks(_compare, 1, "aot_eager", False, True) == [{True: 1, False: 2}]


def _compare_transposing(tp):
    """As on a processor with AMX and weights that are large."""
    with (
        patch.object(linear_function, "LEAST_TRANSPOSED", 0),
        patch.object(attention._native, "has_amx", lambda: True),
    ):
        return _compare(tp, "aot_eager", autocast=True)


@pytest.mark.slow
def test_equals_eager_where_gradients_are_transposed_first():
    assert run_ranks(_compare_transposing, 1) == [{True: 1, False: 2}]


@pytest.mark.slow
def test_inductor():
    assert run_ranks(_compare, 2, "inductor", timeout_s=400) == [{True: 1, False: 2}] * 2


def _of_first_tokens(model, lengths):
    """What a classifier needs, and in training the gradients."""
    model.zero_grad()
    packed = pack_sequences([[(7 * i + n) % 97 for i in range(n)] for n in lengths])
    labels = torch.arange(len(lengths)) % 3
    output = model.forward_packed(packed, labels, seed=11, hidden_states=False)
    assert output.last_hidden_state.shape[0] == len(lengths)
    if not model.training:
        return [output.logits]
    output.loss.backward()
    return [output.loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_the_last_block_computes_only_what_a_classifier_reads():
    torch.manual_seed(0)
    tp = TensorParallelGroup.single()
    head = build_head("sequence_classification", CONFIG, tp=tp, num_labels=3)
    model = BertModel(CONFIG, tp=tp, head=head)
    with _fresh_graphs("aot_eager"):
        for training, graphs in ((True, 1), (False, 2)):
            model.train(training)
            with torch.inference_mode(not training):
                for lengths in ((3, 17, 5), (9,), (5, 5, 5, 5, 5)):
                    model.is_compiled = False
                    expected = _of_first_tokens(model, lengths)
                    model.compile_encoder()
                    found = _of_first_tokens(model, lengths)
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert counters["stats"]["unique_graphs"] == graphs


def _model(**kwargs):
    return BertModel(CONFIG, tp=TensorParallelGroup.single(), **kwargs)


def test_no_graph_where_attention_goes_by_buckets(monkeypatch):
    calls = []

    def graph(*args):
        calls.append(args)
        return compiled._encode(*args)

    monkeypatch.setattr(compiled, "_graph", lambda: graph)
    monkeypatch.setattr(attention._native, "has_amx", lambda: False)
    config = CONFIG.replace(max_position_embeddings=512)
    model = BertModel(config, tp=TensorParallelGroup.single(), dtype=torch.bfloat16).eval()
    model.compile_encoder()
    long, short = (pack_sequences([[1] * n]) for n in (400, 40))
    assert not compiled.takes(model, long)
    model.forward_packed(long)
    assert not calls
    assert compiled.takes(model, short)
    model.forward_packed(short)
    assert len(calls) == 1


def test_checks_are_those_of_eager_execution():
    model = _model().eval()
    model.compile_encoder()
    with pytest.raises(ValueError, match="ids contain 97"):
        model.forward_packed(pack_sequences([[1, 97]]))
    with pytest.raises(ValueError, match="a sequence of 65 tokens"):
        model.forward_packed(pack_sequences([[1] * 65]))


def test_names_stay_and_copies_work():
    model = _model().eval()
    names = list(model.state_dict())
    model.compile_encoder()
    assert list(model.state_dict()) == names
    assert copy.deepcopy(model).is_compiled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_checkpointing": "full"}, "full activation checkpointing; use selective"),
        ({"accumulate_main_grad": True}, "accumulate_main_grad, which precision bf16 sets"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _model(**options).compile_encoder()
