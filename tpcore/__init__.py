"""tpcore: tensor-parallel kernels and layers for PyTorch, a Megatron-BERT encoder, a small trainer.

The names below are imported when first used: `import tpcore` needs no GPU and no process group,
and does not even import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpcore import checkpoint, kernels, layers
    from tpcore.memory import keep_freed_memory
    from tpcore.models.bert import BertModel
    from tpcore.models.config import BertConfig
    from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup, init_parallel
    from tpcore.parallel.sharding import sharding_table
    from tpcore.tokenizer import WordPieceTokenizer
    from tpcore.train.run import load_run

# Public name -> the module that it is an attribute of; None: it is a module itself.
_HOMES = {
    "BertConfig": "tpcore.models.config",
    "BertModel": "tpcore.models.bert",
    "DataParallelGroup": "tpcore.parallel.group",
    "TensorParallelGroup": "tpcore.parallel.group",
    "WordPieceTokenizer": "tpcore.tokenizer",
    "checkpoint": None,
    "init_parallel": "tpcore.parallel.group",
    "keep_freed_memory": "tpcore.memory",
    "kernels": None,
    "layers": None,
    "load_run": "tpcore.train.run",
    "sharding_table": "tpcore.parallel.sharding",
}

__all__ = [
    "BertConfig",
    "BertModel",
    "DataParallelGroup",
    "TensorParallelGroup",
    "WordPieceTokenizer",
    "checkpoint",
    "init_parallel",
    "keep_freed_memory",
    "kernels",
    "layers",
    "load_run",
    "sharding_table",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(home), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tpcore")
    except PackageNotFoundError:
        return "unknown (not installed)"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
