"""residual + dropout(x + bias, prob), in one pass.

The dropout bits are those of tpcore's counter-based generator, keyed by a seed drawn from the
default generator of x's device: they follow manual seeds, ``get_cuda_rng_tracker().fork()`` and
activation checkpointing, and ranks whose generators agree drop the same elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpcore.kernels import bias_dropout_residual


def bias_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor, prob: float, training: bool
) -> Tensor:
    """Megatron-LM's function.

    Args:
        x: [..., h].
        bias: [h], or expanded to the shape of x, or None.
        residual: the shape of x.
        prob: probability of dropping an element.
        training: False: no dropout.
    """
    if bias is not None and bias.dim() > 1:
        if any(bias.stride(d) for d in range(bias.dim() - 1) if bias.shape[d] > 1):
            x, bias = x + bias, None  # no row of numbers that was expanded
        else:
            bias = bias[(0,) * (bias.dim() - 1)]
    if not training or prob == 0:
        return bias_dropout_residual(x, bias, residual)
    rows = x.shape[:-1]
    row_ids = torch.arange(rows.numel(), device=x.device).view(rows)
    seed = torch.randint(2**62, (1,), device=x.device)
    return bias_dropout_residual(x, bias, residual, p=prob, seed=seed, row_ids=row_ids)


def _split(first: Any, rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """x, bias, residual, prob from (x, bias, residual, prob) or ((x, bias), residual, prob)."""
    return (*first, *rest) if isinstance(first, tuple) else (first, *rest)


def bias_dropout_add_fused_train(x_with_bias: Any, *rest: Any) -> Tensor:
    """((x, bias), residual, prob) as Megatron-Core, or (x, bias, residual, prob); with dropout."""
    x, bias, residual, prob = _split(x_with_bias, rest)
    return bias_dropout_add(x, bias, residual, prob, True)


def bias_dropout_add_fused_inference(x_with_bias: Any, *rest: Any) -> Tensor:
    """The same without dropout."""
    x, bias, residual, prob = _split(x_with_bias, rest)
    return bias_dropout_add(x, bias, residual, prob, False)


def get_bias_dropout_add(training: bool, fused: bool = True) -> Callable[..., Tensor]:
    """The function for training or for inference; always fused."""
    return bias_dropout_add_fused_train if training else bias_dropout_add_fused_inference


bias_dropout_add_unfused = get_bias_dropout_add
