"""`Trainer(plugins=[NLPDDPPlugin()], **cfg.trainer)`, with the keys that NeMo 1.x had for it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch.strategies import Strategy

from tpcore.interop.lightning import TensorParallelStrategy

_NO_MEANING = {
    "amp_level": "precision says it all",
    "amp_backend": "precision says it all",
    "flush_logs_every_n_steps": "loggers decide that",
    "weights_summary": "set enable_model_summary",
    "prepare_data_per_node": "nothing is downloaded",
    "resume_from_checkpoint": "pass ckpt_path to the method that runs",
    "terminate_on_nan": "set detect_anomaly",
    "stochastic_weight_avg": "add the callback StochasticWeightAveraging",
}
"""Arguments of older Trainers that today's refuses, with the reason why they change nothing."""

_RENAMED = {
    "checkpoint_callback": "enable_checkpointing",
    "replace_sampler_ddp": "use_distributed_sampler",
    "track_grad_norm": None,
}
_STRATEGY_NAMES = ("ddp", "ddp2", "dp", "ddp_spawn", "ddp_cpu")
"""What `accelerator` could be, and what `NLPDDPPlugin` decides."""


class NLPDDPPlugin(TensorParallelStrategy):
    """Tensor and data parallelism for the models of `tpcore.interop.nemo`.

    Args:
        tensor_parallel_size: ranks that share a copy of the model. None: as many as the restored
            file was written for, if that divides the number of ranks, else the largest number
            that divides both.
        kwargs: those of `TensorParallelStrategy`.
    """

    def __init__(self, tensor_parallel_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size or 1, **kwargs)
        self.wanted_size = tensor_parallel_size
        self.stored_size = 1
        """Of the restored file; `restore_from` sets it."""

    def setup_distributed(self) -> None:
        """Connect the ranks and make the groups, now that their number is known."""
        if self.wanted_size is None:
            ranks = self.num_nodes * self.num_processes
            self.tensor_parallel_size = math.gcd(self.stored_size, ranks)
        if "PL_GLOBAL_SEED" not in os.environ:  # as NeMo's; `seed_everything` sets it
            torch.manual_seed(1234)
        super().setup_distributed()


class Trainer(lightning.pytorch.Trainer):
    """Lightning's Trainer, which also takes its strategy among the plugins, as it once did.

    Arguments that Lightning has renamed are translated; those that have lost their meaning are
    left out with one warning each.
    """

    def __init__(self, *, plugins: Any = None, **kwargs: Any) -> None:
        given = [] if plugins is None else plugins
        given = list(given) if isinstance(given, Iterable) else [given]
        strategies = [plugin for plugin in given if isinstance(plugin, Strategy)]
        if len(strategies) > 1 or (strategies and kwargs.get("strategy") not in (None, "auto")):
            raise ValueError("more than one strategy; give NLPDDPPlugin() alone")
        others = [plugin for plugin in given if not isinstance(plugin, Strategy)]
        if strategies:
            kwargs["strategy"] = strategies[0]
        super().__init__(plugins=others or None, **_translate(kwargs))


def _translate(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Lightning 1.x as those of today's."""
    values = dict(kwargs)
    for name, reason in _NO_MEANING.items():
        if name in values and values.pop(name) is not None:
            warnings.warn(f"trainer.{name} changes nothing: {reason}", stacklevel=3)
    for name, new in _RENAMED.items():
        value = values.pop(name, None)
        if value is not None and new is not None:
            values.setdefault(new, value)
    refresh = values.pop("progress_bar_refresh_rate", None)
    if refresh is not None:
        values.setdefault("enable_progress_bar", refresh > 0)
    if values.get("accelerator") in _STRATEGY_NAMES:
        del values["accelerator"]
    gpus = values.pop("gpus", None)
    if gpus:
        values |= {"accelerator": "gpu", "devices": gpus}
    elif gpus == 0 and values.get("accelerator") is None:
        values["accelerator"] = "cpu"
        values.setdefault("devices", values.pop("num_processes", 1))
    processes = values.pop("num_processes", None)
    if processes is not None:
        values.setdefault("devices", processes)
    if str(values.get("devices", "")) == "None":
        del values["devices"]
    if values.get("accelerator") is None:
        values.pop("accelerator", None)
    return values
