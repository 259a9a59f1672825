"""Which code serves an op: chosen per call, overridable, and never silently.

Backends, in order of preference: `cuda` and `cpu` (compiled, for tensors of that device), `triton`
(for cuda tensors, where the compiled library is missing), and `reference` (plain PyTorch, any
device). An op falls to the reference when no kernel serves the device or dtype at hand; `explain()`
says which backend serves what and why the others do not.
`use_backend("reference")` or the environment variable TPCORE_BACKEND makes the choice explicit, and
a choice that cannot be honoured is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tpcore import _native
from tpcore.kernels.triton import RAW_OPS as TRITON_OPS
from tpcore.kernels.triton import refusal as triton_refusal

Backend = Literal["cuda", "triton", "cpu", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# Public op -> the raw ops it stands on.
OPS: dict[str, tuple[str, ...]] = {
    "layer_norm": ("layer_norm_forward", "layer_norm_backward"),
    "add_layer_norm": ("add_layer_norm_forward", "layer_norm_backward"),
    "bias_gelu": ("bias_gelu_forward", "bias_gelu_backward"),
    "masked_softmax": ("masked_softmax_forward", "masked_softmax_backward"),
    "packed_attention": ("packed_attention_forward", "packed_attention_backward"),
    "bias_dropout_residual": ("bias_dropout_residual_forward", "bias_dropout_residual_backward"),
    "cross_entropy": ("cross_entropy_statistics", "cross_entropy_backward"),
}

# Where a backend has raw ops of its own for an op.
_OWN_RAW_OPS = {
    ("bias_dropout_residual", "cpu"): (
        "bias_dropout_residual_cpu_forward",
        "bias_dropout_residual_cpu_backward",
    ),
}

# Device type -> the backends that are used there without being asked for; else the reference.
_PREFERENCES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _device_refusal(backend: str, op: str, device: str) -> str:
    """Why a backend does not serve an op on a device type; empty if it does."""
    if backend == "reference":
        return ""
    if backend == "triton":
        missing = [raw for raw in OPS[op] if raw not in TRITON_OPS]
        return f"has no {missing[0]}" if missing else triton_refusal(device)
    if device != backend:
        return f"serves {backend} tensors only"
    library = _native.status(backend)  # type: ignore[arg-type]
    if not library.loaded:
        return f"the compiled library is not loaded: {library.reason}"
    raw_ops = _OWN_RAW_OPS.get((op, backend), OPS[op])
    missing = [raw for raw in raw_ops if raw not in _native.NATIVE_OPS[backend]]
    return f"the compiled library has no {missing[0]}" if missing else ""


def _preferred(op: str, device: str) -> str:
    for backend in _PREFERENCES[device]:
        if not _device_refusal(backend, op, device):
            return backend
    return "reference"


# (op, device type) -> the backend that serves it unasked. Nothing in it changes during a process.
_PREFERRED = {(op, device): _preferred(op, device) for op in OPS for device in _PREFERENCES}

# The process-wide override, and (op, device type) -> why it cannot be honoured there. Globals
# rather than context variables: torch.compile guards on them, and backward, which may run on
# another thread, keeps the choice its forward made.
_forced: str | None = None
_forced_refusals: dict[tuple[str, str], str] = {}
_recorder: list[tuple[str, str]] | None = None


def _force(name: str | None, origin: str = "the backend") -> None:
    global _forced, _forced_refusals
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{origin} is {name!r}; expected one of {', '.join(BACKENDS)}")
    _forced = name
    if name is not None:
        _forced_refusals = {key: _device_refusal(name, *key) for key in _PREFERRED}


_force(os.environ.get("TPCORE_BACKEND") or None, "the environment variable TPCORE_BACKEND")


def _dtype_refusal(backend: str, x: Tensor, parameters: tuple[Tensor | None, ...]) -> str:
    """Why a backend does not take these dtypes; empty if it does."""
    if backend == "reference":
        return ""
    if x.dtype not in _DTYPES or (backend == "triton" and x.dtype == torch.float64):
        return f"does not take {x.dtype}"
    given = [p.dtype for p in parameters if p is not None]
    if not given:
        return ""
    if any(dtype != given[0] for dtype in given):
        return f"takes weight and bias of one dtype, not {given[0]} and {given[1]}"
    if given[0] == x.dtype or (given[0] == torch.float32 and x.dtype != torch.float64):
        return ""
    return f"takes parameters in the dtype of x ({x.dtype}) or float32, not {given[0]}"


def check_operands(name: str, x: Tensor, **others: Tensor | None) -> None:
    """That `x`, called `name`, is something to compute with, and the others are where it is.

    Raises:
        ValueError: x has no dimension or no floating dtype that kernels know, or another operand
            is on another device.
        TypeError: another operand is no tensor.
    """
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"{name} is {x.dtype}; expected float32, bfloat16, float16 or float64: convert it first"
        )
    if x.dim() == 0:
        raise ValueError(f"{name} has no dimension; expected a last dimension to work along")
    for other, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{other} is {tensor!r}; expected a tensor")
        if tensor.device != x.device:
            raise ValueError(
                f"{other} is on {tensor.device} and {name} on {x.device}; move {other} there"
            )


def choose(op: str, x: Tensor, *parameters: Tensor | None) -> str:
    """The backend for one call of `op` on x, whose weight and bias are `parameters`.

    Raises:
        ValueError: if a backend was asked for explicitly that cannot serve this call.
    """
    device = x.device.type
    if _forced is None:
        backend = _PREFERRED.get((op, device), "reference")
        if _dtype_refusal(backend, x, parameters):
            backend = "reference"
    else:
        backend = _forced
        reason = "" if backend == "reference" else _forced_refusals.get((op, device), "not served")
        reason = reason or _dtype_refusal(backend, x, parameters)
        if reason:
            raise ValueError(
                f"backend {backend!r} was asked for, but it cannot serve {op} of this {device} "
                f"tensor: {reason}; choose 'reference', or leave the choice to tpcore"
            )
    if _recorder is not None:
        _recorder.append((op, backend))
    return backend


def raw_ops(backend: str) -> Any:
    """The raw ops of a backend with kernels, under the names of `_native.RAW_OPS`."""
    return torch.ops.tpcore_triton if backend == "triton" else torch.ops.tpcore


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether a kernel, not the reference, would serve a call of `op` on x.

    For callers who have something better than the reference to fall back to.
    """
    key = op, x.device.type
    if _forced is None:
        backend = _PREFERRED.get(key, "reference")
    else:
        backend = "reference" if _forced_refusals.get(key, "not served") else _forced
    return backend != "reference" and not _dtype_refusal(backend, x, ())


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Makes every op inside the block run on one backend, in the whole process.

    Raises:
        ValueError: if there is no such backend. An op that the backend cannot serve raises when it
            is called.
    """
    previous = _forced
    _force(name)
    try:
        yield
    finally:
        _force(previous)


@contextmanager
def record_backends() -> Iterator[list[tuple[str, str]]]:
    """Collects (op, backend) for every call inside the block; costs nothing outside one.

    Calls inside a compiled graph are recorded while it is traced, not when it runs.
    """
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


@dataclass(frozen=True)
class Explanation:
    """Who serves one op on one device type.

    Attributes:
        op: the public op.
        device: "cpu" or "cuda".
        serves: the backend that is used for tensors of that device; "none" if one was asked for
            that cannot, so that a call raises.
        refusals: every other backend -> why it is not used.
    """

    op: str
    device: str
    serves: str
    refusals: dict[str, str]


def explain() -> list[Explanation]:
    """Which backend serves each op on each device present, and why the others do not."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [_explain(op, device) for op in OPS for device in devices]


def _explain(op: str, device: str) -> Explanation:
    serves = _PREFERRED[op, device] if _forced is None else _forced
    refusals = {}
    if _forced is not None and (reason := _device_refusal(serves, op, device)):
        serves, refusals[_forced] = "none", f"asked for explicitly, but {reason}"
    for backend in BACKENDS:
        if backend == serves or backend in refusals:
            continue
        if _forced is not None:
            refusals[backend] = f"{_forced!r} was asked for explicitly"
        else:
            refusals[backend] = _device_refusal(backend, op, device) or f"{serves!r} is preferred"
    return Explanation(op, device, serves, refusals)
