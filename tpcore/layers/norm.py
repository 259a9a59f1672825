"""Layer normalisation as a module on the fused kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tpcore.kernels import layer_norm


class LayerNorm(nn.Module):
    """y = (x - mean) * rstd * weight + bias over the last dimensions (arXiv 1607.06450).

    Statistics are float32 whatever the dtype of x. Parameters are replicated over a
    tensor-parallel group; names and initial values are those of torch.nn.LayerNorm.

    Args:
        normalized_shape: the last dimensions of x, as an integer or a sequence.
        eps: added to the variance.
        elementwise_affine: whether there is a weight (and a bias).
        bias: whether there is a bias beside the weight.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        )
        self.normalized_shape = shape
        self.eps = eps

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
        return layer_norm(
            x, self.weight, self.bias, self.eps, normalized_shape=self.normalized_shape
        )

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, affine={self.weight is not None}"
