"""The regions of Megatron-LM: where an activation is whole, and where a rank has its part of it.

    name                                                forward              backward
    copy_to_tensor_model_parallel_region                as it is             all-reduce
    reduce_from_tensor_model_parallel_region            all-reduce           as it is
    scatter_to_tensor_model_parallel_region             own part of the      all-gather
    gather_from_tensor_model_parallel_region              last dim, all-gather   own part
    scatter_to_sequence_parallel_region                 own part of dim 0    all-gather
    gather_from_sequence_parallel_region                all-gather dim 0     reduce-scatter
    reduce_scatter_to_sequence_parallel_region          reduce-scatter       all-gather
    all_gather_last_dim_from_tensor_parallel_region     all-gather last dim  reduce-scatter
    reduce_scatter_last_dim_to_tensor_parallel_region   reduce-scatter       all-gather

``group``: None for the tensor-parallel group of this process. No function modifies its input.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

from tpcore.interop.megatron.parallel_state import resolve_group
from tpcore.parallel import collectives
from tpcore.parallel.group import TensorParallelGroup

Group: TypeAlias = TensorParallelGroup | dist.ProcessGroup | None


def copy_to_tensor_model_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """As it is forward, all-reduce backward."""
    return collectives.copy_to(input_, resolve_group(group))


def reduce_from_tensor_model_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """All-reduce forward, as it is backward."""
    return collectives.reduce_from(input_, resolve_group(group))


def scatter_to_tensor_model_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """Own part of the last dimension forward, all-gather backward."""
    return collectives.scatter_to(input_, resolve_group(group))


def gather_from_tensor_model_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """All-gather along the last dimension forward, own part backward."""
    return collectives.gather_from(input_, resolve_group(group))


def scatter_to_sequence_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """Own part of dim 0 forward, all-gather backward."""
    return collectives.scatter_to_sequence(input_, resolve_group(group))


def gather_from_sequence_parallel_region(
    input_: Tensor,
    tensor_parallel_output_grad: bool = True,
    group: Group = None,
    output_split_sizes: None = None,
    use_global_buffer: bool = False,
    **apex: Any,
) -> Tensor:
    """All-gather along dim 0 forward; backward reduce-scatter, or own part.

    Args:
        input_: [s/tp, ...].
        tensor_parallel_output_grad: what follows is tensor-parallel, so that the ranks' gradients
            are parts of a sum; False: they are the same on all ranks.
        group: None: the group of this process.
        output_split_sizes: None: ranks hold equal parts.
        use_global_buffer: without meaning.
        apex: ``to_model_parallel``, apex's name of ``tensor_parallel_output_grad``.
    """
    is_sum = apex.pop("to_model_parallel", tensor_parallel_output_grad)
    if apex:
        raise TypeError(f"gather_from_sequence_parallel_region has no argument {next(iter(apex))}")
    _refuse_sizes("output_split_sizes", output_split_sizes)
    tp = resolve_group(group)
    if is_sum:
        return collectives.gather_from_sequence(input_, tp)
    return collectives.gather_from(input_, tp, dim=0)


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor,
    group: Group = None,
    input_split_sizes: None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """Reduce-scatter along dim 0 forward, all-gather backward; to equal parts."""
    _refuse_sizes("input_split_sizes", input_split_sizes)
    return collectives.reduce_scatter_to_sequence(input_, resolve_group(group))


def all_gather_last_dim_from_tensor_parallel_region(input_: Tensor, group: Group = None) -> Tensor:
    """All-gather along the last dimension forward, reduce-scatter along it backward."""
    tp = resolve_group(group)
    return collectives.gather_from_sequence(input_.movedim(-1, 0), tp).movedim(0, -1)


def reduce_scatter_last_dim_to_tensor_parallel_region(
    input_: Tensor, group: Group = None
) -> Tensor:
    """Reduce-scatter along the last dimension forward, all-gather along it backward."""
    tp = resolve_group(group)
    return collectives.reduce_scatter_to_sequence(input_.movedim(-1, 0), tp).movedim(0, -1)


def _refuse_sizes(name: str, sizes: Any) -> None:
    if sizes is not None:
        raise ValueError(f"{name} is not None; the ranks of tpcore hold equal parts")
