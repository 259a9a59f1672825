"""Run as a program: makes a checkpoint of the 345m size, or loads one and reports memory and time.

python -m tests.checkpoint.large make FOLDER [LAYERS]
python -m tests.checkpoint.large load PATH SIZE
python -m tests.checkpoint.large convert PATH DESTINATION FORMAT SIZE
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch

HIDDEN, LAYERS, HEADS, POSITIONS, ROWS = 1024, 24, 16, 512, 30592


def shapes(num_layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Megatron's names, flat, with their shapes."""
    h, f = HIDDEN, 4 * HIDDEN
    model = {
        "language_model.embedding.word_embeddings.weight": (ROWS, h),
        "language_model.embedding.position_embeddings.weight": (POSITIONS, h),
        "language_model.embedding.tokentype_embeddings.weight": (2, h),
    }
    layer = {
        "input_layernorm": (h,),
        "attention.query_key_value": (3 * h, h),
        "attention.dense": (h, h),
        "post_attention_layernorm": (h,),
        "mlp.dense_h_to_4h": (f, h),
        "mlp.dense_4h_to_h": (h, f),
    }
    parts = {
        f"language_model.transformer.layers.{i}.{name}": shape
        for i in range(num_layers)
        for name, shape in layer.items()
    }
    parts |= {
        "language_model.transformer.final_layernorm": (h,),
        "language_model.pooler.dense": (h, h),
        "lm_head.dense": (h, h),
        "lm_head.layernorm": (h,),
        "binary_head": (2, h),
    }
    for name, shape in parts.items():
        model |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {**model, "lm_head.bias": (ROWS,)}


def make(folder: Path, num_layers: int = LAYERS) -> None:
    """A release directory with random weights: no version, as the released file."""
    model = {
        name: torch.empty(shape).uniform_(-0.1, 0.1) for name, shape in shapes(num_layers).items()
    }
    file = folder / "release" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    args = argparse.Namespace(num_attention_heads=HEADS)
    torch.save({"iteration": 0, "model": model, "args": args}, file)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(key))


def _measured(action) -> tuple[object, dict[str, float]]:
    """What an action returns, with its peak memory above what was there before, and its time."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    return result, {"peak_bytes": _status("VmHWM") - before, "seconds": seconds}


def main(argv: list[str]) -> None:
    command, path = argv[0], Path(argv[1])
    if command == "make":
        make(path, *map(int, argv[2:]))
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tests.checkpoint import golden
    from tpcore import checkpoint
    from tpcore.parallel.group import TensorParallelGroup

    # Whatever the first use of the library allocates once and for all is not the checkpoint's.
    checkpoint.load(golden.COMMITTED / "v1.0_tp1" / "ckpt")
    if command == "load":
        # No communication takes place while loading, so one process can stand for its group.
        size = int(argv[2])
        dist.init_process_group("fake", store=FakeStore(), rank=size - 1, world_size=size)
        tp = TensorParallelGroup(dist.group.WORLD, rank=size - 1, size=size)
        model, report = _measured(lambda: checkpoint.load(path, tp=tp, gelu="tanh"))
        tensors = list(model.state_dict().values())
        report["own_bytes"] = sum(t.numel() * t.element_size() for t in tensors)
        report["largest_bytes"] = 4 * ROWS * HIDDEN
    else:
        _, report = _measured(
            lambda: checkpoint.convert(path, argv[2], to=argv[3], tensor_parallel_size=int(argv[4]))
        )
        report["largest_bytes"] = 4 * ROWS * HIDDEN
        report["model_bytes"] = sum(file.stat().st_size for file in path.rglob("*.pt"))
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
