"""Megatron-LM checkpoint directories in the `torch` container: read at any size, written at any.

    <root>/latest_checkpointed_iteration.txt      "10" or "release"
    <root>/iter_0000010/mp_rank_TT/model_optim_rng.pt            tensor-parallel rank TT
    <root>/iter_0000010/mp_rank_TT_PPP/model_optim_rng.pt        and pipeline stage PPP

Files of every checkpoint_version (absent = 0, 1, 2, 3) are read, with the names that Megatron-LM
has used since 2019, nested or flat, and with Megatron-Core's. `megatron_write` writes them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcore.checkpoint import names
from tpcore.checkpoint.errors import CheckpointError
from tpcore.checkpoint.formats import qkv
from tpcore.checkpoint.formats.megatron_args import (
    config_from_args,
    head_from_args,
    labels_from_args,
    lowercase_from_args,
    stated_fields,
)
from tpcore.checkpoint.formats.megatron_files import find_files
from tpcore.checkpoint.formats.megatron_rank import LEGACY, RankFile, read_rank
from tpcore.checkpoint.state import (
    CanonicalState,
    Source,
    check_complete,
    check_tensor_parallel_size,
    find_head,
    has_pooler,
    head_layers,
    sharding_of,
    sizes_from_shapes,
    tokenizer_files,
)
from tpcore.checkpoint.stored import Box, Piece, StoredTensor, joined
from tpcore.checkpoint.untrusted.fields import Fields
from tpcore.models.config import BertConfig
from tpcore.parallel.sharding import Sharded, full_shape

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
    stages = [[read_rank(file) for file in row] for row in files]
    first = stages[0][0]
    _check_sizes(files, first.args)
    _check_ranks(stages)
    root = files[0][0].parent
    folders = (path if path.is_dir() else path.parent, root, root.parent, root.parent.parent)
    source = Source(
        path=path,
        format=first.family,
        iteration=None if root.parent.name == "release" else first.iteration or None,
        files=tuple(file for row in files for file in row),
        tokenizer_files=tokenizer_files(folders),
    )
    return state_of(stages, source, qkv_layout=qkv_layout, overrides=overrides)


def state_of(
    stages: Sequence[Sequence[RankFile]],
    source: Source,
    *,
    qkv_layout: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> CanonicalState:
    """The model that the files of all ranks make up.

    Args:
        stages: by pipeline stage and tensor-parallel rank.
        source: what is known of the checkpoint beyond its files; completed here.
        qkv_layout: as in `read`.
        overrides: as in `read`.

    Raises:
        CheckpointError: the files do not fit together, or something is not accounted for.
    """
    first, size, where = stages[0][0], len(stages[0]), str(source.path)
    args = first.args
    shards, tied = _join_stages(stages)
    try:
        shapes = {
            name: full_shape(pieces[0].shape, sharding_of(name), size, name=name)
            for name, pieces in shards.items()
        }
    except ValueError as error:  # a scalar where rows or columns should be
        raise CheckpointError(f"{where}: {error}") from error
    config, head, head_kwargs = describe(shapes, args, where, overrides)
    layout = _layout(first, where) if qkv_layout is None else _checked_layout(qkv_layout)
    check_tensor_parallel_size(config, size)
    _check_equal_shards(shards, where)
    join = partial(_join, layout=layout, num_heads=config.num_attention_heads // size, where=where)
    return check_complete(
        CanonicalState(
            config=config,
            head=head,
            head_kwargs=head_kwargs,
            labels=labels_from_args(args),
            tensors={name: join(name, pieces) for name, pieces in shards.items()},
            copies={name: join(name, pieces) for name, pieces in tied.items()},
            source=dataclasses.replace(
                source,
                version=first.version_text,
                tensor_parallel_size=size,
                pipeline_parallel_size=len(stages),
                qkv_layout=layout,
                lowercase=lowercase_from_args(args),
                notes=(*source.notes, *first.notes),
                stated=stated_fields(args),
            ),
        )
    )


def describe(
    shapes: Mapping[str, tuple[int, ...]],
    args: Fields,
    where: str,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[BertConfig, str | None, dict[str, Any]]:
    """Configuration, head and the head's arguments, from full shapes and a run's arguments.

    Raises:
        CheckpointError: the two contradict each other, or do not say enough.
    """
    sizes = sizes_from_shapes(shapes, names.count_layers(_layered(shapes), where), where)
    config = config_from_args(args, sizes, has_pooler(shapes), overrides)
    head, head_kwargs = head_from_args(args, find_head(shapes), head_layers(shapes))
    if "head.classifier.weight" in shapes:
        shape = shapes["head.classifier.weight"]
        head_kwargs["num_labels"] = shape[0] if shape else 0
    if head == "pretraining":
        head_kwargs["binary"] = "head.binary.weight" in shapes
    return config, head, head_kwargs


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
            way_out = (
                "folders of ranks (mp_rank_XX) of another checkpoint are among them: take them away"
                if present > claimed
                else "rank files (mp_rank_XX) are missing, or not the folder that holds them all "
                "was given"
            )
            written = f"{claimed} {kind}{'s' if claimed > 1 else ''}"
            raise CheckpointError(
                f"{files[0][0]}: was written by {written}, but {there}; {way_out}"
            )


def _check_ranks(stages: Sequence[Sequence[RankFile]]) -> None:
    """Compare what the files of the ranks say of themselves: they come from one step of one run."""
    first = stages[0][0]
    for row in stages:
        for rank in row:
            for what, mine, other in (
                ("checkpoint_version", rank.version_text, first.version_text),
                ("iteration", rank.iteration, first.iteration),
            ):
                if mine != other:
                    raise CheckpointError(
                        f"{rank.where}: has {what}={mine}, but {first.where} has {other}; the "
                        "files come from different checkpoints"
                    )
        # Each says which process wrote it; ranks of a group are consecutive processes.
        named = [rank.args.values.get("rank") for rank in row]
        writers = [writer for writer in named if isinstance(writer, int)]
        if len(writers) < len(row):
            continue
        for rank, writer, expected in zip(row, writers, sorted(writers), strict=True):
            if writer != expected and len(set(writers)) == len(writers):
                raise CheckpointError(
                    f"{rank.where}: was written by process {writer}, where the file of process "
                    f"{expected} belongs; files or folders of ranks were swapped, rename them back"
                )


def _layout(first: RankFile, where: str) -> str:
    """Order of the q/k/v rows; refuses a file that cannot be as old as it seems."""
    if first.family != LEGACY:
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
    stages: Sequence[Sequence[RankFile]],
) -> tuple[dict[str, list[Piece]], dict[str, list[Piece]]]:
    """Canonical name -> its shards in rank order, with layers numbered through all stages."""
    shards: dict[str, list[Piece]] = {}
    tied: dict[str, list[Piece]] = {}
    offset = 0
    # With interleaved stages (model0, model1, ...) chunk 0 of every stage comes before chunk 1.
    for chunk in range(len(stages[0][0].chunks)):
        for row in stages:
            if any(len(rank.chunks) != len(stages[0][0].chunks) for rank in row):
                raise CheckpointError(f"{row[0].where}: the ranks hold different numbers of chunks")
            parts = [rank.chunks[chunk] for rank in row]
            for rank, part in zip(row, parts, strict=True):
                if part.keys() != parts[0].keys():
                    differ = names.listing(sorted(part.keys() ^ parts[0].keys()))
                    raise CheckpointError(
                        f"{rank.where}: its parameters differ from those of {row[0].where}: "
                        f"{differ}"
                    )
            for name in parts[0]:
                moved = names.shift_layer(name, offset)
                if moved in shards:
                    raise CheckpointError(f"{row[0].where}: {name} is in an earlier stage too")
                shards[moved] = [part[name] for part in parts]
            offset += names.count_layers(_layered(parts[0]), row[0].where)
    for row in stages:
        for name in row[0].tied:
            tied[name] = [rank.tied[name] for rank in row if name in rank.tied]
    return shards, tied


def _layered(canonical: Iterable[str]) -> list[str]:
    return [name.replace("blocks.", "layers.", 1) for name in canonical]


def _check_equal_shards(shards: Mapping[str, list[Piece]], where: str) -> None:
    for name, pieces in shards.items():
        for rank, piece in enumerate(pieces):
            if piece.shape != pieces[0].shape or piece.dtype != pieces[0].dtype:
                raise CheckpointError(
                    f"{where}: {name} is {list(pieces[0].shape)} {pieces[0].dtype} on rank 0, but "
                    f"{list(piece.shape)} {piece.dtype} on rank {rank}"
                )


@dataclass(frozen=True)
class _Replicas:
    """What every rank has a copy of."""

    name: str
    pieces: list[Piece]
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pieces[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    def read_box(self, box: Box) -> Tensor:
        """The part of rank 0's copy, after a look at the others."""
        # Copies may drift apart by rounding in training; Megatron's own tools take rank 0's too.
        first = self.pieces[0].read_box(box)
        for rank, piece in enumerate(self.pieces[1:], start=1):
            if not torch.allclose(
                first.float(),
                piece.read_box(box).float(),
                rtol=_MAX_DRIFT,
                atol=_MAX_DRIFT,
                equal_nan=True,
            ):
                raise CheckpointError(
                    f"{self.where}: {self.name} should be the same on every rank, but rank {rank} "
                    "differs from rank 0; the files come from different models"
                )
        return first


@dataclass(frozen=True)
class _Reordered:
    """Rows of q, k and v in another order than the canonical one; whole heads are read."""

    piece: Piece
    layout: str
    num_heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.piece.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.piece.dtype

    def read_box(self, box: Box) -> Tensor:
        """The part, in canonical order."""
        (begin, end), rest = box[0], box[1:]
        size = self.shape[0] // (3 * self.num_heads)
        first, last = begin // (3 * size), -(-end // (3 * size))
        rows = [(3 * first * size, 3 * last * size)]
        if qkv.LAYOUTS[self.layout][0] == "3":  # all q, then all k, then all v
            starts = (part * self.num_heads for part in range(3))
            rows = [((n + first) * size, (n + last) * size) for n in starts]
        parts = [self.piece.read_box((bounds, *rest)) for bounds in rows]
        heads = qkv.to_canonical(torch.cat(parts), self.layout, last - first)
        return heads[begin - 3 * first * size : end - 3 * first * size]


def _join(
    name: str, pieces: list[Piece], *, layout: str, num_heads: int, where: str
) -> StoredTensor:
    sharding = sharding_of(name)
    if not isinstance(sharding, Sharded):
        only = pieces[0] if len(pieces) == 1 else _Replicas(name, pieces, where)
        return joined([only], None)
    if _QKV.search(name) and qkv.LAYOUTS[layout] != qkv.CANONICAL:
        pieces = [_Reordered(piece, layout, num_heads) for piece in pieces]
    return joined(pieces, sharding.dim)
