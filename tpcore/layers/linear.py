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
and one backward (the gradient of X). With sequence parallelism (arXiv 2205.05198) what lies between
such pairs holds 1/tp of the tokens: X is gathered along dim 0 before the column-parallel layer, and
Y is reduced and scattered along dim 0 after the row-parallel one. That moves as many bytes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tpcore.layers.initialization import InitMethod, draw_whole_then_shard
from tpcore.layers.linear_function import column_parallel_linear, linear
from tpcore.parallel.collectives import (
    copy_all_to,
    gather_from,
    reduce_from,
    reduce_scatter_to_sequence,
    scatter_to,
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

    With ``sequence_parallel`` X_r [t/tp, ..., in] is this rank's share of dim 0. It is gathered for
    the product, but only X_r is kept, and gathered again backward:

        forward     Y_r  = X A_r^T + b_r,  X = all-gather of X_r
        backward    dX_r = reduce-scatter of dY_r A_r              runs beside dA_r

    Args:
        in_features: size of each input row.
        out_features: size of each full output row; a multiple of the group's size.
        tp: the ranks that share the weight.
        bias: whether there is a bias [out/tp].
        gather_output: return the full Y [..., out] on every rank instead of its own columns.
        skip_bias_add: return (Y without bias, bias), for a kernel that adds it.
        init_method: fills the full weight [out, in] in place; the bias is zero then. None: weight
            and bias are drawn as torch.nn.Linear draws them.
        sequence_parallel: X holds this rank's share of dim 0.
        accumulate_main_grad: the backward adds the weight gradient to ``weight.main_grad`` and
            leaves ``weight.grad`` None (see ``linear_function.linear``).

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
        sequence_parallel: bool = False,
        accumulate_main_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.accumulate_main_grad = accumulate_main_grad
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
        _reset_linear(self)

    def own_sharding(self) -> dict[str, Sharding]:
        """Rows of the weight and of the bias are split."""
        names = ("weight",) if self.bias is None else ("weight", "bias")
        return dict.fromkeys(names, Sharded(0))

    def forward(self, x: Tensor) -> Any:
        """X [..., in] -> Y [..., out/tp] ([..., out] if gathered), or (Y, bias).

        Sequence-parallel: X [t/tp, ..., in] -> Y [t, ..., out/tp].
        """
        _check_last_dim(x, self.in_features, "in_features")
        y = column_parallel_linear(
            x,
            self.weight,
            None if self.skip_bias_add else self.bias,
            self.tp,
            sequence_parallel=self.sequence_parallel,
            accumulate_main_grad=self.accumulate_main_grad,
        )
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
        sequence_parallel: keep this rank's share of dim 0 of Y, by a reduce-scatter in place of the
            all-reduce; dim 0 of X must be a multiple of the group's size. The gradient of the bias,
            which sees that share only, is summed over the ranks.
        accumulate_main_grad: the backward adds the weight gradient to ``weight.main_grad`` and
            leaves ``weight.grad`` None (see ``linear_function.linear``).

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
        sequence_parallel: bool = False,
        accumulate_main_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.accumulate_main_grad = accumulate_main_grad
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
        _reset_linear(self)

    def own_sharding(self) -> dict[str, Sharding]:
        """Columns of the weight are split; the bias is replicated."""
        return {"weight": Sharded(1)}

    def forward(self, x: Tensor) -> Any:
        """X [..., in/tp] ([..., in] if it is not parallel) -> Y [..., out], or (Y, bias).

        Sequence-parallel: X [t, ..., in/tp] -> Y [t/tp, ..., out].
        """
        if self.input_is_parallel:
            _check_last_dim(x, self.in_features // self.tp.size, "in_features / tp.size")
        else:
            _check_last_dim(x, self.in_features, "in_features")
            x = scatter_to(x, self.tp)
        y = linear(x, self.weight, accumulate_main_grad=self.accumulate_main_grad)
        bias: Tensor | None = self.bias
        if self.sequence_parallel:
            y = reduce_scatter_to_sequence(y, self.tp)
            (bias,) = copy_all_to((bias,), self.tp)
        else:
            y = reduce_from(y, self.tp)
        if self.skip_bias_add:
            return y, bias
        # The cast keeps autocast's low-precision output from being promoted by a float32 bias.
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, tp_size={self.tp.size}"
        )


def _reset_linear(layer: ColumnParallelLinear | RowParallelLinear) -> None:
    # torch.nn.Linear: kaiming_uniform_(a=sqrt(5)), and a bias uniform within 1/sqrt(in).
    init_weight = layer.init_method or partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
    bound = 1 / math.sqrt(layer.in_features) if layer.in_features else 0.0
    init_bias = (
        nn.init.zeros_ if layer.init_method else partial(nn.init.uniform_, a=-bound, b=bound)
    )
    shape = (layer.out_features, layer.in_features)
    shardings = layer.own_sharding()
    draw_whole_then_shard(layer.weight, shape, shardings["weight"], layer.tp, init_weight)
    if layer.bias is not None:
        sharding = shardings.get("bias", Replicated())
        draw_whole_then_shard(layer.bias, shape[:1], sharding, layer.tp, init_bias)


def _check_last_dim(x: Tensor, expected: int, meaning: str) -> None:
    if x.ndim == 0 or x.shape[-1] != expected:
        raise ValueError(
            f"x has shape {list(x.shape)}; expected {expected} ({meaning}) in its last dimension"
        )
