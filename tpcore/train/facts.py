"""What a run was made with: code, packages, devices, ranks; for environment.json."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tpcore import _native
from tpcore.memory import memory_policy
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.train.launch import num_cores
from tpcore.train.run_state import launcher

_PACKAGES = ("numpy", "safetensors", "tokenizers", "omegaconf", "scikit-learn", "triton", "apex")
_GIT_TIMEOUT_S = 10.0


def environment_facts(
    tp: TensorParallelGroup, dp: DataParallelGroup, device: torch.device
) -> dict[str, Any]:
    """Facts about this process, to be written down by one rank."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "launcher": launcher(),
        "host": socket.gethostname(),
        "folder": str(Path.cwd()),
        "git": {
            "tpcore": git_facts(Path(__file__).parents[1]),
            "folder": git_facts(Path.cwd()),
        },
        "versions": {
            "tpcore": _version("tpcore"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            **{name: _version(name) for name in _PACKAGES},
        },
        "platform": platform.platform(),
        "device": device.type,
        "GPUs": [torch.cuda.get_device_name(index) for index in range(num_gpus)],
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "native": {name: _native.status(name).loaded for name in ("cpu", "cuda")},
        "allocator": memory_policy().allocator,
        "tensor_parallel_size": tp.size,
        "data_parallel_size": dp.size,
    }


def git_facts(folder: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside of a repository or without git."""
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                timeout=_GIT_TIMEOUT_S,
                check=True,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "modified": bool(status)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
