"""The part of Megatron-Core's configuration that its tensor-parallel layers read."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class ModelParallelConfig:
    """What ``config=`` of the layers says; an object of Megatron-Core's own class does as well.

    Attributes:
        tensor_model_parallel_size: not read by the layers, which ask the groups.
        sequence_parallel: activations between the layers hold a share of dim 0.
        params_dtype: dtype of the parameters.
        use_cpu_initialization: parameters stay on the CPU until the model is moved.
        perform_initialization: False leaves them uninitialised, for a checkpoint to fill.
        gradient_accumulation_fusion: add weight gradients to ``weight.main_grad`` in float32.
        async_tensor_model_parallel_allreduce: without meaning here: it always runs beside.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    params_dtype: torch.dtype = torch.float32
    use_cpu_initialization: bool = False
    perform_initialization: bool = True
    gradient_accumulation_fusion: bool = False
    async_tensor_model_parallel_allreduce: bool = True
