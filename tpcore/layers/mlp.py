"""The feed-forward half of a transformer block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpcore.kernels import bias_gelu
from tpcore.kernels.bias_gelu import APPROXIMATIONS
from tpcore.layers.initialization import InitMethod
from tpcore.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpcore.parallel.group import TensorParallelGroup


class MLP(nn.Module):
    """y = gelu(x A^T + a) B^T, returned together with the bias b that is still to be added.

    A [f, h] is split by rows and B [h, f] by columns, so each rank computes f/tp of the
    intermediate features from start to end, and one all-reduce joins them (arXiv 1909.08053,
    figure 3a):

        x [t, h] --dense_in--> [t, f/tp] --bias_gelu--> [t, f/tp] --dense_out, all-reduce--> [t, h]

    Args:
        hidden_size: h.
        intermediate_size: f; a multiple of the group's size.
        tp: the ranks that share the weights.
        gelu: "none" (erf), "tanh", or "erf_1.41421" (the erf of NeMo <= 1.4 and Megatron's
            onnx_safe); they differ in the fourth digit and are never swapped silently.
        init_method: fills the full weight of dense_in; None: as torch.nn.Linear.
        output_init_method: fills the full weight of dense_out; None: as init_method.
        sequence_parallel: x and y are this rank's share of the tokens, [t/tp, h]; the all-reduce
            becomes an all-gather before and a reduce-scatter after.
        accumulate_main_grad: see ColumnParallelLinear.

    Raises:
        ValueError: the group's size does not divide ``intermediate_size``, or ``gelu`` is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        tp: TensorParallelGroup,
        gelu: str = "none",
        bias: bool = True,
        init_method: InitMethod | None = None,
        output_init_method: InitMethod | None = None,
        sequence_parallel: bool = False,
        accumulate_main_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gelu not in APPROXIMATIONS:
            expected = ", ".join(map(repr, APPROXIMATIONS))
            raise ValueError(f"gelu={gelu!r} is unknown; expected one of {expected}")
        self.gelu = gelu
        self.dense_in = ColumnParallelLinear(
            hidden_size,
            intermediate_size,
            tp=tp,
            bias=bias,
            skip_bias_add=True,
            init_method=init_method,
            sequence_parallel=sequence_parallel,
            accumulate_main_grad=accumulate_main_grad,
            device=device,
            dtype=dtype,
        )
        self.dense_out = RowParallelLinear(
            intermediate_size,
            hidden_size,
            tp=tp,
            bias=bias,
            skip_bias_add=True,
            init_method=output_init_method or init_method,
            sequence_parallel=sequence_parallel,
            accumulate_main_grad=accumulate_main_grad,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """X [t, h] -> (y [t, h] without bias, bias [h] or None); [t/tp, h] sequence-parallel."""
        y, bias = self.dense_in(x)
        return self.dense_out(bias_gelu(y, bias, self.gelu))
