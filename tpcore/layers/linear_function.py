"""The differentiable functions under the linear layers.

The backward of a column-parallel product, for one rank. A line that starts a collective returns at
once; the collective runs beside what stands between it and its wait:

    X the same on every rank               X_r [t/tp, in], sequence-parallel
                                           start   X    = all-gather of X_r
    dX_r = dY_r A_r                        dX'_r = dY_r A_r
                                           wait    X
    start   dX = all-reduce of dX_r        start   dX_r = reduce-scatter of dX'_r
    dA_r = dY_r^T X                        dA_r = dY_r^T X
    wait    dX                             wait    dX_r

What runs beside what is measured in docs/overlap.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpcore import _native
from tpcore.parallel.collectives import (
    all_gather,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from tpcore.parallel.group import TensorParallelGroup

# What happens to the input before the product, and to its gradient after it.
Exchange = Literal["none", "all_reduce", "sequence"]

LEAST_TRANSPOSED = 1 << 18  # elements of a weight, see _transposes


def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tp: TensorParallelGroup,
    *,
    sequence_parallel: bool = False,
    reduce_input_grad: bool = True,
    accumulate_main_grad: bool = False,
) -> Tensor:
    """X A_r^T + b_r, whose input-gradient collective overlaps dA_r (see ColumnParallelLinear).

    Args:
        x: [..., in], the same on every rank; sequence-parallel: [t/tp, ..., in].
        weight: [out/tp, in], this rank's rows.
        bias: [out/tp] or None.
        tp: the ranks that hold the other rows.
        sequence_parallel: x is gathered along dim 0, and its gradient reduced and scattered.
        reduce_input_grad: sum the gradient of x over the ranks; False where that happens elsewhere.
            Sequence parallelism always does.
        accumulate_main_grad: see ``linear``.

    Under autocast x, weight and bias are cast to its dtype first, as F.linear does.
    """
    exchange: Exchange = "all_reduce" if reduce_input_grad else "none"
    if sequence_parallel:
        exchange = "sequence"
    return _linear(x, weight, bias, tp, exchange, accumulate_main_grad)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, accumulate_main_grad: bool = False
) -> Tensor:
    """X A^T + b on this rank alone: F.linear, or with the gradient of A in ``weight.main_grad``.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out] or None.
        accumulate_main_grad: the backward adds the weight gradient to ``weight.main_grad``, made in
            float32 at the first backward unless the caller has set it: in the matrix product
            itself where dtypes and device allow it, else by one addition. It is never overwritten;
            whoever steps the weight reads and zeroes it. ``weight.grad`` stays None, so what waits
            for it (DistributedDataParallel, FSDP2) does not see it. torch.compile breaks its graph
            here.

    Raises:
        ValueError: ``accumulate_main_grad`` for a weight that is computed from others.
    """
    if not (accumulate_main_grad or (torch.is_grad_enabled() and _transposes(weight))):
        return F.linear(x, weight, bias)
    tp = TensorParallelGroup.single()
    return _linear(x, weight, bias, tp, "none", accumulate_main_grad)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied by weights: its own, or that of autocast."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tp: TensorParallelGroup,
    exchange: Exchange,
    accumulate_main_grad: bool,
) -> Tensor:
    if exchange == "sequence" and x.ndim < 2:
        raise ValueError(f"x has shape {list(x.shape)}; expected [t/tp, ..., in]")
    if accumulate_main_grad and not weight.is_leaf:
        # Its gradient would end in an attribute of a tensor that nobody steps.
        raise ValueError(
            "accumulate_main_grad needs a weight that is a parameter, and this one is computed "
            "from others (a parametrization, a scaled or shared weight); leave it out here"
        )
    parameter = weight if accumulate_main_grad else None
    if torch.is_autocast_enabled(x.device.type):
        # Here and not inside the Function: its backward runs outside autocast, and the casts need
        # gradients of their own.
        dtype = dtype_of_products(x)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if tp.size == 1:
        exchange = "none"
    if parameter is not None and torch.compiler.is_compiling():
        # The compiler does not trace a backward that writes to an attribute of a parameter. A
        # decorator would say the same, and load the compiler, a second, into every process.
        outside = torch.compiler.disable(_Linear.apply)
        return outside(x, weight, bias, tp, exchange, parameter)
    return _Linear.apply(x, weight, bias, tp, exchange, parameter)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tp: TensorParallelGroup,
        exchange: Exchange,
        parameter: Tensor | None,
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.tp, ctx.exchange, ctx.parameter = tp, exchange, parameter
        ctx.transposes = _transposes(weight)
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return F.linear(all_gather(x, tp) if exchange == "sequence" else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathers = ctx.exchange == "sequence" and needs_weight
        reduces = ctx.exchange != "none" and needs_x
        grad_x = grad_weight = grad_bias = None
        grad_rows = grad_y.reshape(-1, grad_y.shape[-1])
        if gathers:
            x = start_all_gather(x, ctx.tp)
        if needs_x:
            grad_x = grad_y.matmul(weight)
        if gathers:
            x = wait(x)
        if reduces:
            assert grad_x is not None
            start = start_all_reduce if ctx.exchange == "all_reduce" else start_reduce_scatter
            grad_x = start(grad_x, ctx.tp)
        if needs_weight:
            rows = x.reshape(-1, x.shape[-1])
            columns = grad_rows.t()
            if ctx.transposes and grad_rows.stride(1) == 1:
                columns = torch.ops.tpcore.transpose16(grad_rows)
            if ctx.parameter is None:
                grad_weight = columns.mm(rows)
            else:
                _add_to_main_grad(ctx.parameter, columns, rows)
        if needs_bias:
            grad_bias = grad_rows.sum(0)
        if reduces:
            assert grad_x is not None
            grad_x = wait(grad_x)
        return grad_x, grad_weight, grad_bias, None, None, None


def _transposes(weight: Tensor) -> bool:
    """Whether the gradient dY^T X of a weight takes less time with dY transposed in memory first.

    It does where torch multiplies on AMX tiles: 1.1 to 2.1 times less from such sizes on, the
    transpose included (docs/performance.md). Elsewhere products take either at the same speed.
    """
    return (
        dtype_of_products(weight) == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.numel() >= LEAST_TRANSPOSED
        and _native.has_amx()
    )


def _add_to_main_grad(parameter: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a b to the main_grad of the parameter, which it makes if there is none."""
    total = getattr(parameter, "main_grad", None)
    if total is not None:
        _add_product(total, a, b)
        return
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if a.is_cuda and a.dtype != dtype:
        total = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        _add_product(total, a, b)
    else:
        # Not zeros and an addition, which read and write the largest tensors of a step once more.
        total = a.mm(b).to(dtype)
    parameter.main_grad = total  # type: ignore[attr-defined]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a b to total, in place."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        # The CPU has no product of half-precision operands with a float32 result.
        total.add_(a.mm(b))
