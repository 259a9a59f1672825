"""Whole-then-shard initialisation: the same weights at every tensor-parallel size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import Sharding, shard

# Fills a full (unsharded) tensor in place, as the functions of torch.nn.init do. A module keeps it
# for reset_parameters, so a partial (`partial(nn.init.normal_, std=0.02)`) and not a lambda lets
# the module be pickled.
InitMethod: TypeAlias = Callable[[Tensor], object]


def draw_whole_then_shard(
    parameter: Tensor,
    full_shape: Sequence[int],
    sharding: Sharding,
    tp: TensorParallelGroup,
    init_method: InitMethod,
) -> None:
    """Fill this rank's shard with its part of a full tensor that every rank draws alike.

    The full tensor is drawn in float32 on the CPU from torch's default generator, whatever the
    device and dtype of the parameter, so equal seeds on all ranks give the same model at every
    tensor-parallel size and on every device. A parameter on the meta device draws nothing.
    """
    if parameter.is_meta:
        return
    with torch.no_grad():
        full = torch.empty(list(full_shape), dtype=torch.float32, device="cpu")
        init_method(full)
        parameter.copy_(shard(full, sharding, tp.rank, tp.size))
