"""How a full tensor is cut into shards, as pure tensor algebra: no process group, no communication.

A sharding says how one parameter is laid out over the ranks of a tensor-parallel group;
``sharding_table`` collects them by name for a whole module. Loading at another size is ``reshard``:
unshard, then shard.

    Sharded(0)     rows:  rank r holds full[r * n/size : (r + 1) * n/size]
    Sharded(1)     columns, likewise
    ShardedQKV(0)  full = [all q | all k | all v] along dim; rank r holds [its q | its k | its v]
    ShardedParts(0, 2)  the same for any number of parts (a gate and its values: Megatron's stride)
    Replicated()   every rank holds the full tensor

The table lives in the modules (``own_sharding()``) and not in attributes of the tensors: those are
lost in deepcopy, in meta-device initialisation and when a state dict is assigned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tpcore.parallel.group import divide


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the full tensor."""


@dataclass(frozen=True)
class Sharded:
    """Rank r holds the r-th of ``size`` equal, contiguous slices of ``dim``."""

    dim: int


@dataclass(frozen=True)
class ShardedQKV:
    """The full tensor is [all q | all k | all v] along ``dim``, and each part is sharded."""

    dim: int = 0


@dataclass(frozen=True)
class ShardedParts:
    """The full tensor is ``parts`` equal blocks along ``dim``, and each block is sharded.

    Megatron-LM calls the number of blocks the stride of a partition.
    """

    dim: int
    parts: int


Sharding: TypeAlias = Replicated | Sharded | ShardedQKV | ShardedParts

_QKV_PARTS = 3


def num_parts(sharding: Sharded | ShardedQKV | ShardedParts) -> int:
    """Number of blocks, each of which is split over the ranks by itself."""
    if isinstance(sharding, ShardedParts):
        return sharding.parts
    return _QKV_PARTS if isinstance(sharding, ShardedQKV) else 1


def _check_dim(
    shape: Sequence[int], sharding: Sharded | ShardedQKV | ShardedParts, name: str
) -> int:
    if not -len(shape) <= sharding.dim < len(shape):
        raise ValueError(
            f"{name} of shape {list(shape)} has no dim {sharding.dim} to shard; got {sharding}"
        )
    return sharding.dim % len(shape)


def shard_shape(
    full_shape: Sequence[int], sharding: Sharding, size: int, *, name: str = "tensor"
) -> tuple[int, ...]:
    """Shape of one shard of a tensor of shape ``full_shape`` over ``size`` ranks.

    Raises:
        ValueError: the dimension does not exist or cannot be split evenly; names the parameter.
    """
    shape = list(full_shape)
    if isinstance(sharding, Replicated):
        return tuple(shape)
    dim = _check_dim(shape, sharding, name)
    parts = num_parts(sharding)
    if shape[dim] % parts:
        raise ValueError(
            f"{name} of shape {shape} cannot be {_in_words(parts, 'all ')}: dim {dim} has "
            f"{shape[dim]} entries, which {parts} does not divide"
        )
    shape[dim] = parts * divide(shape[dim] // parts, size, f"dim {dim} of {name}")
    return tuple(shape)


def full_shape(
    shard_shape: Sequence[int], sharding: Sharding, size: int, *, name: str = "tensor"
) -> tuple[int, ...]:
    """Shape of the full tensor whose shards over ``size`` ranks have shape ``shard_shape``.

    Raises:
        ValueError: the dimension does not exist; names the parameter.
    """
    shape = list(shard_shape)
    if not isinstance(sharding, Replicated):
        shape[_check_dim(shape, sharding, name)] *= size
    return tuple(shape)


def shard(
    full: Tensor, sharding: Sharding, rank: int, size: int, *, name: str = "tensor"
) -> Tensor:
    """The part of ``full`` that ``rank`` of ``size`` holds.

    A view of ``full``, except for blocks (q, k, v), which are copied.

    Raises:
        ValueError: the tensor cannot be split so; names the parameter.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank} of {name} is not a rank of {size}; expected 0 to {size - 1}")
    shape = shard_shape(full.shape, sharding, size, name=name)
    if isinstance(sharding, Replicated) or size == 1:
        return full
    dim = sharding.dim % full.ndim
    parts = num_parts(sharding)
    length = shape[dim] // parts
    blocks = [part.narrow(dim, rank * length, length) for part in full.chunk(parts, dim)]
    return blocks[0] if parts == 1 else torch.cat(blocks, dim)


def unshard(shards: Sequence[Tensor], sharding: Sharding, *, name: str = "tensor") -> Tensor:
    """The full tensor, from the shards of all ranks in rank order; inverse of ``shard``.

    Raises:
        ValueError: there are no shards, their shapes or dtypes differ, or replicated copies are not
            equal; names the parameter and the rank.
    """
    if not shards:
        raise ValueError(f"{name} has no shards to join")
    for rank, piece in enumerate(shards):
        if piece.shape != shards[0].shape or piece.dtype != shards[0].dtype:
            raise ValueError(
                f"{name} differs between ranks: {list(shards[0].shape)} {shards[0].dtype} on rank "
                f"0, {list(piece.shape)} {piece.dtype} on rank {rank}"
            )
    if isinstance(sharding, Replicated):
        for rank, piece in enumerate(shards[1:], start=1):
            if not _bit_equal(piece, shards[0]):
                raise ValueError(
                    f"{name} is replicated, but its values on rank {rank} are not those on rank 0; "
                    "the shards come from different models, or the parameter is sharded"
                )
        return shards[0]
    full_shape(shards[0].shape, sharding, len(shards), name=name)
    if len(shards) == 1:
        return shards[0]
    parts = num_parts(sharding)
    dim = sharding.dim
    if shards[0].shape[dim] % parts:
        raise ValueError(
            f"{name}: a shard of shape {list(shards[0].shape)} cannot be {_in_words(parts)}:"
            f" {parts} does not divide dim {dim}"
        )
    pieces = [piece.chunk(parts, dim) for piece in shards]
    return torch.cat([piece[part] for part in range(parts) for piece in pieces], dim)


def reshard(
    shards: Sequence[Tensor], sharding: Sharding, new_size: int, *, name: str = "tensor"
) -> list[Tensor]:
    """The shards over ``new_size`` ranks, from those over len(shards) ranks.

    Raises:
        ValueError: as ``unshard`` and ``shard``.
    """
    full = unshard(shards, sharding, name=name)
    return [shard(full, sharding, rank, new_size, name=name) for rank in range(new_size)]


def sharding_table(module: nn.Module) -> dict[str, Sharding]:
    """The sharding of every parameter and persistent buffer, by its name in the state dict.

    Asks each submodule that has a method ``own_sharding() -> dict[str, Sharding]`` for the tensors
    that it owns directly; everything else is Replicated. Any module may take part by defining that
    method.

    Raises:
        ValueError: a module's own_sharding names a tensor that it does not have.
    """
    table: dict[str, Sharding] = {name: Replicated() for name in module.state_dict(keep_vars=True)}
    for prefix, submodule in module.named_modules(remove_duplicate=False):
        own: Mapping[str, Sharding] = (
            submodule.own_sharding() if hasattr(submodule, "own_sharding") else {}
        )
        for name, sharding in own.items():
            full_name = f"{prefix}.{name}" if prefix else name
            if full_name not in table:
                raise ValueError(
                    f"{type(submodule).__name__}.own_sharding() names {name!r}, but {full_name!r} "
                    "is not in the state dict"
                )
            table[full_name] = sharding
    return table


def _in_words(parts: int, every: str = "") -> str:
    qkv = f"[{every}q | {every}k | {every}v]"
    return qkv if parts == _QKV_PARTS else f"{parts} equal blocks"


def _bit_equal(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    # torch.equal says that NaN differs from itself; a diverged model must still be joined.
    return bool(
        a.is_floating_point()
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )
