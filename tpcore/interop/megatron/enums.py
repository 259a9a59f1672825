"""Kinds of masks, layers and attention, by the names of apex and Megatron-Core."""

from __future__ import annotations

from enum import Enum


class AttnMaskType(Enum):
    """What the attention of a layer may not see."""

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5


class AttnType(Enum):
    """Where keys and values come from."""

    self_attn = 1
    cross_attn = 2


class LayerType(Enum):
    """Which half of an encoder-decoder a layer belongs to."""

    encoder = 1
    decoder = 2


class ModelType(Enum):
    """Shape of a model."""

    encoder_or_decoder = 1
    encoder_and_decoder = 2
