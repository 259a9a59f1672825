"""The encoder as one graph of torch.compile.

Packing, the head and the loss stay outside: their work depends on lengths and labels. Inside are
embeddings, blocks and final norm, whose only sizes that change from batch to batch are the number
of tokens and the number of sequences. Both are symbols of the graph, so that a run makes one graph
for training and one for evaluation, whatever its batches look like, and no padding is spent on
rounding sizes. The exception are sizes below two, which torch.compile takes for constants: a dummy
sequence makes two tokens of one. (The boundaries of one sequence are two numbers already.)

The graph calls the same kernels as eager execution, so dropout bits are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tpcore.layers.attention import fuses_attention
from tpcore.layers.linear_function import dtype_of_products
from tpcore.models.packing import PackedBatch
from tpcore.parallel.random import DropoutContext


class Encoder(Protocol):
    """What a graph needs of a BertModel, which imports this module."""

    embeddings: Any
    blocks: Any

    def encode(
        self, packed: PackedBatch, dropout: DropoutContext | None, rows: Tensor | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class TracedSequences:
    """What a graph knows of `PackedSequences`: boundaries as a tensor, and the number of tokens."""

    cu_seqlens: Tensor
    num_tokens: int

    @property
    def mean_keys(self) -> float:
        """So few that attention is the fused kernel: `takes` lets no other batches in."""
        return 0.0


def refusal(model: Encoder) -> str:
    """Which option of `model` keeps its encoder from being one graph; empty if none does."""
    block: Any = model.blocks[0]
    if block.activation_checkpointing == "full":
        return "full activation checkpointing; use selective, or none"
    if block.mlp.dense_in.accumulate_main_grad:
        return "accumulate_main_grad, which precision bf16 sets; use 32 or bf16-mixed"
    return ""


def takes(model: Encoder, packed: PackedBatch) -> bool:
    """Whether attention of this batch is the fused kernel; buckets have the shapes of lengths."""
    weight = model.embeddings.position_embeddings.weight
    qkv = torch.empty(0, device=weight.device, dtype=dtype_of_products(weight))
    return fuses_attention(packed.sequences, qkv)


def with_symbolic_sizes(packed: PackedBatch) -> PackedBatch:
    """The batch with two tokens at least."""
    return packed if len(packed) > 1 else packed.padded_to(2)


def encode(
    model: Encoder,
    packed: PackedBatch,
    dropout: DropoutContext | None,
    rows: Tensor | None = None,
) -> Tensor:
    """`model.encode` by the graph that its kind of call has, made when it comes first."""
    model.embeddings.word_embeddings.check_ids(packed.input_ids)
    if rows is not None and len(rows) == 1:
        # One row would count as a constant; its double costs less than a graph.
        return encode(model, packed, dropout, rows.repeat(2))[:1]
    return _graph()(
        model,
        packed.input_ids,
        packed.token_type_ids,
        packed.position_ids,
        packed.row_ids,
        packed.sequences.cu_seqlens,
        None if dropout is None else dropout.seed,
        rows,
    )


@functools.cache
def _graph() -> Callable[..., Any]:
    return torch.compile(_encode, fullgraph=True, dynamic=True)


def _encode(
    model: Encoder,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    row_ids: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    sequences: Any = TracedSequences(cu_seqlens, input_ids.shape[0])
    packed = PackedBatch(input_ids, token_type_ids, position_ids, row_ids, sequences)
    dropout = None if seed is None else DropoutContext(seed=seed, row_ids=row_ids)
    return model.encode(packed, dropout, rows)
