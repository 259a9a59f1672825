"""Named random states of the default generator, and activation checkpointing that restores them.

``model_parallel_cuda_manual_seed(seed)`` gives every rank of a tensor-parallel group the same
default stream, and each its own stream seed + 2718 + rank inside ``get_cuda_rng_tracker().fork()``.
The streams are those of the current CUDA device where there is one, else of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tpcore.interop.megatron.parallel_state import resolve_group
from tpcore.parallel.collectives import gather_from, scatter_to
from tpcore.parallel.random import RandomStreams
from tpcore.parallel.recompute import checkpoint_activations

_MODEL_PARALLEL_RNG_TRACKER_NAME = "model-parallel-rng"
_SEED_OFFSET = 2718


class CudaRNGStatesTracker:
    """Random states by name; ``fork`` makes one of them the default for the length of a block.

    Forks nest, also into a state that is running already, which then goes on where it is.
    """

    def __init__(self) -> None:
        # Not bound to a device before it is used: importing must not initialise CUDA.
        self._made: RandomStreams | None = None

    @property
    def streams(self) -> RandomStreams:
        """The same as tpcore's own functions take it."""
        if self._made is None:
            on_cuda = torch.cuda.is_available()
            self._made = RandomStreams(f"cuda:{torch.cuda.current_device()}" if on_cuda else "cpu")
        return self._made

    def is_initialized(self) -> bool:
        """Whether there is any state."""
        return bool(self.streams.names)

    def reset(self) -> None:
        """Forget all states."""
        self.streams.reset()

    def get_states(self) -> dict[str, Tensor]:
        """Copies of all states."""
        return self.streams.get_states()

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Replace all states."""
        self.streams.set_states(states)

    def add(self, name: str, seed: int) -> None:
        """A new state.

        Raises:
            ValueError: the name or the seed is taken.
        """
        self.streams.add(name, seed)

    def fork(self, name: str = _MODEL_PARALLEL_RNG_TRACKER_NAME) -> AbstractContextManager[None]:
        """Draw from the state ``name`` inside the ``with`` block.

        Raises:
            ValueError: there is no such state.
        """
        return self.streams.fork(name)


_TRACKER = CudaRNGStatesTracker()


def get_cuda_rng_tracker(*_: Any, **__: Any) -> CudaRNGStatesTracker:
    """The states of this process. Arguments of Megatron-Core (Transformer Engine) mean nothing."""
    return _TRACKER


def model_parallel_cuda_manual_seed(
    seed: int, *_: Any, tp_rank: int | None = None, **__: Any
) -> None:
    """Seed the default generator with ``seed``, and the state of fork() with seed + 2718 + rank.

    Args:
        seed: the same on every rank.
        tp_rank: in place of this process's rank in its tensor-parallel group.
    """
    rank = resolve_group(None).rank if tp_rank is None else tp_rank
    _TRACKER.reset()
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)
    _TRACKER.add(_MODEL_PARALLEL_RNG_TRACKER_NAME, seed + _SEED_OFFSET + rank)


# Megatron-LM 1.0 and apex call it so as well.
model_parallel_manual_seed = model_parallel_cuda_manual_seed


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """``checkpoint(function, distribute_saved_activations, *args)``, or without the second one.

    Keeps the arguments and none of the intermediate results; the backward calls the function again
    from the same random states. With ``distribute_saved_activations`` each rank keeps its share of
    the first argument, which must be the same on all of them, and gathers it for either call.
    """
    distribute = False
    if args and isinstance(args[0], bool):
        distribute, args = args[0], args[1:]
    if not distribute:
        return checkpoint_activations(function, *args, streams=[_TRACKER.streams])
    tp = resolve_group(None)
    first, *rest = args
    shape = first.shape

    def gather_and_call(share: Tensor, *others: Any) -> Any:
        return function(gather_from(share, tp, dim=0).view(shape), *others)

    share = scatter_to(first.reshape(-1), tp, dim=0)
    return checkpoint_activations(gather_and_call, share, *rest, streams=[_TRACKER.streams])
