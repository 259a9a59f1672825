"""Which tensor- and data-parallel groups this process is in, as one state of the process.

The functions of ``megatron.core.parallel_state`` and ``apex.transformer.parallel_state``. That the
groups are ambient is what these names mean; everywhere else in tpcore a layer is given its group.
There is one stage of pipeline and no context or expert parallelism: what asks for more is refused,
and the getters give the answers of a model that has one of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tpcore.parallel.group import (
    DataParallelGroup,
    ParallelGroup,
    TensorParallelGroup,
    init_parallel,
)


@dataclass
class _State:
    tensor: TensorParallelGroup
    data: DataParallelGroup
    alone: dist.ProcessGroup | None = None


_state: _State | None = None

# What a model with one pipeline stage and nothing but tensor and data parallelism says of each.
_ONE_OF_EACH = (
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "num_distributed_optimizer_instances",
)
_MUST_BE_NONE = (
    "virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_split_rank",
    "hierarchical_context_parallel_sizes",
)
# Say how something is done that tpcore does in its own way, or not at all.
_WITHOUT_MEANING = frozenset(
    {
        "create_gloo_process_groups",
        "default_backend",
        "expert_tensor_parallel_size",
        "get_embedding_ranks",
        "get_position_embedding_ranks",
        "high_priority_stream_groups",
        "init_mpi_proc_group",
        "nccl_communicator_config_path",
        "order",
        "p2p_backend",
        "pipeline_model_parallel_comm_backend",
        "sharp_enabled_group",
        "use_fp8",
        "use_sharp",
    }
)


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    pipeline_model_parallel_split_rank: int | None = None,
    *,
    distributed_timeout_minutes: float = 30,
    **others: Any,
) -> None:
    """Make the groups: consecutive ranks share a model, ranks at that distance share a shard of it.

    Uses torch.distributed if it is initialised; if not, initialises it as torchrun's environment
    says, or goes on as a single process. Every rank calls it.

    Args:
        tensor_model_parallel_size: ranks that share one copy of the model; divides the world size.
        pipeline_model_parallel_size: 1.
        virtual_pipeline_model_parallel_size: None.
        pipeline_model_parallel_split_rank: None.
        distributed_timeout_minutes: how long a collective waits for the other ranks.
        others: further arguments of Megatron-Core and apex, whose names may end in an underscore as
            apex writes them. Those that ask for pipeline, context or expert parallelism are
            refused.

    Raises:
        ValueError: something is asked for that tpcore does not have, the groups exist already, or
            the size does not divide the world size.
    """
    global _state
    wanted: dict[str, Any] = {
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual_pipeline_model_parallel_size,
        "pipeline_model_parallel_split_rank": pipeline_model_parallel_split_rank,
    }
    wanted.update({name.removesuffix("_"): value for name, value in others.items()})
    for name in _ONE_OF_EACH:
        if wanted.pop(name, 1) not in (1, None):
            raise ValueError(f"{name} is not 1; tpcore has tensor and data parallelism only")
    for name in _MUST_BE_NONE:
        if wanted.pop(name, None) is not None:
            raise ValueError(f"{name} is not None; tpcore has tensor and data parallelism only")
    size = wanted.pop("tensor_model_parallel_size")
    unknown = sorted(wanted.keys() - _WITHOUT_MEANING)
    if unknown:
        raise ValueError(f"initialize_model_parallel has no argument {unknown[0]!r}")
    if _state is not None:
        raise ValueError(
            "the model-parallel groups exist already; call destroy_model_parallel() first"
        )
    tensor, data = init_parallel(size, timeout_s=60 * distributed_timeout_minutes)
    _state = _State(tensor, data)


def destroy_model_parallel() -> None:
    """Close the groups that initialize_model_parallel made; layers built with them must not run."""
    global _state
    if _state is None:
        return
    for group in (_state.tensor.process_group, _state.data.process_group, _state.alone):
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
    _state = None


def model_parallel_is_initialized() -> bool:
    """Whether initialize_model_parallel has been called."""
    return _state is not None


def is_initialized() -> bool:
    """The same."""
    return _state is not None


def is_unitialized() -> bool:
    """The opposite, spelt as Megatron-LM spells it."""
    return _state is None


def tensor_parallel_group() -> TensorParallelGroup:
    """The tensor-parallel group as tpcore's own layers take it, ``tp=tensor_parallel_group()``."""
    return _groups().tensor


def data_parallel_group() -> DataParallelGroup:
    """The data-parallel group as tpcore's own functions take it."""
    return _groups().data


def resolve_group(group: TensorParallelGroup | dist.ProcessGroup | None) -> TensorParallelGroup:
    """What an argument ``group`` or ``tp_group`` means; None: the group of this process."""
    if group is None:
        return _groups().tensor
    if isinstance(group, TensorParallelGroup):
        return group
    return TensorParallelGroup.from_process_group(group)


def _groups() -> _State:
    if _state is None:
        raise ValueError(
            "there are no model-parallel groups yet; call "
            "initialize_model_parallel(tensor_model_parallel_size) first"
        )
    return _state


def _first_rank(group: ParallelGroup) -> int:
    return group.ranks[0]


# --- tensor parallelism


def get_tensor_model_parallel_group(check_initialized: bool = True) -> dist.ProcessGroup | None:
    """The process group; None without torch.distributed."""
    if not check_initialized and _state is None:
        return None
    return _groups().tensor.process_group


def get_tensor_model_parallel_world_size() -> int:
    """Ranks that share one copy of the model."""
    return _groups().tensor.size


def get_tensor_model_parallel_rank() -> int:
    """Place of this rank among them."""
    return _groups().tensor.rank


def get_tensor_model_parallel_src_rank() -> int:
    """Global rank of the first member of this tensor-parallel group."""
    return _first_rank(_groups().tensor)


# Tensor and pipeline parallelism together, which with one stage is tensor parallelism; Megatron-LM
# 1.0 had only these names.
get_model_parallel_group = get_tensor_model_parallel_group
get_model_parallel_world_size = get_tensor_model_parallel_world_size
get_model_parallel_rank = get_tensor_model_parallel_rank
get_model_parallel_src_rank = get_tensor_model_parallel_src_rank


# --- data parallelism


def get_data_parallel_group(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> dist.ProcessGroup | None:
    """The process group; None without torch.distributed."""
    return _groups().data.process_group


# gloo serves CPU tensors in that group, beside NCCL where there is CUDA.
get_data_parallel_group_gloo = get_data_parallel_group


def get_tensor_and_data_parallel_group(
    check_initialized: bool = True, with_context_parallel: bool = False
) -> dist.ProcessGroup | None:
    """All ranks; None without torch.distributed."""
    if check_initialized:
        _groups()
    return dist.group.WORLD if dist.is_initialized() else None


def get_data_parallel_world_size(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> int:
    """Copies of the model."""
    return _groups().data.size


def get_data_parallel_rank(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> int:
    """Which copy this rank has a share of."""
    return _groups().data.rank


def get_data_parallel_src_rank(with_context_parallel: bool = False) -> int:
    """Global rank of the first member of this data-parallel group."""
    return _first_rank(_groups().data)


# --- one pipeline stage, one context


def _own_group() -> dist.ProcessGroup | None:
    state = _groups()
    if state.alone is None and dist.is_initialized():
        # No other rank need take part.
        state.alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return state.alone


def _own_rank() -> int:
    _groups()
    return dist.get_rank() if dist.is_initialized() else 0


def get_pipeline_model_parallel_group(check_initialized: bool = True) -> dist.ProcessGroup | None:
    """A group of this rank alone."""
    return None if _state is None and not check_initialized else _own_group()


def get_context_parallel_group(check_initialized: bool = True) -> dist.ProcessGroup | None:
    """A group of this rank alone."""
    return None if _state is None and not check_initialized else _own_group()


def get_embedding_group(check_initialized: bool = True) -> dist.ProcessGroup | None:
    """The ranks that hold copies of the word embedding: this one alone."""
    return None if _state is None and not check_initialized else _own_group()


get_position_embedding_group = get_embedding_group


def get_pipeline_model_parallel_world_size() -> int:
    """1."""
    _groups()
    return 1


def get_pipeline_model_parallel_rank() -> int:
    """0."""
    _groups()
    return 0


def get_pipeline_model_parallel_first_rank() -> int:
    """Global rank of the first stage: this one."""
    return _own_rank()


def get_pipeline_model_parallel_last_rank() -> int:
    """Global rank of the last stage: this one."""
    return _own_rank()


def get_pipeline_model_parallel_next_rank() -> int:
    """Global rank of the next stage: this one."""
    return _own_rank()


def get_pipeline_model_parallel_prev_rank() -> int:
    """Global rank of the stage before: this one."""
    return _own_rank()


def is_pipeline_first_stage(ignore_virtual: bool = False, vp_stage: int | None = None) -> bool:
    """True."""
    _groups()
    return True


def is_pipeline_last_stage(ignore_virtual: bool = False, vp_stage: int | None = None) -> bool:
    """True."""
    _groups()
    return True


def is_rank_in_embedding_group(ignore_virtual: bool = False, vp_stage: int | None = None) -> bool:
    """True."""
    _groups()
    return True


is_rank_in_position_embedding_group = is_rank_in_embedding_group


def get_rank_info() -> tuple[int, int, int, int]:
    """Data-, tensor-, pipeline- and virtual-pipeline-parallel rank, for a logger; zeros before."""
    if _state is None:
        return 0, 0, 0, 0
    return get_data_parallel_rank(), get_tensor_model_parallel_rank(), 0, 0


def get_pipeline_model_parallel_split_rank() -> None:
    """None."""
    return None


def get_virtual_pipeline_model_parallel_rank() -> None:
    """None."""
    return None


def get_virtual_pipeline_model_parallel_world_size() -> None:
    """None."""
    return None


def get_context_parallel_world_size() -> int:
    """1."""
    _groups()
    return 1


def get_context_parallel_rank() -> int:
    """0."""
    _groups()
    return 0


def get_expert_model_parallel_world_size() -> int:
    """1."""
    _groups()
    return 1


def get_expert_model_parallel_rank() -> int:
    """0."""
    _groups()
    return 0
