"""Collectives with and without autograd, one code path for gloo and NCCL.

The autograd collectives are linear maps, and the backward of each is its adjoint. f and g are the
conjugate operators of arXiv 1909.08053; under sequence parallelism (arXiv 2205.05198) the
all-gather takes the place of f and the reduce-scatter that of g.

    name                           forward                 backward                before -> after
    copy_to                     f  identity                all-reduce              one -> copies
    reduce_from                 g  all-reduce              identity                parts -> one
    scatter_to                     own slice of dim        all-gather dim          one -> shards
    gather_from                    all-gather dim          own slice of dim        shards -> one
    gather_from_sequence        f  all-gather dim 0        reduce-scatter dim 0    shards -> copies
    reduce_scatter_to_sequence  g  reduce-scatter dim 0    all-gather dim 0        parts -> shards
    scatter_to_sequence            own slice of dim 0      all-gather dim 0        one -> shards
    copy_all_to                    copy_to of several tensors, whose gradients share one all-reduce

"one" is a value that every rank holds and every rank uses in the same way (its gradient is the same
on all of them); "copies" are used by each rank differently (their gradients are parts of a sum);
"parts" are the terms of a sum; "shards" are slices. At size 1 every function returns its input. No
function modifies its input, unless its name ends in ``in_place``. Inputs may be non-contiguous.

CPU tensors of ranks on one host travel through shared memory (tpcore.parallel.shared_memory), all
others through the functional collectives of torch: gloo or NCCL, eager or compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.autograd.function import once_differentiable

from tpcore.parallel import shared_memory
from tpcore.parallel.agreement import check_same_call
from tpcore.parallel.group import ParallelGroup, TensorParallelGroup, divide

ReduceOp = Literal["sum", "max"]


def all_reduce(x: Tensor, group: ParallelGroup, op: ReduceOp = "sum") -> Tensor:
    """Sum or maximum over the ranks, element by element. Not differentiable.

    Returns a new tensor (x itself at size 1).
    """
    return x if group.size == 1 else _transport(x, group, reduces=True).all_reduce(x, op)


def start_all_reduce(x: Tensor, group: ParallelGroup, op: ReduceOp = "sum") -> Tensor:
    """Begin an all-reduce over two or more ranks and return at once; ``wait`` gives the result.

    x must not be modified in between.
    """
    return _transport(x, group, reduces=True).start_all_reduce(x, op)


def start_all_gather(x: Tensor, group: ParallelGroup) -> Tensor:
    """Begin an all-gather along dim 0, as ``start_all_reduce`` begins an all-reduce."""
    return _transport(x, group).start_all_gather(x)


def start_reduce_scatter(x: Tensor, group: ParallelGroup) -> Tensor:
    """Begin a reduce-scatter along dim 0, as ``start_all_reduce`` begins an all-reduce.

    Raises:
        ValueError: the first dimension is not a multiple of the group's size.
    """
    divide(x.shape[0], group.size, "the size of dim 0")
    return _transport(x, group, reduces=True).start_reduce_scatter(x)


def wait(started: Tensor) -> Tensor:
    """The finished result of a ``start_...`` function; call it before the result is used."""
    if not torch.compiler.is_compiling() and shared_memory.finish(started):
        return started
    return torch.ops._c10d_functional.wait_tensor(started)


def all_reduce_in_place(x: Tensor, group: ParallelGroup, op: ReduceOp = "sum") -> Tensor:
    """As all_reduce, but overwrites x (gradient buffers); returns x. x must be contiguous."""
    if group.size > 1:
        _transport(x, group, reduces=True).all_reduce_in_place(x, op)
    return x


def all_gather(x: Tensor, group: ParallelGroup, dim: int = 0) -> Tensor:
    """Concatenate the tensors of all ranks along dim, in rank order. Not differentiable.

    Their shapes must be equal. Returns x itself at size 1.

    Raises:
        ValueError: x has no dimension ``dim``.
    """
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"x has shape {list(x.shape)}, which has no dimension dim={dim}")
    if group.size == 1:
        return x
    gathered = _transport(x, group).all_gather(x)
    return gathered if dim % x.ndim == 0 else torch.cat(gathered.chunk(group.size), dim)


def reduce_scatter(x: Tensor, group: ParallelGroup) -> Tensor:
    """Sum over the ranks and keep the own slice of dim 0: [r * size, ...] -> [r, ...].

    Not differentiable. Returns x itself at size 1.

    Raises:
        ValueError: the first dimension is not a multiple of the group's size.
    """
    if group.size == 1:
        return x
    divide(x.shape[0], group.size, "the size of dim 0")
    return _transport(x, group, reduces=True).reduce_scatter(x)


def broadcast(x: Tensor, group: ParallelGroup, source: int = 0) -> Tensor:
    """The tensor of the rank ``source`` (counted inside the group) on every rank.

    Returns a new tensor of x's shape and dtype (x itself at size 1).
    """
    return x if group.size == 1 else _transport(x, group).broadcast(x, source)


def barrier(group: ParallelGroup) -> None:
    """Wait until every rank of the group has come here."""
    if group.size > 1:
        dist.barrier(group.process_group)


def copy_to(x: Tensor, tp: TensorParallelGroup) -> Tensor:
    """Identity forward, all-reduce backward: every rank goes on with its own shard of a weight."""
    return x if tp.size == 1 else _CopyTo.apply(x, tp)


def copy_all_to(tensors: Sequence[Tensor | None], tp: TensorParallelGroup) -> list[Tensor | None]:
    """copy_to for several tensors at once; None, and what needs no gradient, stays as it is.

    For replicated parameters that see only this rank's share of the tokens: their gradients are
    parts of a sum, which one all-reduce takes for all of them.
    """
    trained = [x for x in tensors if x is not None and x.requires_grad]
    if tp.size == 1 or not trained:
        return list(tensors)
    if torch.compiler.is_compiling():  # it does not trace a Function of so many tensors
        copies = iter([copy_to(x, tp) for x in trained])
    else:
        copies = iter(_CopyAllTo.apply(tp, *trained))
    return [x if x is None or not x.requires_grad else next(copies) for x in tensors]


def reduce_from(x: Tensor, tp: TensorParallelGroup) -> Tensor:
    """All-reduce forward, identity backward: sums what the ranks computed with their shards."""
    return x if tp.size == 1 else _ReduceFrom.apply(x, tp)


def scatter_to(x: Tensor, tp: TensorParallelGroup, dim: int = -1) -> Tensor:
    """Own slice of dim forward, all-gather backward.

    Raises:
        ValueError: the group's size does not divide the size of ``dim``.
    """
    return x if tp.size == 1 else _ScatterTo.apply(x, tp, dim)


def gather_from(x: Tensor, tp: TensorParallelGroup, dim: int = -1) -> Tensor:
    """All-gather along dim forward, own slice backward."""
    return x if tp.size == 1 else _GatherFrom.apply(x, tp, dim)


def gather_from_sequence(x: Tensor, tp: TensorParallelGroup) -> Tensor:
    """All-gather along dim 0 forward, reduce-scatter backward.

    [t/tp, h] -> [t, h], before a column-parallel layer.
    """
    return x if tp.size == 1 else _GatherFromSequence.apply(x, tp)


def reduce_scatter_to_sequence(x: Tensor, tp: TensorParallelGroup) -> Tensor:
    """Reduce-scatter along dim 0 forward, all-gather backward.

    [t, h] -> [t/tp, h], after a row-parallel layer.

    Raises:
        ValueError: the group's size does not divide the number of tokens t.
    """
    return x if tp.size == 1 else _ReduceScatterToSequence.apply(x, tp)


def scatter_to_sequence(x: Tensor, tp: TensorParallelGroup) -> Tensor:
    """Own slice of dim 0 forward, all-gather backward.

    [t, h] -> [t/tp, h], where a sequence-parallel region begins.
    """
    return scatter_to(x, tp, dim=0)


def own_slice(x: Tensor, tp: TensorParallelGroup, dim: int) -> Tensor:
    """The slice of ``dim`` that belongs to this rank, as a view."""
    length = divide(x.shape[dim], tp.size, f"the size of dim {dim}")
    return x.narrow(dim, tp.rank * length, length)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad_output, ctx.tp), None


class _CopyAllTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tp: TensorParallelGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.tp = tp
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined = all_reduce(torch.cat([grad.reshape(-1) for grad in grads]), ctx.tp)
        pieces = joined.split([grad.numel() for grad in grads])
        return None, *(p.view(g.shape).to(g.dtype) for p, g in zip(pieces, grads, strict=True))


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup) -> Tensor:
        return all_reduce(x, tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup, dim: int) -> Tensor:
        ctx.tp, ctx.dim = tp, dim
        return own_slice(x, tp, dim).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad_output, ctx.tp, ctx.dim), None, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup, dim: int) -> Tensor:
        ctx.tp, ctx.dim = tp, dim
        return all_gather(x, tp, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return own_slice(grad_output, ctx.tp, ctx.dim).contiguous(), None, None


class _GatherFromSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup) -> Tensor:
        ctx.tp = tp
        return all_gather(x, tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad_output, ctx.tp), None


class _ReduceScatterToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup) -> Tensor:
        ctx.tp = tp
        return reduce_scatter(x, tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad_output, ctx.tp), None


# --- The ways a tensor can take: shared_memory.Channel and the two below, with the same methods.


def _transport(x: Tensor, group: ParallelGroup, *, reduces: bool = False) -> Any:
    # A small message takes microseconds, of which every look-up here is a part.
    if x.is_cpu and (not reduces or x.dtype in shared_memory.REDUCED_DTYPES):
        if torch.compiler.is_compiling():
            # One rank that says no is enough, so this one need not ask the others.
            return _Functional(group) if group.shared_memory is False else _Traced(group)
        channel = shared_memory.channel_of(group)
        if channel is not None:
            return channel
    if torch.compiler.is_compiling():
        return _Functional(group)
    if x.is_cuda:
        return _Staged(group) if _is_gloo(group) else _Functional(group)
    return _Gloo(group) if x.is_cpu else _Functional(group)


def _is_gloo(group: ParallelGroup) -> bool:
    """Whether gloo is in charge of CUDA tensors: ranks share a GPU, which NCCL refuses."""
    assert group.process_group is not None
    return group.process_group._get_backend(torch.device("cuda")).name() == "gloo"


class _Functional:
    """The functional collectives of torch."""

    def __init__(self, group: ParallelGroup) -> None:
        assert group.process_group is not None
        self._name, self._size = group.process_group.group_name, group.size

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        return wait(self.start_all_reduce(x, op))

    def start_all_reduce(self, x: Tensor, op: str) -> Tensor:
        return torch.ops._c10d_functional.all_reduce(x.contiguous(), op, self._name)

    def all_reduce_in_place(self, x: Tensor, op: str) -> None:
        wait(torch.ops._c10d_functional.all_reduce_(x, op, self._name))

    def all_gather(self, x: Tensor) -> Tensor:
        return wait(self.start_all_gather(x))

    def start_all_gather(self, x: Tensor) -> Tensor:
        op = torch.ops._c10d_functional.all_gather_into_tensor
        return op(x.contiguous(), self._size, self._name)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return wait(self.start_reduce_scatter(x))

    def start_reduce_scatter(self, x: Tensor) -> Tensor:
        op = torch.ops._c10d_functional.reduce_scatter_tensor
        return op(x.contiguous(), "sum", self._size, self._name)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return wait(torch.ops._c10d_functional.broadcast(x.contiguous(), source, self._name))


class _Gloo(_Functional):
    """The same for CPU tensors, outside a graph: wrong calls that block anyway are noticed.

    What is started and waited for later is not checked: the check waits for the slowest rank.
    """

    def __init__(self, group: ParallelGroup) -> None:
        super().__init__(group)
        self._group = group

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        check_same_call(self._group, op, x)
        return super().all_reduce(x, op)

    def all_reduce_in_place(self, x: Tensor, op: str) -> None:
        check_same_call(self._group, op, x)
        super().all_reduce_in_place(x, op)

    def all_gather(self, x: Tensor) -> Tensor:
        check_same_call(self._group, "all_gather", x)
        return super().all_gather(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        check_same_call(self._group, "reduce_scatter", x)
        return super().reduce_scatter(x)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        check_same_call(self._group, "broadcast", x, source)
        return super().broadcast(x, source)


class _Staged:
    """CUDA tensors by way of host memory: gloo itself knows only some collectives of them."""

    def __init__(self, group: ParallelGroup) -> None:
        self._group = group

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        host = x.cpu()
        return _transport(host, self._group, reduces=True).all_reduce(host, op).to(x.device)

    def all_reduce_in_place(self, x: Tensor, op: str) -> None:
        x.copy_(self.all_reduce(x, op))

    def all_gather(self, x: Tensor) -> Tensor:
        host = x.cpu()
        return _transport(host, self._group).all_gather(host).to(x.device)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        host = x.cpu()
        return _transport(host, self._group, reduces=True).reduce_scatter(host).to(x.device)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        host = x.cpu()
        return _transport(host, self._group).broadcast(host, source).to(x.device)

    # Done when they return: `wait` finds nothing to wait for.
    start_all_reduce, start_all_gather = all_reduce, all_gather
    start_reduce_scatter = reduce_scatter


class _Traced:
    """What torch.compile sees of a collective on a CPU tensor: one op.

    Attaching to shared memory is nothing to trace, and a graph must not hold what was decided for
    one process group; so the op does, when it runs, what the eager call would have done.
    """

    def __init__(self, group: ParallelGroup) -> None:
        assert group.process_group is not None
        self._group = group.process_group.group_name, group.size, group.shared_memory

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        return torch.ops.tpcore.collective(x, "all_reduce", op, 0, *self._group)

    def start_all_reduce(self, x: Tensor, op: str) -> Tensor:
        return self.all_reduce(x, op)

    def all_reduce_in_place(self, x: Tensor, op: str) -> None:
        x.copy_(self.all_reduce(x, op))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.ops.tpcore.collective(x, "all_gather", "", 0, *self._group)

    def start_all_gather(self, x: Tensor) -> Tensor:
        return self.all_gather(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return torch.ops.tpcore.collective(x, "reduce_scatter", "", 0, *self._group)

    def start_reduce_scatter(self, x: Tensor) -> Tensor:
        return self.reduce_scatter(x)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return torch.ops.tpcore.collective(x, "broadcast", "", source, *self._group)


@torch.library.custom_op("tpcore::collective", mutates_args=())
def _collective(
    x: Tensor,
    name: str,
    op: str,
    source: int,
    group_name: str,
    size: int,
    shared_memory: bool | None,
) -> Tensor:
    process_group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    group = ParallelGroup.from_process_group(process_group, shared_memory=shared_memory)
    function, *arguments = {
        "all_reduce": (all_reduce, op),
        "all_gather": (all_gather,),
        "reduce_scatter": (reduce_scatter,),
        "broadcast": (broadcast, source),
    }[name]
    return function(x, group, *arguments)  # type: ignore[operator]


@_collective.register_fake
def _(x: Tensor, name: str, op: str, source: int, group_name: str, size: int, *_: Any) -> Tensor:
    length = {"all_gather": x.shape[0] * size, "reduce_scatter": x.shape[0] // size}
    return x.new_empty((length[name], *x.shape[1:]) if name in length else x.shape)
