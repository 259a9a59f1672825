"""Writing Megatron directories in the `torch` container: version 3, and Megatron-Core."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcore.checkpoint import names, torch_file
from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.formats.megatron_args import args_from_state
from tpcore.checkpoint.formats.megatron_files import MODEL_FILES, TRACKER, iteration_folder
from tpcore.checkpoint.state import (
    HEADS,
    CanonicalState,
    check_head,
    check_tensor_parallel_size,
)
from tpcore.checkpoint.stored import StoredTensor


def save_rank(
    state: CanonicalState,
    folder: Path,
    size: int,
    rank: int,
    *,
    core: bool = False,
    write: bool = True,
) -> None:
    """Put one rank's file where Megatron looks for it, and the tracker file beside.

    ``write=False`` only takes part in reading, as in `torch_file.save`.

    Raises:
        CheckpointError: as `check_writable`.
        OSError: a file cannot be written.
    """
    name = iteration_folder(state.source.iteration)
    target = folder / name / f"mp_rank_{rank:02d}" / MODEL_FILES[0]
    if write:
        target.parent.mkdir(parents=True, exist_ok=True)
    torch_file.save(rank_content(state, size, rank, core=core), target, write=write)
    if write and rank == 0:
        word = str(state.source.iteration) if name != "release" else name
        (folder / TRACKER).write_text(word)


def check_writable(
    state: CanonicalState, tensor_parallel_size: int, *, core: bool = False
) -> dict[str, str]:
    """Canonical name -> name in the file, or an error before anything is written.

    Raises:
        CheckpointError: the size does not fit the model, or Megatron has no place for its head.
    """
    check_tensor_parallel_size(state.config, tensor_parallel_size)
    check_head(state, (*HEADS, "multichoice"))
    table = names.MEGATRON_CORE if core else names.MEGATRON
    expanded = names.expand(table, state.config.num_layers)
    inverse = {target: key for key, target in expanded.items() if target is not None}
    unknown = [name for name in state.tensors if name not in inverse]
    if unknown:
        raise CheckpointError(
            f"{state.source.path}: a Megatron directory has no place for {names.listing(unknown)}"
        )
    return inverse


def rank_content(
    state: CanonicalState, size: int, rank: int, *, core: bool = False
) -> dict[str, Any]:
    """What one rank's file holds, tensors described only: args, version, iteration and the model.

    Megatron-LM nests the parts of the model, Megatron-Core has one flat dict.
    """
    inverse = check_writable(state, size, core=core)
    rows = state.padded_rows(size)
    flat = {
        key: state.described_shard(name, rank, size, rows)
        for name, key in inverse.items()
        if name in state.tensors
    }
    dtype = next(iter(flat.values())).dtype
    return {
        "args": argparse.Namespace(**args_from_state(state, size, rows, dtype)),
        "checkpoint_version": 3.0,
        "iteration": state.source.iteration or 0,
        "model": flat if core else _nest(flat),
    }


def _nest(flat: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Megatron's nesting: one dict per part, and dotted names inside the encoder and the heads."""
    model: dict[str, Any] = {}
    for key, tensor in flat.items():
        parts = key.split(".")
        depth = {"embedding": 3, "encoder": 2, "pooler": 2}.get(parts[1], 1)
        if parts[0] != "language_model":
            depth = 1
        inner = model
        for part in parts[:depth]:
            inner = inner.setdefault(part, {})
        inner[".".join(parts[depth:])] = tensor
    return model
