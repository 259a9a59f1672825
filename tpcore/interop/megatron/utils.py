"""Division without remainder, and tensors split over the ranks as one row of numbers."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from tpcore.interop.megatron.parallel_state import resolve_group
from tpcore.parallel.collectives import all_gather, own_slice
from tpcore.parallel.group import TensorParallelGroup


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raise ValueError if there is a remainder."""
    if numerator % denominator:
        raise ValueError(f"{numerator} is not divisible by {denominator}")


def divide(numerator: int, denominator: int) -> int:
    """The quotient; ValueError if there is a remainder."""
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def split_tensor_into_1d_equal_chunks(
    tensor: Tensor,
    new_buffer: bool = False,
    tp_group: TensorParallelGroup | dist.ProcessGroup | None = None,
) -> Tensor:
    """This rank's share of the numbers of a tensor, [numel / size]; a copy with ``new_buffer``."""
    share = own_slice(tensor.reshape(-1), resolve_group(tp_group), 0)
    return share.clone() if new_buffer else share


def gather_split_1d_tensor(
    tensor: Tensor, tp_group: TensorParallelGroup | dist.ProcessGroup | None = None
) -> Tensor:
    """The opposite: the shares of all ranks, one after the other. Not differentiable."""
    return all_gather(tensor, resolve_group(tp_group))
