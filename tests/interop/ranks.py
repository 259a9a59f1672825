"""Run a body on every rank of a world of four, with Megatron's groups of one size in place."""

from __future__ import annotations

import importlib

from tests.helpers.ranks import POOL_SIZE, run_mesh
from tpcore.interop.megatron import parallel_state


def run_megatron(body, size, *args):
    """What ``body(tp, *args)`` returns on each of four ranks, ``tp`` being of this size.

    initialize_model_parallel makes groups of the whole world, so all of it takes part.
    """
    return run_mesh(_run, size, POOL_SIZE // size, body.__module__, body.__qualname__, args)


def _run(tp, dp, module, name, args):
    parallel_state.initialize_model_parallel(tp.size)
    try:
        body = getattr(importlib.import_module(module), name)
        return body(parallel_state.tensor_parallel_group(), *args)
    finally:
        parallel_state.destroy_model_parallel()
