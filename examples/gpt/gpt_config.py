"""Sizes of the small GPT."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """What both models are built from; tokens are bytes."""

    vocab_size: int = 256
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    max_length: int = 128
    dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
