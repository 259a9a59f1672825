"""Load, save, inspect and convert checkpoints of the Megatron family and of Hugging Face.

    model = tpcore.checkpoint.load("release/mp_rank_00/model_optim_rng.pt", tp=tp)
    tpcore.checkpoint.save(model, "out", format="huggingface")
    print(tpcore.checkpoint.inspect("out"))

The names below are imported when first used, so that `import tpcore` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpcore.checkpoint.errors import CheckpointError
    from tpcore.checkpoint.formats.nemo import contents as nemo_contents
    from tpcore.checkpoint.info import CheckpointInfo
    from tpcore.checkpoint.io import convert, inspect, load, save
    from tpcore.checkpoint.sharded import load_sharded, save_sharded

_HOMES = {
    "CheckpointError": "tpcore.checkpoint.errors",
    "CheckpointInfo": "tpcore.checkpoint.info",
    "convert": "tpcore.checkpoint.io",
    "inspect": "tpcore.checkpoint.io",
    "load": "tpcore.checkpoint.io",
    "load_sharded": "tpcore.checkpoint.sharded",
    "nemo_contents": "tpcore.checkpoint.formats.nemo",
    "save": "tpcore.checkpoint.io",
    "save_sharded": "tpcore.checkpoint.sharded",
}

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "convert",
    "inspect",
    "load",
    "load_sharded",
    "nemo_contents",
    "save",
    "save_sharded",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name.removeprefix("nemo_"))


def __dir__() -> list[str]:
    return __all__
