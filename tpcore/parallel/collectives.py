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

"one" is a value that every rank holds and every rank uses in the same way (its gradient is the same
on all of them); "copies" are used by each rank differently (their gradients are parts of a sum);
"parts" are the terms of a sum; "shards" are slices. At size 1 every function returns its input. No
function modifies its input, unless its name ends in ``in_place``. Inputs may be non-contiguous.

They call the functional collectives of torch (torch.ops._c10d_functional), which work eager and
under torch.compile.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tpcore.parallel.group import ParallelGroup, TensorParallelGroup, divide

ReduceOp = Literal["sum", "max"]


def all_reduce(x: Tensor, group: ParallelGroup, op: ReduceOp = "sum") -> Tensor:
    """Sum or maximum over the ranks, element by element. Not differentiable.

    Returns a new tensor (x itself at size 1).
    """
    return x if group.size == 1 else wait(start_all_reduce(x, group, op))


def start_all_reduce(x: Tensor, group: ParallelGroup, op: ReduceOp = "sum") -> Tensor:
    """Begin an all-reduce over two or more ranks and return at once; ``wait`` gives the result."""
    return torch.ops._c10d_functional.all_reduce(x.contiguous(), op, _name(group))


def wait(started: Tensor) -> Tensor:
    """The finished result of ``start_all_reduce``; must be called before the result is used."""
    return torch.ops._c10d_functional.wait_tensor(started)


def all_reduce_in_place(x: Tensor, group: ParallelGroup, op: ReduceOp = "sum") -> Tensor:
    """As all_reduce, but overwrites x (gradient buffers); returns x. x must be contiguous."""
    if group.size > 1:
        wait(torch.ops._c10d_functional.all_reduce_(x, op, _name(group)))
    return x


def all_gather(x: Tensor, group: ParallelGroup, dim: int = 0) -> Tensor:
    """Concatenate the tensors of all ranks along dim, in rank order. Not differentiable.

    Their shapes must be equal. Returns x itself at size 1.
    """
    if group.size == 1:
        return x
    gathered = wait(
        torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), group.size, _name(group))
    )
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
    return wait(
        torch.ops._c10d_functional.reduce_scatter_tensor(
            x.contiguous(), "sum", group.size, _name(group)
        )
    )


def broadcast(x: Tensor, group: ParallelGroup, source: int = 0) -> Tensor:
    """The tensor of the rank ``source`` (counted inside the group) on every rank.

    Returns a new tensor of x's shape and dtype (x itself at size 1).
    """
    if group.size == 1:
        return x
    return wait(torch.ops._c10d_functional.broadcast(x.contiguous(), source, _name(group)))


def barrier(group: ParallelGroup) -> None:
    """Wait until every rank of the group has come here."""
    if group.size > 1:
        dist.barrier(group.process_group)


def copy_to(x: Tensor, tp: TensorParallelGroup) -> Tensor:
    """Identity forward, all-reduce backward: every rank goes on with its own shard of a weight."""
    return x if tp.size == 1 else _CopyTo.apply(x, tp)


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


def _name(group: ParallelGroup) -> str:
    assert group.process_group is not None
    return group.process_group.group_name


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
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad_output, ctx.tp), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup) -> Tensor:
        return all_reduce(x, tp)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup, dim: int) -> Tensor:
        ctx.tp, ctx.dim = tp, dim
        return own_slice(x, tp, dim).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad_output, ctx.tp, ctx.dim), None, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup, dim: int) -> Tensor:
        ctx.tp, ctx.dim = tp, dim
        return all_gather(x, tp, dim)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return own_slice(grad_output, ctx.tp, ctx.dim).contiguous(), None, None


class _GatherFromSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup) -> Tensor:
        ctx.tp = tp
        return all_gather(x, tp)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad_output, ctx.tp), None


class _ReduceScatterToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallelGroup) -> Tensor:
        ctx.tp = tp
        return reduce_scatter(x, tp)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad_output, ctx.tp), None
