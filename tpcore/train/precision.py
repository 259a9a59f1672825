"""In which number format the model computes, and what the optimizer needs for it.

    trainer.precision   weights of the model   arithmetic   what the optimizer steps   loss scaling
    32                  float32                float32      the weights                no
    bf16-mixed          float32                bfloat16     the weights                no
    bf16                bfloat16               bfloat16     float32 main weights       no
    16-mixed            float32                float16      the weights                dynamic

`mixed` is torch.autocast. With `bf16` the main weights are kept beside the model's, and after each
step the model's weights are the main weights, rounded. Gradients of micro-batches are summed in
float32. The gradient of the only micro-batch of a step stays as the backward has left it: float32
would hold the same numbers in twice the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpcore.parallel.group import DataParallelGroup


@dataclass(frozen=True)
class Precision:
    """One row of the table above."""

    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    scales_loss: bool = False

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which the model runs."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


PRECISIONS = {
    "32": Precision(),
    "bf16-mixed": Precision(autocast=torch.bfloat16),
    "bf16": Precision(weights=torch.bfloat16),
    "16-mixed": Precision(autocast=torch.float16, scales_loss=True),
}
_SAME = {"16": "16-mixed", "bf16-true": "bf16", "32-true": "32"}


def precision_of(name: str) -> Precision:
    """The precision of `trainer.precision`, under tpcore's or Lightning's name."""
    return PRECISIONS[_SAME.get(name, name)]


class Weights:
    """The trainable parameters by name, as the optimizer sees them: always float32.

    Args:
        model: in float32; it is cast to the precision's format here.
        precision: one of `PRECISIONS`.

    Attributes:
        main: what the optimizer steps: the model's own parameters, or copies of them.
        shards: the data-parallel ranks that hold other rows of them; one rank: there are none.
    """

    is_wrapped: bool = False
    """Whether the model's own parameters are no plain tensors."""

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self.shards = DataParallelGroup.single()
        self.model = model
        own = dict(model.named_parameters())
        self._whole: dict[str, nn.Parameter] = own
        self._copied: dict[str, nn.Parameter] = {}
        if precision.weights != torch.float32:
            self._whole = {
                name: nn.Parameter(p.detach().float(), requires_grad=p.requires_grad)
                for name, p in own.items()
            }
            # The main weights stay where the model had its own, which get memory of their own now.
            model.to(precision.weights)
            self._copied = {name: p for name, p in own.items() if p.requires_grad}
            for parameter in self._copied.values():
                parameter.register_post_accumulate_grad_hook(_add_to_main_grad)
        self.main = {name: p for name, p in self._whole.items() if p.requires_grad}
        for name in self._copied:
            self.main[name].grad_dtype = None  # any

    @property
    def copies(self) -> dict[nn.Parameter, nn.Parameter]:
        """Of those weights in `main` that are copies: the model's own, which follow them."""
        return {self.main[name]: own for name, own in self._copied.items()}

    def zero_gradients(self) -> None:
        """Forget all gradients, those that backward accumulates too."""
        for name, parameter in self.main.items():
            parameter.grad = None
            if name in self._copied:
                self._copied[name].main_grad = None  # type: ignore[attr-defined]

    def collect_gradients(self) -> None:
        """After the last backward of a step: give `main` its gradients.

        They are in float32, or, where they are of one backward alone, in the model's format.
        """
        for name, parameter in self._copied.items():
            self.main[name].grad = getattr(parameter, "main_grad", None)
            parameter.main_grad = None  # type: ignore[attr-defined]

    def publish(self) -> None:
        """After the optimizer's step: the model's weights are those of `main`."""
        if self._copied:
            with torch.no_grad():
                torch._foreach_copy_(
                    list(self._copied.values()), [self.main[name] for name in self._copied]
                )

    def whole(self, name: str, own: Tensor) -> Tensor:
        """All rows of a parameter, or of what has its shape; all ranks of `shards` call it."""
        return own

    def own_part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of what `whole` gave."""
        return whole

    def templates(self) -> dict[str, Tensor]:
        """Tensors of the shapes that `state_dict` gives."""
        return self.state_dict()

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state with all digits that there are."""
        state = self.model.state_dict()
        return {n: self._whole[n].detach() if n in self._whole else t for n, t in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put `state` into the main weights and the model."""
        self.model.load_state_dict(state)
        with torch.no_grad():
            for name, parameter in self._whole.items():
                parameter.copy_(state[name])


def _add_to_main_grad(parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return  # a linear layer has added it itself
    total = getattr(parameter, "main_grad", None)
    # From the second one on in float32, in which it is added in place.
    total = gradient if total is None else total.float().add_(gradient)
    parameter.main_grad = total  # type: ignore[attr-defined]


class LossScaler:
    """Dynamic loss scaling (arXiv 1710.03740, section 3.2): keeps small fp16 gradients above zero.

    The loss is multiplied by `scale`, the gradients are divided by it. When one of them has
    overflowed, the step is skipped and the scale halved; after `growth_interval` steps without
    that it is doubled. Powers of two, so no digit is lost.

    Args:
        scale: to begin with.
        growth_interval: steps without overflow before the scale grows.
        enabled: False: the scale is 1 and stays so.
    """

    SMALLEST = 2.0**-10
    LARGEST = 2.0**32

    def __init__(self, scale: float, growth_interval: int, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.growth_interval = growth_interval
        self.steps_without_overflow = 0

    def update(self, *, overflow: bool) -> None:
        """Follow one step; the same decision on every rank gives the same scale."""
        if not self.enabled:
            return
        if overflow:
            self.scale /= 2
            self.steps_without_overflow = 0
            return
        self.steps_without_overflow += 1
        if self.steps_without_overflow >= self.growth_interval and self.scale < self.LARGEST:
            self.scale *= 2
            self.steps_without_overflow = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether gradients overflow at any scale: something else is wrong."""
        return self.enabled and self.scale < self.SMALLEST

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"scale": self.scale, "steps_without_overflow": self.steps_without_overflow}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state`."""
        if self.enabled:
            self.scale = float(state["scale"])
            self.steps_without_overflow = int(state["steps_without_overflow"])
