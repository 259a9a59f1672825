"""Process groups as plain values: who takes part, and which rank this process has.

Every parallel layer takes its ``TensorParallelGroup`` as an argument; there is no module-level
"current group". With ``TensorParallelGroup.single()`` the same code runs in one process and no
collective is ever called.

    world of 8 ranks, init_parallel(tensor_parallel_size=4):

        tensor-parallel groups (rows, consecutive ranks)     0 1 2 3
                                                             4 5 6 7
        data-parallel groups (columns, stride 4)             {0,4} {1,5} {2,6} {3,7}
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from tpcore.parallel.meeting import store_of_this_round

GroupT = TypeVar("GroupT", bound="ParallelGroup")

# No error suggests a larger size: nobody splits a vocabulary of 30522 over 5087 ranks.
_LARGEST_SUGGESTED_SIZE = 64

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class ParallelGroup:
    """A process group seen from one of its ranks; base of the two groups below.

    Attributes:
        process_group: the communicator, or None for a group of this process alone.
        rank: rank of this process inside the group, 0 <= rank < size.
        size: number of ranks in the group.
        shared_memory: whether collectives on CPU tensors use shared memory; None: where possible.
            What counts is the first collective over the process group.

    A group is immutable and stands for a communicator that cannot be duplicated, so ``copy`` and
    ``deepcopy`` return the object itself. Pickle stores the global ranks of the members; unpickling
    looks up the communicator of the same ranks in the process that loads, and raises ValueError
    where there is none.
    """

    process_group: dist.ProcessGroup | None = field(repr=False)
    rank: int
    size: int
    shared_memory: bool | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"rank={self.rank} is not a rank of a group of size={self.size}; expected 0 to "
                f"{self.size - 1}"
            )
        if self.process_group is None and self.size > 1:
            raise ValueError(
                f"process_group=None cannot connect size={self.size} ranks; pass the process "
                f"group, or use {type(self).__name__}.single() for one process"
            )

    @classmethod
    def single(cls: type[GroupT]) -> GroupT:
        """The group of this process alone: every collective over it does nothing."""
        return cls(process_group=None, rank=0, size=1)

    @classmethod
    def from_process_group(
        cls: type[GroupT], process_group: dist.ProcessGroup, *, shared_memory: bool | None = None
    ) -> GroupT:
        """Wrap a process group made elsewhere, such as DeviceMesh.get_group() or dist.new_group().

        Raises:
            ValueError: this process is not a member of ``process_group``.
        """
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ValueError(
                f"process_group does not contain this process (global rank {dist.get_rank()}); "
                "pass the group that this rank belongs to"
            )
        return cls(process_group, rank, dist.get_world_size(process_group), shared_memory)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks of the members, in group order; (0,) for ``single()``."""
        if self.process_group is None:
            return (0,)
        return tuple(dist.get_process_group_ranks(self.process_group))

    def __copy__(self: GroupT) -> GroupT:
        return self

    def __deepcopy__(self: GroupT, memo: dict[int, Any]) -> GroupT:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        name = None if self.process_group is None else self.process_group.group_name
        return _unpickle_group, (type(self), self.ranks, name, self.shared_memory)


@dataclass(frozen=True)
class TensorParallelGroup(ParallelGroup):
    """The ranks that share one copy of the model.

    Each holds a shard of the weights and sees the same tokens.
    """


@dataclass(frozen=True)
class DataParallelGroup(ParallelGroup):
    """The ranks that hold the same shard of the model.

    Each sees other tokens; gradients are averaged over the group:

        DistributedDataParallel(model, process_group=dp.process_group)
        fully_shard(model, mesh=dp.device_mesh("cuda"))             torch.distributed.fsdp
    """

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The group as a one-dimensional mesh named "data_parallel", as FSDP2 wants it.

        Raises:
            ValueError: this process runs alone, without torch.distributed.
        """
        if self.process_group is None:
            raise ValueError(
                "a group of this process alone has no device mesh; start the program with torchrun "
                "(one process is enough) and take the group from init_parallel"
            )
        return DeviceMesh.from_group(
            self.process_group, device_type, mesh_dim_names=("data_parallel",)
        )


def _unpickle_group(
    cls: type[GroupT],
    ranks: tuple[int, ...],
    name: str | None,
    shared_memory: bool | None = None,
) -> GroupT:
    # Several groups may have the same members (the world, and a tensor-parallel group as large as
    # it); the name tells them apart when both processes made their groups in the same order.
    if name is None:
        return cls.single()
    known = dist.distributed_c10d._world.pg_names if dist.is_initialized() else {}
    candidates = [pg for pg in known if tuple(dist.get_process_group_ranks(pg)) == tuple(ranks)]
    if candidates:
        named = [pg for pg in candidates if pg.group_name == name]
        return cls.from_process_group((named or candidates)[0], shared_memory=shared_memory)
    if len(ranks) == 1:
        return cls.single()
    raise ValueError(
        f"this {cls.__name__} was pickled in a group of the global ranks {list(ranks)}, and this "
        f"process is in no such group; start {len(ranks)} or more processes with torchrun and call "
        f"init_parallel(tensor_parallel_size={len(ranks)}) before unpickling"
    )


def divide(value: int, size: int, name: str) -> int:
    """The quotient value / size, for a dimension that is split over a tensor-parallel group.

    Raises:
        ValueError: ``size`` does not divide ``value``; the message lists the sizes that do.
    """
    if value % size:
        raise ValueError(
            f"{name}={value} cannot be split over a tensor-parallel size of {size}; use "
            f"{_divisors_in_words(value)}"
        )
    return value // size


def _divisors_in_words(value: int) -> str:
    divisors = [str(n) for n in range(1, min(value, _LARGEST_SUGGESTED_SIZE) + 1) if value % n == 0]
    return divisors[0] if len(divisors) == 1 else f"{', '.join(divisors[:-1])} or {divisors[-1]}"


def init_parallel(
    tensor_parallel_size: int = 1,
    *,
    backend: str | None = None,
    timeout_s: float = 600,
    shared_memory: bool | None = None,
) -> tuple[TensorParallelGroup, DataParallelGroup]:
    """Make the tensor-parallel and the data-parallel group of this process.

    Under torchrun the environment says how many ranks there are; without it this is a single
    process, and both groups are ``single()``. If torch.distributed is already initialised, its
    world is used as it is. Consecutive ranks form a tensor-parallel group (as in Megatron-LM), so
    that it lies inside one node whenever the size allows it.

    Args:
        tensor_parallel_size: ranks that share one copy of the model; must divide the world size.
        backend: torch.distributed backend; None takes NCCL for CUDA tensors (and gloo for CPU
            tensors beside it) where CUDA is present, else gloo.
        timeout_s: how long a collective waits for the other ranks before it raises.
        shared_memory: whether collectives on CPU tensors go through shared memory instead of gloo.
            None: as the environment variable TPCORE_SHARED_MEMORY says (1, 0 or auto), and by
            default wherever all ranks of a group run on one host.

    Raises:
        ValueError: the size does not divide the world size, torchrun's environment is incomplete,
            or there are more ranks on this node than CUDA devices (NCCL cannot share one).
    """
    if tensor_parallel_size < 1:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} is not a group size; expected 1 or more"
        )
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ:
            if tensor_parallel_size > 1:
                raise ValueError(
                    f"tensor_parallel_size={tensor_parallel_size} needs {tensor_parallel_size} "
                    "processes, and this is a single process; start it with `torchrun "
                    f"--nproc-per-node {tensor_parallel_size} ...`"
                )
            return TensorParallelGroup.single(), DataParallelGroup.single()
        # Checked before any connection is opened, so that a wrong size ends in one line instead of
        # a hang.
        _check_divides_world(tensor_parallel_size, _torchrun_environment()["WORLD_SIZE"])
        _init_world(backend, timeout_s)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    _check_divides_world(tensor_parallel_size, world_size)

    def own_group(groups: list[list[int]], description: str) -> dist.ProcessGroup:
        # Every rank makes every group, in the same order: torch.distributed asks for it. A group of
        # one rank gets a communicator too: DistributedDataParallel takes None for the world.
        own: dist.ProcessGroup | None = None
        for ranks in groups:
            process_group = dist.new_group(
                ranks, timeout=timedelta(seconds=timeout_s), group_desc=description
            )
            own = process_group if rank in ranks else own
        assert own is not None
        return own

    size = tensor_parallel_size
    rows = [list(range(start, start + size)) for start in range(0, world_size, size)]
    columns = [list(range(start, world_size, size)) for start in range(size)]
    row, column = own_group(rows, "tensor_parallel"), own_group(columns, "data_parallel")
    for process_group in (row, column):
        _wait_until_connected(process_group)
    return (
        TensorParallelGroup.from_process_group(row, shared_memory=shared_memory),
        DataParallelGroup.from_process_group(column, shared_memory=shared_memory),
    )


def _wait_until_connected(process_group: dist.ProcessGroup) -> None:
    # gloo connects the ranks of a group one by one: who destroyed it before all of them were
    # connected would break it for the rest. NCCL connects at the first collective.
    if torch.device("cpu") in process_group._device_types:
        dist.all_reduce(torch.zeros(1, device="cpu"), group=process_group)


def destroy_parallel() -> None:
    """Close every communicator of this process, if there is any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _check_divides_world(tensor_parallel_size: int, world_size: int) -> None:
    if world_size % tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} does not divide the world size of "
            f"{world_size}; use {_divisors_in_words(world_size)}"
        )


def _torchrun_environment() -> dict[str, int]:
    missing = [name for name in _TORCHRUN_VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is set but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "not; start the program with torchrun, which sets all of them, or unset WORLD_SIZE to "
            "run a single process"
        )
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        try:
            values[name] = int(os.environ[name])
        except ValueError:
            raise ValueError(
                f"the environment variable {name}={os.environ[name]!r} is not an integer"
            ) from None
    return values


def _init_world(backend: str | None, timeout_s: float) -> None:
    environment = _torchrun_environment()
    local_rank = environment["LOCAL_RANK"]
    device_id: torch.device | None = None
    if torch.cuda.is_available():
        num_devices = torch.cuda.device_count()
        if backend is None or "nccl" in backend:
            if local_rank >= num_devices:
                raise ValueError(
                    f"LOCAL_RANK={local_rank} has no CUDA device of its own ({num_devices} "
                    "visible) and NCCL cannot share "
                    f"one; start at most {num_devices} processes on this node, or pass "
                    'backend="gloo"'
                )
            device_id = torch.device("cuda", local_rank)
        torch.cuda.set_device(local_rank % num_devices)
        # Layers may live on the CPU of a machine that has a GPU, so the same groups must serve CPU
        # tensors.
        backend = backend or "cpu:gloo,cuda:nccl"
    rank, world_size = environment["RANK"], environment["WORLD_SIZE"]
    store: Store | None = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agent_store, _, _ = next(
            rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout_s))
        )
        store = store_of_this_round(agent_store, rank, world_size, timeout_s)
    dist.init_process_group(
        backend or "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device_id,
    )
