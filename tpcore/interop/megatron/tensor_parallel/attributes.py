"""The marks that Megatron's layers leave on parameters, for optimizers and norms to read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpcore.interop.megatron.parallel_state import get_tensor_model_parallel_rank

_ATTRIBUTES: dict[str, Any] = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "partition_stride": 1,
}


def set_tensor_model_parallel_attributes(
    tensor: Tensor, is_parallel: bool, dim: int, stride: int
) -> None:
    """Mark a tensor as split (or not) along ``dim``."""
    for name, value in zip(_ATTRIBUTES, (is_parallel, dim, stride), strict=True):
        setattr(tensor, name, value)


def set_defaults_if_not_set_tensor_model_parallel_attributes(tensor: Tensor) -> None:
    """Mark a tensor as not split, unless it is marked already."""
    for name, value in _ATTRIBUTES.items():
        if not hasattr(tensor, name):
            setattr(tensor, name, value)


def copy_tensor_model_parallel_attributes(
    destination_tensor: Tensor, source_tensor: Tensor
) -> None:
    """Give one tensor the marks of another, as far as that has any."""
    for name in _ATTRIBUTES:
        if hasattr(source_tensor, name):
            setattr(destination_tensor, name, getattr(source_tensor, name))


def param_is_not_tensor_parallel_duplicate(param: Tensor) -> bool:
    """Whether to count this rank's tensor in a norm over all of them: split, or on rank 0."""
    return getattr(param, "tensor_model_parallel", False) or get_tensor_model_parallel_rank() == 0
