"""New tokens for a trained encoder: its word embeddings, and their shards, grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tpcore.models.bert import BertModel
from tpcore.models.config import padded_vocab_size_for
from tpcore.models.heads import PreTrainingHead
from tpcore.parallel.collectives import all_gather
from tpcore.parallel.sharding import Sharded, shard


def grow_vocabulary(model: BertModel, pieces: Sequence[Sequence[int]]) -> None:
    """Append a row to the word embeddings for each new token; called on all ranks of `model.tp`.

    A new row is the mean of the rows of the pieces that the token was made of before, so it starts
    where the encoder can read it, and the same at every tensor-parallel size.

    Args:
        model: changed in place, its config too.
        pieces: ids of the pieces of each new token, in the order of the new ids.

    Raises:
        ValueError: the model predicts words: its head would need rows as well.
    """
    if isinstance(model.head, PreTrainingHead):
        raise ValueError("a model with a pretraining head cannot grow; load it with head=None")
    if not pieces:
        return
    embedding, tp = model.embeddings.word_embeddings, model.tp
    old = embedding.weight
    full = all_gather(old.detach(), tp, dim=0)[: embedding.num_embeddings]
    new = torch.stack([full[list(ids)].float().mean(dim=0).to(full.dtype) for ids in pieces])
    size = len(full) + len(new)
    rows = padded_vocab_size_for(size, tp.size)
    padded = torch.cat([full, new, new[-1:].expand(rows - size, -1)])
    part = shard(padded, Sharded(0), tp.rank, tp.size).clone()
    embedding.weight = nn.Parameter(part, requires_grad=old.requires_grad)
    embedding.num_embeddings, embedding.padded_num_embeddings = size, rows
    embedding.vocab_start = tp.rank * len(part)
    model.config = model.config.replace(vocab_size=size, padded_vocab_size=rows)
