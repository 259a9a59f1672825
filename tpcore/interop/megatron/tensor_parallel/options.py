"""What the keywords or the configuration of a layer say, whichever library they are written for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

InitMethod = Callable[[Tensor], object]


@dataclass(frozen=True)
class LayerOptions:
    """What either spelling says about a layer."""

    params_dtype: torch.dtype
    use_cpu_initialization: bool
    perform_initialization: bool
    sequence_parallel: bool
    gradient_accumulation_fusion: bool

    @classmethod
    def of(cls, config: Any, keywords: dict[str, Any]) -> LayerOptions:
        # Names of apex, and of Megatron-LM's later years; those of the configuration otherwise.
        keywords = dict(keywords)
        if "sequence_parallel_enabled" in keywords:
            keywords["sequence_parallel"] = keywords.pop("sequence_parallel_enabled")
        for name in _WITHOUT_MEANING:
            keywords.pop(name, None)
        for name in _REFUSED:
            if keywords.pop(name, None):
                raise ValueError(f"{name} is not supported; leave it out")
        values = {
            name: keywords.pop(name, getattr(config, name, default))
            for name, default in _DEFAULTS.items()
        }
        if keywords:
            raise TypeError(f"this layer has no argument {next(iter(keywords))!r}")
        return cls(**values)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        if self.use_cpu_initialization or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


_DEFAULTS: dict[str, Any] = {
    "params_dtype": torch.float32,
    "use_cpu_initialization": False,
    "perform_initialization": True,
    "sequence_parallel": False,
    "gradient_accumulation_fusion": False,
}
# The all-reduce of the input gradient always runs beside the weight gradient, and main gradients
# have the dtype that their owner gave them.
_WITHOUT_MEANING = (
    "accumulation_in_fp16",
    "async_tensor_model_parallel_allreduce",
    "name",
    "no_async_tensor_model_parallel_allreduce",
    "tp_comm_buffer_name",
)
_REFUSED = ("embedding_activation_buffer", "grad_output_buffer", "is_expert")


def fill(
    layer: Any, options: LayerOptions, init_method: InitMethod, keep_master_weight: bool
) -> None:
    """Give a layer that was built on the meta device its memory and, if wanted, its values."""
    layer.to_empty(device=options.device)
    layer.master_weight = None

    def keeping(full: Tensor) -> None:
        init_method(full)
        layer.master_weight = full.clone()

    layer.init_method = keeping if keep_master_weight else init_method
    if options.perform_initialization:
        layer.reset_parameters()
    layer.init_method = init_method
