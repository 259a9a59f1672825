"""Optimizers, and which parameters they treat in which way."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tpcore.train.config import ConfigError, OptimConfig

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Take the parameters whose names match a pattern out of the training; returns their number.

    Args:
        model: any module.
        patterns: as `embeddings.*` or `blocks.[0-5].*`.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing is left to learn.
    """
    names = dict(model.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ConfigError(
                f"model.frozen_parameters: {pattern!r} matches none of the parameters; they are "
                f"named like {', '.join(list(names)[:: max(1, len(names) // 5)])}"
            )
        frozen.update(matching)
    if len(frozen) == len(names):
        raise ConfigError("model.frozen_parameters names all parameters; leave some to be trained")
    for name in frozen:
        names[name].requires_grad_(False)
    return len(frozen)


def learning_rate_scale(name: str, num_layers: int, decay: float) -> float:
    """The factor of a parameter's learning rate under layer-wise decay (arXiv 1905.05583, 5.3).

    embeddings                  decay ** (num_layers + 1)
    block i (from 0)            decay ** (num_layers - i)
    final norm, pooler, head    1
    """
    block = _BLOCK.match(name)
    if block:
        return decay ** (num_layers - int(block.group(1)))
    return decay ** (num_layers + 1) if name.startswith("embeddings.") else 1.0


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, lr_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: without weight decay are norms and biases, all with one dimension.

    A shard has as many dimensions as the whole, so the groups do not depend on the size. Each
    group has `lr_scale`, which `set_learning_rate` multiplies the learning rate by.
    """
    num_layers = sum(1 for name in parameters if name.endswith(".input_norm.weight"))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        scale = learning_rate_scale(name, num_layers, lr_decay)
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_scale": scale}
        for (scale, decay), members in groups.items()
    ]


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW or Adam of torch, in its fused form (one kernel over all parameters), or apex's.

    Raises:
        ConfigError: apex was asked for and is not there.
    """
    groups = parameter_groups(parameters, config.weight_decay, config.layerwise_lr_decay)
    betas = (config.betas[0], config.betas[1])
    if config.name == "fused_adam":
        optimizer: torch.optim.Optimizer = _apex_fused_adam()(
            groups, lr=config.lr, betas=betas, eps=config.eps, adam_w_mode=True
        )
        return optimizer
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name]
    return cls(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group: `lr` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _apex_fused_adam() -> Any:
    try:
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            "model.optim.name=fused_adam needs NVIDIA apex (github.com/NVIDIA/apex, built with its "
            f"CUDA extensions; the package `apex` of PyPI is another one): {error}; or use "
            "model.optim.name=adamw, which is fused too"
        ) from error
    return FusedAdam
