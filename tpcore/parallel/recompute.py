"""Activation checkpointing: keep the inputs of a function, and compute it again in the backward.

What is computed again must be what was computed before, bit by bit. Dropout of tpcore is a function
of its key and needs no care. Everything else that draws numbers is put back to where it was:
torch's default generators by torch.utils.checkpoint, named streams here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tpcore.parallel.random import RandomStreams


def checkpoint_activations(
    function: Callable[..., Any], *args: Any, streams: Sequence[RandomStreams] = (), **kwargs: Any
) -> Any:
    """``function(*args, **kwargs)``, keeping none of its intermediate results for the backward.

    The backward calls the function a second time, collectives included, so every rank of a group
    must checkpoint the same functions. Works with torch.autograd.grad, under autocast, and nested.

    Args:
        function: any differentiable computation.
        args: its arguments; tensors among them are kept.
        streams: named random streams that the function draws from. Their states, and those of
            torch's default generators, are those of the first call in the second one, and
            afterwards as if there had been no second call.
        kwargs: further arguments.
    """
    if not streams:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Replay(streams)

    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class _Replay(AbstractContextManager[None]):
    """Inside, the streams are where they were when this was made; outside, as if nothing happened.

    Can be entered again and again: a graph that is retained is computed again in each backward.
    """

    def __init__(self, streams: Sequence[RandomStreams]) -> None:
        self._then = [(s, s.get_states()) for s in streams]
        self._now: list[dict[str, Tensor]] = []

    def __enter__(self) -> None:
        self._now = [streams.get_states() for streams, _ in self._then]
        for streams, states in self._then:
            streams.set_states(states)

    def __exit__(self, *_: object) -> None:
        for (streams, _then), states in zip(self._then, self._now, strict=True):
            streams.set_states(states)
