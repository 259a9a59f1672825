"""Megatron-LM checkpoint directories in the `torch` container: read at any size, written at any.

    <root>/latest_checkpointed_iteration.txt      "10" or "release"
    <root>/iter_0000010/mp_rank_TT/model_optim_rng.pt            tensor-parallel rank TT
    <root>/iter_0000010/mp_rank_TT_PPP/model_optim_rng.pt        and pipeline stage PPP

Files of every checkpoint_version (absent = 0, 1, 2, 3) are read, with the names that Megatron-LM
has used since 2019, nested or flat, and with Megatron-Core's. Written are version-3 directories.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcore.checkpoint import names, qkv
from tpcore.checkpoint.errors import CheckpointError, shown
from tpcore.checkpoint.fields import Fields
from tpcore.checkpoint.megatron_args import (
    args_from_state,
    config_from_args,
    head_from_args,
    labels_from_args,
    lowercase_from_args,
)
from tpcore.checkpoint.megatron_files import (
    MODEL_FILES,
    TRACKER,
    find_files,
    iteration_folder,
)
from tpcore.checkpoint.state import (
    HEADS,
    CanonicalState,
    Source,
    StoredTensor,
    check_complete,
    check_head,
    check_tensor_parallel_size,
    find_head,
    has_pooler,
    sharding_of,
    sizes_from_shapes,
    tokenizer_files,
)
from tpcore.checkpoint.unpickle import load_pickle
from tpcore.parallel.sharding import Replicated, full_shape, unshard

FORMAT = "Megatron-LM"

_MAX_DEPTH = 8
_MAX_DRIFT = 1e-2
_QKV = re.compile(r"\.attention\.qkv\.(weight|bias)$")


def read(
    path: Path, *, qkv_layout: str | None = None, overrides: Mapping[str, Any] | None = None
) -> CanonicalState:
    """Read a checkpoint: its root, an iter_*/release folder, a rank's folder, or one file.

    Args:
        path: where it is.
        qkv_layout: order of the q/k/v rows, a key of `qkv.LAYOUTS`; needed only for a file that
            lost its checkpoint_version.
        overrides: the caller's fields of BertConfig. Here only those matter that a file without
            args cannot say: num_attention_heads, and num_token_types=0.

    Raises:
        CheckpointError: a file is missing or damaged, or something in it is not accounted for.
    """
    files = find_files(path)
    stages = [[_read_rank(file) for file in row] for row in files]
    first = stages[0][0]
    args = first.args
    where = str(path)
    _check_sizes(files, args)
    shards, tied = _join_stages(stages)

    size = len(files[0])
    try:
        shapes = {
            name: full_shape(pieces[0].shape, sharding_of(name), size, name=name)
            for name, pieces in shards.items()
        }
    except ValueError as error:  # a scalar where rows or columns should be
        raise CheckpointError(f"{where}: {error}") from error
    sizes = sizes_from_shapes(shapes, names.count_layers(_layered(shapes), where), where)
    layout = _layout(first, where) if qkv_layout is None else _checked_layout(qkv_layout)
    config = config_from_args(args, sizes, has_pooler(shapes), overrides)
    check_tensor_parallel_size(config, size)
    _check_equal_shards(shards, where)
    head, head_kwargs = head_from_args(args, find_head(shapes))
    if "head.classifier.weight" in shapes:
        head_kwargs["num_labels"] = shapes["head.classifier.weight"][0]
    if head == "pretraining":
        head_kwargs["binary"] = "head.binary.weight" in shapes

    join = partial(_join, layout=layout, num_heads=config.num_attention_heads // size, where=where)
    tensors = {
        name: StoredTensor(shapes[name], pieces[0].dtype, partial(join, name, pieces))
        for name, pieces in shards.items()
    }
    root = files[0][0].parent
    folders = (path if path.is_dir() else path.parent, root, root.parent, root.parent.parent)
    return check_complete(
        CanonicalState(
            config=config,
            head=head,
            head_kwargs=head_kwargs,
            labels=labels_from_args(args),
            tensors=tensors,
            copies={name: partial(join, name, pieces) for name, pieces in tied.items()},
            source=Source(
                path=path,
                format=first.family,
                version=first.version_text,
                tensor_parallel_size=size,
                pipeline_parallel_size=len(files),
                iteration=None if root.parent.name == "release" else first.iteration or None,
                qkv_layout=layout,
                lowercase=lowercase_from_args(args),
                notes=first.notes,
                files=tuple(file for row in files for file in row),
                tokenizer_files=tokenizer_files(folders),
            ),
        )
    )


def write(
    state: CanonicalState, folder: Path, tensor_parallel_size: int, ranks: Iterable[int]
) -> None:
    """Write the files of some tensor-parallel ranks of a version-3 directory into `folder`.

    The caller gives an empty folder, and renames it when all ranks are written.

    Raises:
        CheckpointError: the size does not fit the model, or Megatron has no place for its head.
    """
    for rank in ranks:
        save_rank(folder, rank_content(state, tensor_parallel_size, rank), state, rank)


def save_rank(folder: Path, content: dict[str, Any], state: CanonicalState, rank: int) -> None:
    """Put one rank's content where Megatron looks for it, and the tracker file beside."""
    name = iteration_folder(state.source.iteration)
    target = folder / name / f"mp_rank_{rank:02d}" / MODEL_FILES[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, target)
    if rank == 0:
        word = str(state.source.iteration) if name != "release" else name
        (folder / TRACKER).write_text(word)


def check_writable(state: CanonicalState, tensor_parallel_size: int) -> dict[str, str]:
    """Canonical name -> name in the file, or an error before anything is written."""
    check_tensor_parallel_size(state.config, tensor_parallel_size)
    check_head(state, (*HEADS, "multichoice"))
    expanded = names.expand(names.MEGATRON, state.config.num_layers)
    inverse = {target: key for key, target in expanded.items() if target is not None}
    unknown = [name for name in state.tensors if name not in inverse]
    if unknown:
        raise CheckpointError(
            f"{state.source.path}: a Megatron directory has no place for {names.listing(unknown)}"
        )
    return inverse


def rank_content(state: CanonicalState, size: int, rank: int) -> dict[str, Any]:
    """What torch.save writes for one rank: args, version, iteration and the nested model."""
    inverse = check_writable(state, size)
    rows = state.padded_rows(size)
    flat = {
        key: state.shard(name, rank, size, rows)
        for name, key in inverse.items()
        if name in state.tensors
    }
    dtype = next(iter(flat.values())).dtype
    return {
        "args": argparse.Namespace(**args_from_state(state, size, rows, dtype)),
        "checkpoint_version": 3.0,
        "iteration": state.source.iteration or 0,
        "model": _nest(flat),
    }


def _nest(flat: Mapping[str, Tensor]) -> dict[str, Any]:
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


# --- one rank's file -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _RankFile:
    path: Path
    args: Fields
    chunks: list[dict[str, Tensor]]  # canonical names; layer numbers count from 0 in each chunk
    tied: dict[str, Tensor]  # canonical name -> this rank's second copy of it
    family: str
    old_names: bool
    version: float | None
    iteration: int | None

    @property
    def version_text(self) -> str:
        return "0 (absent)" if self.version is None else f"{self.version:g}"

    @property
    def notes(self) -> tuple[str, ...]:
        spelling = "transformer/attention" if self.old_names else "encoder/self_attention"
        args = "with" if self.args.values else "without"
        if self.family != FORMAT:
            return (f"{args} args",)
        return (f"names of layers: {spelling}", f"{args} args")


def _read_rank(path: Path) -> _RankFile:
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict with a model")
    chunk_keys = sorted(
        (key for key in content if isinstance(key, str) and re.fullmatch(r"model\d{0,3}", key)),
        key=lambda key: int(key[5:] or -1),
    )
    if not chunk_keys:
        keys = names.listing(sorted(str(key)[:60] for key in content))
        raise CheckpointError(f"{path}: there is no 'model' in it; it holds: {keys or 'nothing'}")
    raw_args = content.get("args", content.get("config"))
    args = {} if raw_args is None else raw_args if isinstance(raw_args, dict) else None
    if isinstance(raw_args, argparse.Namespace):
        args = vars(raw_args)
    if args is None:
        raise CheckpointError(f"{path}: args is a {type(raw_args).__name__}, not a namespace")
    limit = path.stat().st_size
    flats = [_flatten(content[key], path, limit) for key in chunk_keys]
    core = any(
        key.removeprefix("module.").startswith(("embedding.", "encoder."))
        for flat in flats
        for key in flat
    )
    table, aliases, ties = (
        (names.MEGATRON_CORE, names.MEGATRON_CORE_ALIASES, names.MEGATRON_CORE_TIED)
        if core
        else (names.MEGATRON, names.MEGATRON_ALIASES, names.MEGATRON_TIED)
    )
    chunks, tied = [], {}
    for flat in flats:
        spelled = names.apply_aliases(flat, aliases, str(path))
        known = names.expand(table, names.count_layers(spelled, str(path)))
        translated = names.translate(spelled, known, str(path))
        chunks.append(
            {name: _checked_tensor(flat[key], key, path) for name, key in translated.items()}
        )
        for key, target in ties.items():
            if key in spelled:
                tied[target] = _checked_tensor(flat[spelled[key]], key, path)
    facts = Fields({k: v for k, v in content.items() if isinstance(k, str)}, str(path))
    return _RankFile(
        path=path,
        args=Fields(args, str(path)),
        chunks=chunks,
        tied=tied,
        family="Megatron-Core (torch)" if core else FORMAT,
        old_names=any(".transformer." in key for flat in flats for key in flat),
        version=_version(content.get("checkpoint_version"), path),
        iteration=facts.integer("iteration", facts.integer("total_iters")),
    )


def _version(value: Any, path: Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1, 2, 3):
        raise CheckpointError(
            f"{path}: checkpoint_version={shown(value)} is unknown; 0 to 3 are read"
        )
    return float(value)


def _flatten(tree: Any, path: Path, limit: int) -> dict[str, Any]:
    """Nested dicts -> dotted keys. `limit` bounds what a tensor may claim to hold, in bytes."""
    flat: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(part: Any, prefix: str, depth: int) -> None:
        where = prefix or "model"
        if not isinstance(part, dict):
            raise CheckpointError(f"{path}: {where:.80} is a {type(part).__name__}, not a dict")
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{path}: {where:.80} is nested more than {_MAX_DEPTH} deep")
        if id(part) in seen:
            raise CheckpointError(f"{path}: {where:.80} occurs twice, or contains itself")
        seen.add(id(part))
        for key, value in part.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{path}: {where:.80} has a key that is no string")
            name = f"{prefix}.{key}" if prefix else key
            if isinstance(value, dict):
                visit(value, name, depth + 1)
                continue
            if name in flat:
                raise CheckpointError(f"{path}: {name:.80} occurs twice")
            if isinstance(value, Tensor) and value.numel() * value.element_size() > limit:
                raise CheckpointError(
                    f"{path}: {name:.80} claims shape {list(value.shape)}, more than the file holds"
                )
            flat[name] = value

    visit(tree, "", 0)
    return flat


def _checked_tensor(value: Any, key: str, path: Path) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path}: {key} is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise CheckpointError(f"{path}: {key} is not an ordinary dense tensor")
    return value.detach()


# --- joining ranks -------------------------------------------------------------------------------


def _check_sizes(files: list[list[Path]], args: Fields) -> None:
    """Compare the ranks that are there with the sizes the run was started with."""
    size = args.integer("tensor_model_parallel_size", args.integer("model_parallel_size"))
    stages = args.integer("pipeline_model_parallel_size")
    for claimed, present, kind in (
        (size, len(files[0]), "tensor-parallel rank"),
        (stages, len(files), "pipeline stage"),
    ):
        if claimed is not None and claimed != present:
            there = f"{present} {kind}{'s are' if present > 1 else ' is'} there"
            raise CheckpointError(
                f"{files[0][0]}: was written by {claimed} {kind}s, but {there}; rank files "
                "(mp_rank_XX) are missing, or not the folder that holds them all was given"
            )


def _layout(first: _RankFile, where: str) -> str:
    """Order of the q/k/v rows; refuses a file that cannot be as old as it seems."""
    if first.family != FORMAT:
        return "v3"
    if first.version is not None:
        return f"v{int(first.version)}"
    newer = "its names of layers" if not first.old_names else None
    if "tensor_model_parallel_size" in first.args:
        newer = "args.tensor_model_parallel_size"
    if newer:
        raise CheckpointError(
            f"{where}: there is no checkpoint_version, which means version 0, but {newer} came "
            "only with version 3; say which order the q/k/v rows have: qkv_layout='v3' (or v0, v1)"
        )
    return "v0"


def _checked_layout(layout: str) -> str:
    if layout not in qkv.LAYOUTS:
        raise CheckpointError(f"qkv_layout={layout!r} is unknown; use {', '.join(qkv.LAYOUTS)}")
    return layout


def _join_stages(
    stages: list[list[_RankFile]],
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Canonical name -> its shards in rank order, with layers numbered through all stages."""
    shards: dict[str, list[Tensor]] = {}
    tied: dict[str, list[Tensor]] = {}
    offset = 0
    # With interleaved stages (model0, model1, ...) chunk 0 of every stage comes before chunk 1.
    for chunk in range(len(stages[0][0].chunks)):
        for row in stages:
            if any(len(rank.chunks) != len(stages[0][0].chunks) for rank in row):
                raise CheckpointError(f"{row[0].path}: the ranks hold different numbers of chunks")
            parts = [rank.chunks[chunk] for rank in row]
            for rank, part in zip(row, parts, strict=True):
                if part.keys() != parts[0].keys():
                    differ = names.listing(sorted(part.keys() ^ parts[0].keys()))
                    raise CheckpointError(
                        f"{rank.path}: its parameters differ from those of {row[0].path}: {differ}"
                    )
            for name in parts[0]:
                moved = names.shift_layer(name, offset)
                if moved in shards:
                    raise CheckpointError(f"{row[0].path}: {name} is in an earlier stage too")
                shards[moved] = [part[name] for part in parts]
            offset += names.count_layers(_layered(parts[0]), str(row[0].path))
    for row in stages:
        for name in row[0].tied:
            tied[name] = [rank.tied[name] for rank in row if name in rank.tied]
    return shards, tied


def _layered(canonical: Iterable[str]) -> list[str]:
    return [name.replace("blocks.", "layers.", 1) for name in canonical]


def _check_equal_shards(shards: Mapping[str, list[Tensor]], where: str) -> None:
    for name, pieces in shards.items():
        for rank, piece in enumerate(pieces):
            if piece.shape != pieces[0].shape or piece.dtype != pieces[0].dtype:
                raise CheckpointError(
                    f"{where}: {name} is {list(pieces[0].shape)} {pieces[0].dtype} on rank 0, but "
                    f"{list(piece.shape)} {piece.dtype} on rank {rank}"
                )


def _join(
    name: str,
    pieces: list[Tensor],
    *,
    layout: str,
    num_heads: int,
    where: str,
) -> Tensor:
    sharding = sharding_of(name)
    if isinstance(sharding, Replicated):
        # Copies may drift apart by rounding in training; Megatron's own tools take rank 0's too.
        for rank, piece in enumerate(pieces[1:], start=1):
            if not torch.allclose(
                pieces[0].float(), piece.float(), rtol=_MAX_DRIFT, atol=_MAX_DRIFT, equal_nan=True
            ):
                raise CheckpointError(
                    f"{where}: {name} should be the same on every rank, but rank {rank} differs "
                    "from rank 0; the files come from different models"
                )
        return pieces[0]
    if _QKV.search(name):
        convert: Callable[[Tensor], Tensor] = partial(
            qkv.to_canonical, layout=layout, num_heads=num_heads
        )
        pieces = [convert(piece) for piece in pieces]
    return unshard(pieces, sharding, name=name)
