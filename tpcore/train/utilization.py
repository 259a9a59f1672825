"""Model FLOP utilisation: how much of the device's matrix speed a training step uses.

    utilisation = operations of the step / (duration * peak)

Operations are those that the model's formulas need, forward and backward (`models.cost.step_flops`
on the lengths of the step); what is computed twice to save memory does not count, as in arXiv
2204.02311, appendix B. The peak is stated by `trainer.peak_tflops`, or measured when the run
starts: one product of the shape of a feed-forward layer, in the number format of the run, with the
threads of the rank. So 1 is what this machine's matrix products reach alone, not what its data
sheet says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpcore.memory import peak_memory_bytes
from tpcore.models.config import BertConfig
from tpcore.models.cost import Layout, step_flops
from tpcore.train.measure import matrix_flops_per_s

_MEASURED_ROWS = 512


class Utilization:
    """Of one rank's device.

    Args:
        config: of the encoder.
        tensor_parallel_size: ranks that share a model.
        data_parallel_size: ranks that share a batch.
        device: of the rank.
        dtype: of the matrix products.
        peak_tflops: stated peak; None: measured now, which takes about a second; 0: no utilisation.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        tensor_parallel_size: int,
        data_parallel_size: int,
        device: torch.device,
        dtype: torch.dtype,
        peak_tflops: float | None,
    ) -> None:
        self.config = config
        self.tp_size, self.dp_size = tensor_parallel_size, data_parallel_size
        if peak_tflops is None:
            self.peak = matrix_flops_per_s(device, dtype, rows=_MEASURED_ROWS)
        else:
            self.peak = peak_tflops * 1e12

    def of_step(
        self,
        lengths: Sequence[int],
        predicted: int,
        duration_s: float,
        *,
        first_tokens_only: bool = False,
    ) -> float | None:
        """The fraction of the peak; None: there is none.

        Args:
            lengths: of all sequences of the step, on all ranks.
            predicted: tokens of this rank that went through the vocabulary.
            duration_s: of the step.
            first_tokens_only: whether the last block computes no other tokens than the first ones
                of sequences behind its attention.
        """
        if not self.peak:
            return None
        tokens = sum(lengths)
        layout = Layout(
            tokens=tokens,
            mean_keys=sum(length * length for length in lengths) / tokens,
            tensor_parallel_size=self.tp_size,
            predicted_tokens=predicted * self.dp_size,
            last_block_tokens=len(lengths) if first_tokens_only else None,
        )
        return step_flops(self.config, layout) / self.dp_size / (duration_s * self.peak)


def device_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of torch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes()
