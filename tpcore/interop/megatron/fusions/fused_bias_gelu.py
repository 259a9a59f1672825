"""gelu(x + bias) by its tanh approximation, which is what Megatron's fused function computes."""

from __future__ import annotations

from torch import Tensor

from tpcore.kernels import bias_gelu as _bias_gelu


def bias_gelu_impl(input: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(input + bias), differentiable, in one pass.

    Args:
        input: [..., f].
        bias: [f] or None.
    """
    return _bias_gelu(input, bias, "tanh")
