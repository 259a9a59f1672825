"""Layer normalisation as a module on the fused kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tpcore.kernels import layer_norm
from tpcore.parallel.collectives import copy_all_to
from tpcore.parallel.group import TensorParallelGroup


class LayerNorm(nn.Module):
    """y = (x - mean) * rstd * weight + bias over the last dimensions (arXiv 1607.06450).

    Statistics are float32 whatever the dtype of x. Parameters are replicated over a
    tensor-parallel group; names and initial values are those of torch.nn.LayerNorm.

    Args:
        normalized_shape: the last dimensions of x, as an integer or a sequence.
        eps: added to the variance.
        elementwise_affine: whether there is a weight (and a bias).
        bias: whether there is a bias beside the weight.
        sequence_parallel: x holds only this rank's share of the tokens, so the gradients of weight
            and bias are parts of a sum; one all-reduce over ``tp`` takes it.
        tp: the ranks that share the tokens; only sequence parallelism needs it.

    Raises:
        ValueError: ``sequence_parallel`` without ``tp``.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        tp: TensorParallelGroup | None = None,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        )
        self.normalized_shape = shape
        self.eps = eps
        if sequence_parallel and tp is None:
            raise ValueError(
                "sequence_parallel=True needs tp, the ranks over which gradients are summed"
            )
        self.tp = tp
        self.sequence_parallel = sequence_parallel

        def parameter(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        self.register_parameter("weight", parameter(elementwise_affine))
        self.register_parameter("bias", parameter(elementwise_affine and bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if self.sequence_parallel and self.tp is not None:
            weight, bias = copy_all_to((weight, bias), self.tp)
        return layer_norm(x, weight, bias, self.eps, normalized_shape=self.normalized_shape)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, affine={self.weight is not None}"
