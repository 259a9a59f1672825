"""The kernels in Triton: what serves a GPU for which `_C_cuda` was not built.

They are an op family of their own, `torch.ops.tpcore_triton`, with the schemas and fakes of
`torch.ops.tpcore`, and not the CUDA implementations of that family: so a process may hold both and
`use_backend` choose between them, and Triton's interpreter can serve CPU tensors beside the
compiled CPU kernels. The ops are opaque: torch.compile(fullgraph=True) sees their schemas, never
the kernels inside. Importing this package does not import triton; `refusal` does where the
kernels could run.

One file per op, one anatomy: kernels, then the raw ops that launch them. A kernel works on tiles of
rows x columns and computes in float32. It is compiled per dtype, alignment and power of two of the
row length, never per number of rows.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from tpcore._native import define_ops

# Raw op -> the module here that implements it under the same name.
_MODULES = {
    "layer_norm_forward": "layer_norm",
    "add_layer_norm_forward": "layer_norm",
    "layer_norm_backward": "layer_norm",
    "bias_gelu_forward": "bias_gelu",
    "bias_gelu_backward": "bias_gelu",
    "masked_softmax_forward": "masked_softmax",
    "masked_softmax_backward": "masked_softmax",
    "bias_dropout_residual_forward": "bias_dropout_residual",
    "bias_dropout_residual_backward": "bias_dropout_residual",
    "cross_entropy_statistics": "cross_entropy",
    "cross_entropy_backward": "cross_entropy",
}
RAW_OPS = frozenset(_MODULES)


@functools.cache
def _implementation(name: str) -> Callable[..., Any]:
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def _deferred(name: str) -> Callable[..., Any]:
    return lambda *arguments: _implementation(name)(*arguments)


_LIBRARY = define_ops("tpcore_triton", _MODULES)
for _name in _MODULES:
    _LIBRARY.impl(_name, _deferred(_name), "CompositeExplicitAutograd")


@functools.cache
def refusal(device: str) -> str:
    """Why these kernels do not serve tensors of a device type; empty if they do."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device != "cuda" and not (device == "cpu" and interpreted):
        return "serves cuda tensors only, or with TRITON_INTERPRET=1 cpu tensors, slowly"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    try:
        import_module("triton")
    except Exception as error:  # a broken installation may raise anything
        return f"triton cannot be imported: {error}"
    return ""
