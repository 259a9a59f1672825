"""New tokens: the embedding and its shards grow, at every tensor-parallel size alike."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.device import on_the_cpu
from tests.helpers.ranks import run_ranks
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import build_head
from tpcore.models.vocabulary import grow_vocabulary
from tpcore.parallel.group import TensorParallelGroup

CONFIG = BertConfig(
    vocab_size=250, hidden_size=16, num_layers=1, num_attention_heads=4, max_position_embeddings=16
)
PIECES = [[7], [1, 249], [3, 4, 5], *([i] for i in range(8))]
"""Together with the old rows more than the padding of one rank holds: 250 + 11 > 256."""


def _model(tp: TensorParallelGroup, head: str | None = None) -> BertModel:
    torch.manual_seed(0)
    model = BertModel(CONFIG, tp=tp).eval()
    if head is not None:
        model.head = build_head(head, CONFIG, tp=tp)
    return model


def _hidden(tp: TensorParallelGroup) -> torch.Tensor:
    model = _model(tp)
    grow_vocabulary(model, PIECES)
    assert model.config.vocab_size == 261
    rows = model.embeddings.word_embeddings.weight.shape[0]
    assert rows * tp.size == model.config.padded_vocab_size >= 261
    ids = torch.tensor([[0, 249, 250, 251, 252, 260]])
    with torch.no_grad():
        embedded = model.embeddings.word_embeddings(ids)[0]
        old = _model(tp).embeddings.word_embeddings
        for row, pieces in zip(embedded, [[0], [249], *PIECES[:3], PIECES[-1]], strict=True):
            torch.testing.assert_close(row, old(torch.tensor(pieces)).mean(0), rtol=0, atol=1e-7)
        return model(ids).last_hidden_state


def _check(tp: TensorParallelGroup, expected: torch.Tensor) -> None:
    torch.testing.assert_close(_hidden(tp), expected)


@pytest.mark.parametrize("size", [1, 2])
def test_rows_are_the_means_of_their_pieces(size):
    run_ranks(_check, size, _hidden(TensorParallelGroup.single()))


def test_nothing_to_add_changes_nothing():
    model = _model(TensorParallelGroup.single())
    weight = model.embeddings.word_embeddings.weight
    grow_vocabulary(model, [])
    assert model.embeddings.word_embeddings.weight is weight


@on_the_cpu  # a GPU stops: torch asserts on the device
def test_ids_beyond_the_new_tokens_are_refused():
    model = _model(TensorParallelGroup.single())
    grow_vocabulary(model, PIECES)
    with pytest.raises(ValueError, match="ids contain 261; expected 0 to 260"):
        model(torch.tensor([[261]]))


def test_a_pretraining_head_is_refused():
    model = _model(TensorParallelGroup.single(), "pretraining")
    with pytest.raises(ValueError, match="pretraining head cannot grow"):
        grow_vocabulary(model, PIECES)
