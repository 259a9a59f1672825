"""In half precision a run has few different numbers of rows in its products."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.device import on_the_cpu
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import HEADS, MaskedTokens, build_head
from tpcore.models.packing import pack_sequences
from tpcore.parallel.group import TensorParallelGroup

pytestmark = on_the_cpu

CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_attention_heads=2, max_position_embeddings=64
)


class _Rows(TorchDispatchMode):
    """The sizes that matrix products had."""

    def __init__(self):
        super().__init__()
        self.numbers = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            a, b = args[-2:]
            self.numbers |= {*a.shape, *b.shape}
        return func(*args, **(kwargs or {}))


def _model(name, dtype):
    tp = TensorParallelGroup.single()
    kwargs = {"num_labels": 3} if "classification" in name else {}
    torch.manual_seed(0)
    model = BertModel(CONFIG, tp=tp, head=build_head(name, CONFIG, tp=tp, **kwargs))
    return model.to(dtype)


def _batch(name, number):
    """Sequences of other lengths for each number, and labels for them."""
    draw = torch.Generator().manual_seed(number)
    lengths = torch.randint(3, 40, (9 + number,), generator=draw).tolist()
    ids = [torch.randint(50, (n,), generator=draw).tolist() for n in lengths]
    tokens = sum(lengths)
    labels = {
        "sequence_classification": torch.zeros(len(ids), dtype=torch.int64),
        "token_classification": torch.zeros(tokens, dtype=torch.int64),
        "question_answering": torch.ones(len(ids), 2, dtype=torch.int64),
        "pretraining": MaskedTokens(
            torch.arange(0, tokens, 7), torch.ones(len(range(0, tokens, 7)), dtype=torch.int64)
        ),
    }[name]
    return pack_sequences(ids), labels


@pytest.mark.parametrize("name", sorted(HEADS))
def test_products_have_rounded_numbers_of_rows(name):
    model = _model(name, torch.bfloat16)
    for number in range(4):
        packed, labels = _batch(name, number)
        assert len(packed) % 32 != 0
        with _Rows() as rows:
            output = model.forward_packed(packed, labels, seed=number, hidden_states=False)
            loss = output.token_losses.mean() if name == "pretraining" else output.loss
            loss.backward()
        assert len(packed) + -len(packed) % 32 in rows.numbers
        assert len(packed) not in rows.numbers
        if name == "pretraining":
            assert len(labels.index) not in rows.numbers


@pytest.mark.parametrize("name", ["sequence_classification", "token_classification"])
def test_results_are_those_of_the_tokens_alone(name, monkeypatch):
    """The same model with and without the dummy tokens, in float32, where nothing else differs."""
    model = _model(name, torch.float32)
    packed, labels = _batch(name, 3)
    monkeypatch.setattr("tpcore.models.bert.row_step", lambda weight, rows: 64)
    monkeypatch.setattr("tpcore.models.bert.missing_rows", lambda weight, rows: -rows % 32)
    rounded = model.forward_packed(packed, labels, seed=1, hidden_states=False)
    rounded.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    monkeypatch.undo()
    plain = model.forward_packed(packed, labels, seed=1, hidden_states=False)
    plain.loss.backward()
    assert rounded.logits.shape == plain.logits.shape
    assert rounded.last_hidden_state.shape == plain.last_hidden_state.shape
    torch.testing.assert_close(rounded.logits, plain.logits, rtol=1e-5, atol=1e-5)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
