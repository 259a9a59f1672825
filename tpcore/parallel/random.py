"""Where random numbers come from when parallelism must not change them.

Dropout bits are a pure function of a seed and of global coordinates: which token (``row_ids``),
which column, which head, which place in the network (``dropout_stream``). They do not depend on how
tokens are packed, on which rank holds a column or on how many draws came before, so any tensor- or
data-parallel size drops the same elements.

Layers that draw from torch's own generators (nn.Dropout, torch.rand) have no such key. For them
``RandomStreams`` keeps several named streams side by side:

    streams = RandomStreams("cpu")
    streams.add("sharded", seed + 2718 + tp.rank)      another stream on each rank
    with streams.fork("sharded"):
        x = F.dropout(x, 0.1)                          the default stream outside goes on unmoved
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


class RandomStreams:
    """Named streams of torch's default generator on one device, one of them running at a time.

    A stream is the state of a generator. ``fork`` puts it into the device's default generator, so
    that everything inside the ``with`` block draws from it, and takes it out again; what was
    running before goes on where it was. Forks nest, also into a stream that is running already.

    Args:
        device: "cpu", or a CUDA device, whose generator the streams are for.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._states: dict[str, Tensor] = {}
        self._seeds: dict[str, int] = {}
        self._running: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The streams, in the order in which they were added."""
        return tuple(self._states)

    def add(self, name: str, seed: int) -> None:
        """A new stream, as torch.manual_seed(seed) begins it.

        Raises:
            ValueError: there is a stream of that name, or one of that seed: both would draw the
                same numbers.
        """
        if name in self._states:
            raise ValueError(f"there is a stream {name!r} already; streams: {self._listed()}")
        for other, used in self._seeds.items():
            if used == seed:
                raise ValueError(
                    f"seed={seed} of the stream {name!r} is that of {other!r}: both would draw the "
                    "same numbers; pass another seed"
                )
        self._states[name] = torch.Generator(self.device).manual_seed(seed).get_state()
        self._seeds[name] = seed

    @contextmanager
    def fork(self, name: str) -> Iterator[None]:
        """Draw from the stream ``name`` inside the ``with`` block.

        Raises:
            ValueError: there is no such stream.
        """
        if name not in self._states:
            raise ValueError(
                f"there is no stream {name!r}; add(name, seed) first; streams: {self._listed()}"
            )
        before = self._get_default()
        self._put_aside(before)
        self._running.append(name)
        self._set_default(self._states[name])
        try:
            yield
        finally:
            self._put_aside(self._get_default())
            self._running.pop()
            # A stream that was forked inside itself goes on behind what was drawn inside.
            outer = self._states.get(self._running[-1]) if self._running else None
            self._set_default(before if outer is None else outer)

    def get_states(self) -> dict[str, Tensor]:
        """Copies of all states: uint8 tensors on the CPU, by name."""
        self._put_aside(self._get_default())
        return {name: state.clone() for name, state in self._states.items()}

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Replace all streams by these, also those that are running.

        Raises:
            ValueError: a stream that is running is not among them.
        """
        missing = [name for name in self._running if name not in states]
        if missing:
            raise ValueError(f"states has no {missing[0]!r}, which is running")
        self._states = {name: state.clone() for name, state in states.items()}
        self._seeds = {name: seed for name, seed in self._seeds.items() if name in states}
        if self._running:
            self._set_default(self._states[self._running[-1]])

    def reset(self) -> None:
        """Forget all streams.

        Raises:
            ValueError: one of them is running.
        """
        if self._running:
            raise ValueError(f"the stream {self._running[-1]!r} is running; leave its fork first")
        self._states, self._seeds = {}, {}

    def _listed(self) -> str:
        return ", ".join(map(repr, self._states)) or "none"

    def _put_aside(self, state: Tensor) -> None:
        if self._running:
            self._states[self._running[-1]] = state

    def _get_default(self) -> Tensor:
        if self.device.type == "cpu":
            return torch.get_rng_state()
        return torch.cuda.get_rng_state(self.device)

    def _set_default(self, state: Tensor) -> None:
        if self.device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, self.device)
