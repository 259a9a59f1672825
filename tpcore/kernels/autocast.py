"""What the ops do under autocast: they compute in float32 inside and cast nothing outside.

PyTorch's autocast would run layer_norm, softmax and the losses on float32 copies of their inputs
and return float32. The ops of tpcore take mixed dtypes instead (x in bfloat16, parameters in
float32) and keep statistics in float32, so autocast needs no cast at all: every op takes any
floating dtype and returns the dtype in `OUTPUT_DTYPE`, inside an autocast region and outside one.

The autograd Functions hold no op that autocast touches, only raw kernels; so they need no
custom_fwd / custom_bwd to give backward the same precision as forward. The references do, and run
with autocast switched off.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

# "promoted" is torch.promote_types(x.dtype, residual.dtype); "statistics" is float32, or float64
# for float64 logits.
OUTPUT_DTYPE: dict[str, str] = {
    "layer_norm": "x",
    "add_layer_norm": "promoted",
    "bias_gelu": "x",
    "masked_softmax": "x",
    "packed_attention": "x",
    "bias_dropout_residual": "promoted",
    "cross_entropy": "statistics",
}


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off for the device; free where it is off already."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
