"""Tensor-parallel modules: where the kernels and the collectives meet."""

from __future__ import annotations

from tpcore.layers.attention import PackedSequences, SelfAttention
from tpcore.layers.block import TransformerBlock
from tpcore.layers.embedding import VocabParallelEmbedding
from tpcore.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpcore.layers.linear_function import column_parallel_linear
from tpcore.layers.loss import vocab_parallel_cross_entropy
from tpcore.layers.mlp import MLP
from tpcore.layers.norm import LayerNorm

__all__ = [
    "MLP",
    "ColumnParallelLinear",
    "LayerNorm",
    "PackedSequences",
    "RowParallelLinear",
    "SelfAttention",
    "TransformerBlock",
    "VocabParallelEmbedding",
    "column_parallel_linear",
    "vocab_parallel_cross_entropy",
]
