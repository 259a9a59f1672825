"""Pure, differentiable functions of tensors on one device, served by the best backend present."""

from tpcore.kernels.attention import packed_attention
from tpcore.kernels.backend import (
    Explanation,
    explain,
    has_kernel,
    record_backends,
    use_backend,
)
from tpcore.kernels.bias_dropout_residual import bias_dropout_residual
from tpcore.kernels.bias_gelu import bias_gelu
from tpcore.kernels.cross_entropy import cross_entropy
from tpcore.kernels.layer_norm import add_layer_norm, layer_norm
from tpcore.kernels.masked_softmax import masked_softmax

__all__ = [
    "Explanation",
    "add_layer_norm",
    "bias_dropout_residual",
    "bias_gelu",
    "cross_entropy",
    "explain",
    "has_kernel",
    "layer_norm",
    "masked_softmax",
    "packed_attention",
    "record_backends",
    "use_backend",
]
