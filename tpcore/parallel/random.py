"""Where random numbers come from when parallelism must not change them.

Dropout bits are a pure function of a seed and of global coordinates: which token (``row_ids``),
which column, which head, which place in the network (``dropout_stream``). They do not depend on how
tokens are packed, on which rank holds a column or on how many draws came before, so any tensor- or
data-parallel size drops the same elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

POSITION_BITS = 20  # a row id is (sample_id << 20) | position: sequences of up to 1,048,576 tokens
MAX_STREAM = 1 << 16  # the generator keeps 16 bits for the stream number
_SITES_PER_LAYER = 8
_MASK64 = (1 << 64) - 1


class Site(IntEnum):
    """A place in a layer where dropout happens.

    The values are part of every reproducible run: never renumber them.
    """

    EMBEDDING = 0
    ATTENTION_PROBS = 1
    ATTENTION_OUTPUT = 2
    MLP_OUTPUT = 3
    HEAD = 4


@dataclass(frozen=True)
class DropoutContext:
    """What dropout needs to know about the current batch; the same for all layers.

    Attributes:
        seed: int64 [1], on the device of the activations. A tensor, so that CUDA graphs replay with
            fresh bits.
        row_ids: int64 [t], one per packed token, from ``make_row_ids``.
    """

    seed: Tensor
    row_ids: Tensor

    def __post_init__(self) -> None:
        if self.seed.dtype != torch.int64 or self.seed.numel() != 1:
            raise ValueError(
                f"seed must be an int64 tensor of one element, got {self.seed.dtype} of shape "
                f"{tuple(self.seed.shape)}; use torch.tensor([step_seed(seed, step)])"
            )
        if self.row_ids.dtype != torch.int64 or self.row_ids.ndim != 1:
            raise ValueError(
                f"row_ids must be an int64 tensor [tokens], got {self.row_ids.dtype} of shape "
                f"{tuple(self.row_ids.shape)}; use make_row_ids(sample_ids, positions)"
            )


def make_row_ids(sample_ids: Tensor, positions: Tensor) -> Tensor:
    """Global coordinates of tokens: row_id = (sample_id << 20) | position.

    Args:
        sample_ids: integer tensor, one per token, 0 <= id < 2^43; identifies the sample in the
            whole data set.
        positions: integer tensor that broadcasts against it, 0 <= position < 2^20; the place of the
            token in its sequence.

    Returns:
        int64 tensor of the broadcast shape. Ranges are not checked: that would wait for the device.
    """
    return (sample_ids.to(torch.int64) << POSITION_BITS) | positions.to(torch.int64)


def step_seed(seed: int, step: int) -> int:
    """The seed of one training step: 63 well-mixed bits of (seed, step), as a non-negative int64.

    step_seed = mix(mix(seed) + step) >> 1, where mix is one step of splitmix64 (Steele, Lea, Flood
    2014) from the given state, in unsigned 64-bit arithmetic. The arguments count modulo 2^64.
    """
    return _splitmix64(_splitmix64(seed) + step) >> 1


def _splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def dropout_stream(layer_number: int, site: Site) -> int:
    """Stream number of one place in the network: stream = layer_number * 8 + site.

    ``layer_number`` counts from 0; embeddings and heads use the number of layers.

    Raises:
        ValueError: the stream would not fit into its 16 bits.
    """
    stream = layer_number * _SITES_PER_LAYER + int(site)
    if layer_number < 0 or stream >= MAX_STREAM:
        raise ValueError(
            f"layer_number={layer_number} has no dropout stream; expected 0 to "
            f"{MAX_STREAM // _SITES_PER_LAYER - 1}"
        )
    return stream
