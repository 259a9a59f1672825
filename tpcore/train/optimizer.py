"""Optimizers, and which parameters they treat in which way."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpcore import _native
from tpcore.train.config import ConfigError, OptimConfig
from tpcore.train.gradients import scale_gradients
from tpcore.train.precision import Weights

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


class OnePassAdamW(torch.optim.AdamW):
    """torch's fused AdamW on the CPU, which reads and writes all that a parameter has once.

    To the state and to the bit it is torch's. Beyond that a gradient may be in half precision, is
    multiplied by `grad_factor` on the way, and a rounded copy of the parameter is written along
    with it.

    Args:
        groups: as torch's; parameters are contiguous, in float32.
        copies: of the parameters that have one, their copies.
        options: as torch's.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        copies: Mapping[nn.Parameter, Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(groups, fused=True, **options)
        self.copies = copies or {}
        self.grad_factor = 1.0

    @staticmethod
    def takes(parameters: Sequence[nn.Parameter]) -> bool:
        """Whether all that the kernel needs is there."""
        return "adamw_" in _native.NATIVE_OPS.get("cpu", ()) and all(
            p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous()
            for p in parameters
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        state, copy = self.state[parameter], self.copies.get(parameter)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        torch.ops.tpcore.adamw_(
            parameter,
            parameter.grad.contiguous(),
            state["exp_avg"],
            state["exp_avg_sq"],
            copy,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            state["step"].item(),
            self.grad_factor,
        )
        # For a backward that still waits for the values of before: it must not go on with these.
        torch.autograd.graph.increment_version(parameter if copy is None else (parameter, copy))


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    config: OptimConfig,
    copies: Mapping[nn.Parameter, Tensor] | None = None,
) -> torch.optim.Optimizer:
    """AdamW or Adam of torch, in its fused form (one kernel over all parameters), or apex's.

    Args:
        parameters: what it steps, by name.
        config: which, and how.
        copies: of parameters that a model has rounded copies of, those; see `step_weights`.

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
    if config.name == "adamw" and OnePassAdamW.takes(list(parameters.values())):
        return OnePassAdamW(groups, copies, lr=config.lr, betas=betas, eps=config.eps)
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.name]
    return cls(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def step_weights(
    optimizer: torch.optim.Optimizer, weights: Weights, grad_factor: Tensor | None = None
) -> None:
    """Step `weights.main` by their gradients times `grad_factor`; the model's weights follow.

    Args:
        optimizer: of `build_optimizer`, for `weights.main` and `weights.copies`.
        weights: with their gradients collected.
        grad_factor: a scalar, fp32; None: 1.
    """
    if isinstance(optimizer, OnePassAdamW):
        optimizer.grad_factor = 1.0 if grad_factor is None else grad_factor.item()
        optimizer.step()
        return
    parameters = weights.main.values()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.to(parameter.dtype)
    if grad_factor is not None:
        scale_gradients(parameters, grad_factor)
    optimizer.step()
    weights.publish()


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
