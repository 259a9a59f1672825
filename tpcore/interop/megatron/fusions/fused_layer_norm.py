"""Layer norms by the names and arguments of apex.normalization and Megatron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tpcore import layers
from tpcore.interop.megatron.parallel_state import (
    model_parallel_is_initialized,
    tensor_parallel_group,
)
from tpcore.kernels import layer_norm
from tpcore.parallel.collectives import copy_all_to

_SMALLEST_WEIGHT = 1e-6


class FusedLayerNorm(layers.LayerNorm):
    """Layer norm over the last dimensions, in the dtype of the input.

    Takes the arguments of apex (``normalized_shape, eps, elementwise_affine, memory_efficient``),
    of Megatron-LM (``normalized_shape, eps, sequence_parallel, apply_layernorm_1p``) and of
    Megatron-Core (``config, hidden_size, eps, zero_centered_gamma``).

    Args:
        normalized_shape: the last dimensions; or Megatron-Core's configuration, and then the
            dimensions as second argument.
        eps: added to the variance; as second argument, or as third after the configuration.
        elementwise_affine: whether there are weight and bias.
        memory_efficient: keep the output for the backward, which the next layer often keeps anyway,
            in place of the input; weights smaller than 1e-6 count as that.
        sequence_parallel: the input is this rank's share of the tokens; the gradients of weight and
            bias are summed over the ranks in the backward, and are not marked for a loop to sum
            them again. apex's name: ``sequence_parallel_enabled``.
        zero_centered_gamma: the weight is stored minus one; Megatron-LM's name:
            ``apply_layernorm_1p``.
        keywords: what the three say otherwise (``persist_layer_norm``, ``no_persist_layer_norm``,
            ``normalization``) means nothing.
    """

    def __init__(
        self,
        normalized_shape: Any = None,
        *positional: Any,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
        **keywords: Any,
    ) -> None:
        if normalized_shape is None:
            normalized_shape = keywords.pop("config", None)
        if normalized_shape is None:
            raise TypeError(f"{type(self).__name__} needs normalized_shape, or config, hidden_size")
        config = None if isinstance(normalized_shape, int | Sequence) else normalized_shape
        names = ["eps", "elementwise_affine", "memory_efficient"]
        if config is not None:
            names = ["hidden_size", "eps", "persist_layer_norm", "zero_centered_gamma"]
        if len(positional) > len(names):
            raise TypeError(f"{type(self).__name__} takes at most {1 + len(names)} positional ones")
        given: dict[str, Any] = {
            "elementwise_affine": elementwise_affine,
            "memory_efficient": memory_efficient,
        }
        given.update(keywords)
        given.update(zip(names, positional, strict=False))
        shape = given.pop("hidden_size", normalized_shape)
        is_sequence = given.pop("sequence_parallel_enabled", None)
        is_sequence = given.pop("sequence_parallel", is_sequence)
        if is_sequence is None:
            is_sequence = getattr(config, "sequence_parallel", False)
        minus_one = given.pop("apply_layernorm_1p", None)
        minus_one = given.pop("zero_centered_gamma", minus_one)
        if minus_one is None:
            minus_one = getattr(config, "layernorm_zero_centered_gamma", False)
        if given.pop("normalization", "LayerNorm") != "LayerNorm":
            raise ValueError("normalization: this is a layer norm")
        for name in ("persist_layer_norm", "no_persist_layer_norm"):
            given.pop(name, None)
        self.zero_centered_gamma = bool(minus_one)
        super().__init__(
            shape,
            given.pop("eps", 1e-5),
            elementwise_affine=given.pop("elementwise_affine"),
            tp=tensor_parallel_group() if model_parallel_is_initialized() else None,
            sequence_parallel=is_sequence,
            device=given.pop("device", None),
            dtype=given.pop("dtype", None),
        )
        self.memory_efficient = given.pop("memory_efficient")
        if given:
            raise TypeError(f"{type(self).__name__} has no argument {next(iter(given))!r}")
        for parameter in self.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        """Weight one (zero, where it is stored minus one), bias zero."""
        super().reset_parameters()
        if self.zero_centered_gamma and self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """[..., *normalized_shape] -> the same shape."""
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if self.sequence_parallel and self.tp is not None:
            weight, bias = copy_all_to((weight, bias), self.tp)
        if self.zero_centered_gamma and weight is not None:
            weight = weight + 1
        return self._normalize(input, weight, bias)

    def _normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.memory_efficient:
            return _MemoryEfficient.apply(x, weight, bias, self.normalized_shape, self.eps)
        return layer_norm(x, weight, bias, self.eps, normalized_shape=self.normalized_shape)


class MixedFusedLayerNorm(FusedLayerNorm):
    """The same, in the dtype of the parameters: x bf16 and weight float32 give float32."""

    def _normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None or weight.dtype == x.dtype:
            return super()._normalize(x, weight, bias)
        dtype = torch.promote_types(x.dtype, weight.dtype)
        bias = None if bias is None else bias.to(dtype)
        return super()._normalize(x.to(dtype), weight.to(dtype), bias).to(weight.dtype)


class _MemoryEfficient(torch.autograd.Function):
    """Layer norm that keeps y and rstd; xhat = (y - bias) / weight is what the gradients need."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        y = layer_norm(x, weight, bias, eps, normalized_shape=shape)
        rows = x.detach().reshape(-1, math.prod(shape))
        rows = rows if rows.dtype == torch.float64 else rows.float()
        rstd = (rows.var(1, correction=0, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(y, weight, bias, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, rstd = ctx.saved_tensors
        dtype = rstd.dtype
        num_columns = y.numel() // max(rstd.numel(), 1)
        grad = grad_y.reshape(-1, num_columns).to(dtype)
        xhat = y.reshape(-1, num_columns).to(dtype)
        if bias is not None:
            xhat = xhat - bias.reshape(-1).to(dtype)
        scaled = grad
        if weight is not None:
            scale = weight.reshape(-1).to(dtype)
            smallest = torch.full_like(scale, _SMALLEST_WEIGHT).copysign(scale)
            xhat = xhat / torch.where(scale.abs() < _SMALLEST_WEIGHT, smallest, scale)
            scaled = grad * scale
        grad_x = scaled - scaled.mean(1, keepdim=True)
        grad_x = rstd * (grad_x - xhat * (scaled * xhat).mean(1, keepdim=True))
        return (
            grad_x.to(y.dtype).view(y.shape),
            None if weight is None else (grad * xhat).sum(0).to(weight.dtype).view(weight.shape),
            None if bias is None else grad.sum(0).to(bias.dtype).view(bias.shape),
            None,
            None,
        )
