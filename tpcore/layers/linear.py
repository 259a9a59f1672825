"""Linear layers whose weight is split over a tensor-parallel group (arXiv 1909.08053, section 3).

Written with nn.Linear's convention, Y = X A^T + b with A [out, in], for two ranks:

    ColumnParallelLinear                     RowParallelLinear
                     | A_1 |                                                | X_1 |^T
    A = rows of A =  | --- |                 A = columns = [ A_1 | A_2 ],   | --- |
                     | A_2 |                                                | X_2 |
    Y_r = X A_r^T + b_r                      Y = sum over r of X_r A_r^T, then + b
    every rank needs all of X                every rank needs its columns of X
    and makes its columns of Y               and makes one term of Y, summed by an all-reduce

A column-parallel layer followed by a row-parallel one needs one all-reduce forward (the sum of Y)
and one backward (the gradient of X).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tpcore.layers.initialization import InitMethod, draw_whole_then_shard
from tpcore.parallel.collectives import (
    gather_from,
    reduce_from,
    scatter_to,
    start_all_reduce,
    wait,
)
from tpcore.parallel.group import TensorParallelGroup, divide
from tpcore.parallel.sharding import Replicated, Sharded, Sharding


class ColumnParallelLinear(nn.Module):
    """Y = X A^T + b with the rows of A [out, in] split over the ranks: A_r [out/tp, in].

        forward     Y_r  = X A_r^T + b_r                     [..., in] -> [..., out/tp]
        backward    dX   = sum over r of dY_r A_r            all-reduce, runs beside the next line
                    dA_r = dY_r^T X,  db_r = column sums of dY_r

    X is the same on every rank. A frozen weight or bias computes no gradient, and an input that
    needs none starts no all-reduce.

    Args:
        in_features: size of each input row.
        out_features: size of each full output row; a multiple of the group's size.
        tp: the ranks that share the weight.
        bias: whether there is a bias [out/tp].
        gather_output: return the full Y [..., out] on every rank instead of its own columns.
        skip_bias_add: return (Y without bias, bias), for a kernel that adds it.
        init_method: fills the full weight [out, in] in place; the bias is zero then. None: weight
            and bias are drawn as torch.nn.Linear draws them.

    Raises:
        ValueError: the group's size does not divide ``out_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp: TensorParallelGroup,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        init_method: InitMethod | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.tp = tp
        self.gather_output, self.skip_bias_add = gather_output, skip_bias_add
        self.init_method = init_method
        rows = divide(out_features, tp.size, "out_features")
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias whole, then keep this rank's rows."""
        _reset_linear(self, Sharded(0), Sharded(0))

    def own_sharding(self) -> dict[str, Sharding]:
        """Rows of the weight and of the bias are split."""
        names = ("weight",) if self.bias is None else ("weight", "bias")
        return dict.fromkeys(names, Sharded(0))

    def forward(self, x: Tensor) -> Any:
        """X [..., in] -> Y [..., out/tp] ([..., out] if gathered), or (Y, bias)."""
        _check_last_dim(x, self.in_features, "in_features")
        bias = None if self.skip_bias_add else self.bias
        y = column_parallel_linear(x, self.weight, bias, self.tp)
        if self.gather_output:
            y = gather_from(y, self.tp)
        if not self.skip_bias_add:
            return y
        if self.gather_output and self.bias is not None:
            return y, gather_from(self.bias, self.tp)
        return y, self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, tp_size={self.tp.size}"
        )


class RowParallelLinear(nn.Module):
    """Y = X A^T + b with the columns of A [out, in] split over the ranks: A_r [out, in/tp].

        forward     Y    = (sum over r of X_r A_r^T) + b     [..., in/tp] -> [..., out]
        backward    dX_r = dY A_r,  dA_r = dY^T X_r,  db = column sums of dY

    The bias [out] exists on every rank and is added once, after the all-reduce.

    Args:
        in_features: size of each full input row; a multiple of the group's size.
        out_features: size of each output row.
        tp: the ranks that share the weight.
        bias: whether there is a bias [out].
        input_is_parallel: X holds this rank's columns already [..., in/tp]; False: X [..., in] is
            the same on every rank, and its own columns are taken first.
        skip_bias_add: return (Y without bias, bias), for a kernel that adds it.
        init_method: fills the full weight [out, in] in place; the bias is zero then. None: weight
            and bias are drawn as torch.nn.Linear draws them.

    Raises:
        ValueError: the group's size does not divide ``in_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp: TensorParallelGroup,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        init_method: InitMethod | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.tp = tp
        self.input_is_parallel, self.skip_bias_add = input_is_parallel, skip_bias_add
        self.init_method = init_method
        columns = divide(in_features, tp.size, "in_features")
        self.weight = nn.Parameter(torch.empty(out_features, columns, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias whole, then keep this rank's columns (and the whole bias)."""
        _reset_linear(self, Sharded(1), Replicated())

    def own_sharding(self) -> dict[str, Sharding]:
        """Columns of the weight are split; the bias is replicated."""
        return {"weight": Sharded(1)}

    def forward(self, x: Tensor) -> Any:
        """X [..., in/tp] ([..., in] if it is not parallel) -> Y [..., out], or (Y, bias)."""
        if self.input_is_parallel:
            _check_last_dim(x, self.in_features // self.tp.size, "in_features / tp.size")
        else:
            _check_last_dim(x, self.in_features, "in_features")
            x = scatter_to(x, self.tp)
        y = reduce_from(F.linear(x, self.weight), self.tp)
        if self.skip_bias_add:
            return y, self.bias
        # The cast keeps autocast's low-precision output from being promoted by a float32 bias.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, tp_size={self.tp.size}"
        )


def column_parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallelGroup
) -> Tensor:
    """X A_r^T + b_r, with an all-reduce of dX that overlaps dA_r (see ColumnParallelLinear).

    Args:
        x: [..., in], the same on every rank.
        weight: [out/tp, in], this rank's rows.
        bias: [out/tp] or None.
        tp: the ranks that hold the other rows.

    Under autocast the three are cast to its dtype first, as F.linear does.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        # Here and not inside the Function: its backward runs outside autocast, and the casts need
        # gradients of their own.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _ColumnParallelLinear.apply(x, weight, bias, tp)


class _ColumnParallelLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallelGroup
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.tp = tp
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        grad_rows = grad_y.reshape(-1, grad_y.shape[-1])
        if needs_x:
            grad_x = grad_y.matmul(weight)
            if ctx.tp.size > 1:
                grad_x = start_all_reduce(grad_x, ctx.tp)
        if needs_weight:
            grad_weight = grad_rows.t().mm(x.reshape(-1, x.shape[-1]))
        if needs_bias:
            grad_bias = grad_rows.sum(0)
        if grad_x is not None and ctx.tp.size > 1:
            grad_x = wait(grad_x)
        return grad_x, grad_weight, grad_bias, None


def _reset_linear(
    layer: ColumnParallelLinear | RowParallelLinear, weight: Sharding, bias: Sharding
) -> None:
    # torch.nn.Linear: kaiming_uniform_(a=sqrt(5)), and a bias uniform within 1/sqrt(in).
    init_weight = layer.init_method or partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
    bound = 1 / math.sqrt(layer.in_features) if layer.in_features else 0.0
    init_bias = (
        nn.init.zeros_ if layer.init_method else partial(nn.init.uniform_, a=-bound, b=bound)
    )
    shape = (layer.out_features, layer.in_features)
    draw_whole_then_shard(layer.weight, shape, weight, layer.tp, init_weight)
    if layer.bias is not None:
        draw_whole_then_shard(layer.bias, shape[:1], bias, layer.tp, init_bias)


def _check_last_dim(x: Tensor, expected: int, meaning: str) -> None:
    if x.shape[-1] != expected:
        raise ValueError(
            f"x has shape {list(x.shape)}; expected {expected} ({meaning}) in its last dimension"
        )
