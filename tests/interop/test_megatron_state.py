"""Groups, ranks and getters; what is refused; cycles."""

import gc
import os
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_mesh
from tests.interop.ranks import run_megatron
from tpcore.interop.megatron import parallel_state
from tpcore.parallel import collectives


def _check_getters(tp):
    size, rank = tp.size, dist.get_rank()
    first = rank - rank % size
    assert parallel_state.model_parallel_is_initialized()
    assert parallel_state.is_initialized()
    assert not parallel_state.is_unitialized()
    assert parallel_state.get_tensor_model_parallel_world_size() == size
    assert parallel_state.get_tensor_model_parallel_rank() == rank % size
    assert parallel_state.get_tensor_model_parallel_src_rank() == first
    assert parallel_state.get_data_parallel_world_size() == 4 // size
    assert parallel_state.get_data_parallel_rank() == rank // size
    assert parallel_state.get_data_parallel_src_rank() == rank % size
    members = dist.get_process_group_ranks
    tensor = parallel_state.get_tensor_model_parallel_group()
    assert members(tensor) == list(range(first, first + size))
    assert members(parallel_state.get_model_parallel_group()) == members(tensor)
    data = parallel_state.get_data_parallel_group()
    assert members(data) == list(range(rank % size, 4, size))
    summed = torch.tensor([1.0 + rank])
    dist.all_reduce(summed, group=data)
    assert summed.item() == sum(1.0 + r for r in members(data))


def _check_one_stage(tp):
    rank, members = dist.get_rank(), dist.get_process_group_ranks
    assert parallel_state.get_pipeline_model_parallel_world_size() == 1
    assert parallel_state.get_pipeline_model_parallel_rank() == 0
    assert parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    assert parallel_state.is_pipeline_last_stage()
    assert parallel_state.get_pipeline_model_parallel_next_rank() == rank
    assert parallel_state.get_virtual_pipeline_model_parallel_rank() is None
    assert parallel_state.get_context_parallel_world_size() == 1
    assert members(parallel_state.get_tensor_and_data_parallel_group()) == [0, 1, 2, 3]
    data = parallel_state.get_data_parallel_group()
    assert parallel_state.get_data_parallel_group_gloo() is data
    assert parallel_state.get_rank_info() == (rank // 2, rank % 2, 0, 0)
    assert parallel_state.is_rank_in_position_embedding_group()
    if rank == 1:  # a group of one rank needs no other
        group = parallel_state.get_pipeline_model_parallel_group()
        assert members(group) == [1]
        assert parallel_state.get_embedding_group() is group
        assert parallel_state.get_position_embedding_group() is group
        assert parallel_state.get_context_parallel_group() is group


@pytest.mark.parametrize("size", [1, 2, 4])
def test_getters(size):
    run_megatron(_check_getters, size)


def test_there_is_one_pipeline_stage():
    run_megatron(_check_one_stage, 2)


def _check_spelling(tp, dp):
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size_=2, pipeline_model_parallel_size_=1, default_backend="nccl"
    )
    assert parallel_state.get_tensor_model_parallel_world_size() == 2
    with pytest.raises(ValueError, match="groups exist already"):
        parallel_state.initialize_model_parallel(2)
    parallel_state.destroy_model_parallel()
    assert not parallel_state.model_parallel_is_initialized()
    assert parallel_state.get_rank_info() == (0, 0, 0, 0)
    assert parallel_state.get_embedding_group(check_initialized=False) is None
    parallel_state.initialize_model_parallel(2, 1, None, None)
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_model_parallel()
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide the world size"):
        parallel_state.initialize_model_parallel(3)
    assert parallel_state.is_unitialized()


def test_arguments_as_apex_spells_them():
    run_mesh(_check_spelling, 2, 2)


def _open_things():
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = sum("/dev/shm/#" in line for line in maps)
    groups = len(dist.distributed_c10d._world.pg_names)
    return len(os.listdir("/proc/self/fd")), mapped, groups, threading.active_count()


def _check_cycles(tp, dp, cycles):
    counts = []
    for cycle in range(cycles):
        parallel_state.initialize_model_parallel(2)
        for group in (parallel_state.tensor_parallel_group(), parallel_state.data_parallel_group()):
            assert collectives.all_reduce(torch.ones(1), group).item() == 2
        del group
        parallel_state.destroy_model_parallel()
        if cycle in (2, cycles - 1):
            dist.barrier()
            counts.append(_open_things())
    assert counts[0] == counts[1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux shows of a process")
@pytest.mark.parametrize("cycles", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_starting_and_stopping_leaks_nothing(cycles):
    run_mesh(_check_cycles, 2, 2, cycles)


def test_one_process_needs_no_torch_distributed():
    parallel_state.initialize_model_parallel()
    try:
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert parallel_state.get_tensor_model_parallel_group() is None
        assert parallel_state.get_data_parallel_rank() == 0
        assert parallel_state.get_pipeline_model_parallel_last_rank() == 0
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size is not 1"),
        ({"pipeline_model_parallel_size_": 2}, "pipeline_model_parallel_size is not 1"),
        ({"context_parallel_size": 2}, "context_parallel_size is not 1; tpcore has tensor and"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size is"),
        ({"tensor_parallel": 2}, "has no argument 'tensor_parallel'"),
        ({"tensor_model_parallel_size": 2}, "torchrun --nproc-per-node 2"),
    ],
)
def test_what_is_not_there_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        parallel_state.initialize_model_parallel(**arguments)
    assert not parallel_state.model_parallel_is_initialized()


@pytest.mark.parametrize(
    "getter", ["get_tensor_model_parallel_rank", "get_data_parallel_group", "_own_rank"]
)
def test_getters_say_what_to_call_first(getter):
    with pytest.raises(ValueError, match=r"call initialize_model_parallel\(tensor_model"):
        getattr(parallel_state, getter)()
    assert parallel_state.get_tensor_model_parallel_group(check_initialized=False) is None
