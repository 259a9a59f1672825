"""The orders in which checkpoints keep the rows of a fused query-key-value weight.

With n heads of size d, a full weight [3h, h] or bias [3h] has its rows in one of these orders
(leading axis split into three, slowest first):

    version 0 (no checkpoint_version)     (3, n, d)     all queries, then all keys, then all values
    version 1                             (n, d, 3)
    versions 2 and 3, Megatron-Core       (n, 3, d)     the canonical order; also tpcore's
    Hugging Face                          separate q, k, v, each (n, d)

The order holds inside every shard: a shard is brought into canonical order first, then shards are
simply concatenated. Concatenating the shards of a version-0 file does not give a version-0 matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS: dict[str, tuple[str, str, str]] = {
    "v0": ("3", "n", "d"),
    "v1": ("n", "d", "3"),
    "v2": ("n", "3", "d"),
    "v3": ("n", "3", "d"),
}
"""Row order by the checkpoint version that wrote it."""

CANONICAL = LAYOUTS["v3"]


def to_canonical(rows: Tensor, layout: str, num_heads: int) -> Tensor:
    """Reorder the rows of one shard (`num_heads` of its heads) from `layout` to (n, 3, d)."""
    return _reorder(rows, LAYOUTS[layout], CANONICAL, num_heads)


def from_canonical(rows: Tensor, layout: str, num_heads: int) -> Tensor:
    """The inverse of `to_canonical`."""
    return _reorder(rows, CANONICAL, LAYOUTS[layout], num_heads)


def join(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Canonical rows from separate q, k and v, each [h, ...]."""
    parts = [part.unflatten(0, (num_heads, -1)) for part in (query, key, value)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def split(rows: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `join`: q, k and v, each [h, ...] and contiguous."""
    query, key, value = rows.unflatten(0, (num_heads, 3, -1)).unbind(1)
    return (
        query.flatten(0, 1).contiguous(),
        key.flatten(0, 1).contiguous(),
        value.flatten(0, 1).contiguous(),
    )


def _reorder(
    rows: Tensor, source: tuple[str, str, str], target: tuple[str, str, str], num_heads: int
) -> Tensor:
    if source == target:
        return rows
    sizes = {"3": 3, "n": num_heads, "d": -1}
    axes = rows.unflatten(0, [sizes[axis] for axis in source])
    order = [source.index(axis) for axis in target]
    return axes.permute(*order, *range(3, axes.dim())).flatten(0, 2)
