"""Philox4x32-10 in plain PyTorch: the generator behind every dropout bit, on any device.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC11).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply_32(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in halves so that int64 never overflows."""
    low = (x & 0xFFFF) * multiplier
    high = (x >> 16) * multiplier + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words; shapes broadcast.

    Args:
        counter: the four counter words.
        key: the two key words.

    Returns:
        The four output words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_32(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply_32(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """An element is kept if its random word is at least this number: round(p * 2^32)."""
    return min(round(p * 2.0**32), _WORD)


def philox_keep_mask(
    seed: Tensor,
    row_ids: Tensor,
    p: float,
    stream: int,
    num_columns: int,
    column_offset: int,
    head_offset: int,
    num_heads: int,
) -> Tensor:
    """`torch.ops.tpcore.dropout_keep_mask` in plain PyTorch: same bits, any device."""
    device = row_ids.device
    first_group = column_offset // 4
    num_groups = (column_offset + num_columns + 3) // 4 - first_group
    seed = seed.reshape(())
    rows = row_ids[:, None, :, None]
    heads = torch.arange(head_offset, head_offset + num_heads, device=device)[:, None, None]
    groups = torch.arange(first_group, first_group + num_groups, device=device)
    words = philox4x32(
        (groups, rows & _WORD, (rows >> 32) & _WORD, (heads << 16) | stream),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    keep = torch.stack(torch.broadcast_tensors(*words), dim=-1) >= dropout_threshold(p)
    start = column_offset - 4 * first_group
    return keep.flatten(-2)[..., start : start + num_columns].contiguous()
