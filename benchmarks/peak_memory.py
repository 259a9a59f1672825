"""Peak resident memory of one step, tpcore beside transformers, each in a process of its own.

    python benchmarks/peak_memory.py [--memory-policy system]    a table under benchmarks/results/
    python benchmarks/peak_memory.py --steps 345m                whole training steps: another table

An encoder of 6 layers, hidden size 768, without head: forward and backward in training (dropout
0.1), or forward alone under inference mode. Both sides get the same real tokens; transformers
(BertModel, SDPA attention) gets them padded to the longest of the batch. `above_start` leaves out
what Python, torch and the imports take: weights, gradients, activations and temporaries are left.

With --steps: three steps with AdamW of a model of benchmarks/finetune.py in bfloat16 on one batch
of 32 texts, tpcore beside transformers' Bert under autocast and with bfloat16 weights alone. On a
processor without bfloat16 instructions a step of 345m takes minutes; its memory is the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

LENGTHS = {"128": (128,) * 16, "real": (12, 25, 31, 40, 43, 60, 77, 128) * 4}
SIZES = {"num_layers": 6, "hidden_size": 768, "num_attention_heads": 12}
COLUMNS = (
    "lengths",
    "precision",
    "step",
    "memory_policy",
    "tpcore_mib",
    "transformers_mib",
    "tpcore_above_start_mib",
    "transformers_above_start_mib",
    "above_start_over_transformers",
)
STEP_COLUMNS = (
    "model",
    "data",
    "side",
    "tokens",
    "memory_policy",
    "start_mib",
    "peak_mib",
    "above_start_mib",
)
SIDES = ("tpcore", "autocast", "bf16 weights")
DATA = HERE.parents[1] / "shared" / "data"


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def child(side: str, lengths: tuple[int, ...], precision: str, step: str) -> dict:
    """One step; bytes before the model is built, and at the peak."""
    import torch

    from tpcore import memory

    memory.restart_process()
    torch.manual_seed(0)
    train = step == "training"
    if side == "tpcore":
        from tpcore.models.bert import BertModel
        from tpcore.models.config import BertConfig
        from tpcore.models.packing import pack_sequences

        start = _resident_bytes()
        model = BertModel(BertConfig(vocab_size=30522, **SIZES))
        packed = pack_sequences([[7] * n for n in lengths])

        def forward() -> torch.Tensor:
            return model.forward_packed(packed, seed=1).last_hidden_state
    else:
        import transformers

        start = _resident_bytes()
        names = {"num_hidden_layers": SIZES["num_layers"], "intermediate_size": 3072}
        config = transformers.BertConfig(
            **(SIZES | names), vocab_size=30522, attn_implementation="sdpa"
        )
        model = transformers.BertModel(config)
        columns = torch.arange(max(lengths))
        mask = (columns < torch.tensor(lengths)[:, None]).long()

        def forward() -> torch.Tensor:
            return model(input_ids=7 * mask, attention_mask=mask).last_hidden_state

    model.train(train)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    for _ in range(2):
        with torch.inference_mode(not train), autocast:
            output = forward()
        if train:
            output.sum().backward()
        del output
        model.zero_grad()
    return {"start": start, "peak": memory.peak_memory_bytes()}


def steps_child(side: str, model: str, data: str) -> dict:
    """Three training steps; bytes before the model is built, and at the peak."""
    import transformers  # noqa: F401 - both sides have its imports

    from benchmarks import finetune, finetune_sides
    from tpcore import memory
    from tpcore.parallel.group import TensorParallelGroup

    memory.restart_process()
    ways = finetune.ways_of(finetune.examples_of(data, DATA), True, 1, 32)
    case = finetune.Case(model, finetune.TASKS[data], "bf16", True, 128, ways)
    start = _resident_bytes()
    if side == "tpcore":
        way, run = "packed", finetune_sides._tpcore(case, TensorParallelGroup.single())
    else:
        peer = finetune.Side("Bert", 1, "sdpa", autocast=side == "autocast")
        way, run = "grouped", finetune_sides._transformers(case, peer)
    for _ in range(3):
        run(way, 0, 1)
    return {"start": start, "peak": memory.peak_memory_bytes(), "tokens": case.tokens(way)}


def measure_steps(models: list[str], data: str, policy: str) -> int:
    """The table of --steps; fails if tpcore needs more than autocast anywhere."""
    from benchmarks.measure import Table, results_folder

    table = Table(results_folder(), "peak_memory_steps", STEP_COLUMNS, "cpu")
    peaks = {}
    for model, side in itertools.product(models, SIDES):
        found = _measured("--steps-child", policy, side, model, data)
        peaks[model, side] = found["peak"]
        row = {
            "model": model,
            "data": data,
            "side": side,
            "tokens": found["tokens"],
            "memory_policy": policy,
            "start_mib": found["start"] / 2**20,
            "peak_mib": found["peak"] / 2**20,
            "above_start_mib": (found["peak"] - found["start"]) / 2**20,
        }
        table.add([row])
        print(row, flush=True)
    table.finish(["bfloat16; three steps with AdamW on one batch of 32 texts"])
    return 0 if all(peaks[m, "tpcore"] < peaks[m, "autocast"] for m in models) else 1


def _measured(kind: str, policy: str, *case: str) -> dict:
    command = [sys.executable, __file__, kind, *case]
    environment = os.environ | ({"TPCORE_MEMORY_POLICY": policy} if policy == "system" else {})
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> int:
    """Measure and write; fails if tpcore needs more anywhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=4, metavar=("SIDE", "LENGTHS", "PRECISION", "STEP"))
    parser.add_argument("--memory-policy", choices=["tpcore's", "system"], default="tpcore's")
    parser.add_argument("--steps", nargs="+", metavar="MODEL")
    parser.add_argument("--steps-child", nargs=3, metavar=("SIDE", "MODEL", "DATA"))
    parser.add_argument("--data", default="sst2")
    options = parser.parse_args()
    if options.steps_child:
        print(json.dumps(steps_child(*options.steps_child)))
        return 0
    if options.steps:
        return measure_steps(options.steps, options.data, options.memory_policy)
    if options.child:
        side, lengths, precision, step = options.child
        print(json.dumps(child(side, LENGTHS[lengths], precision, step)))
        return 0
    from benchmarks.measure import Table, results_folder

    table = Table(results_folder(), "peak_memory", COLUMNS, "cpu")
    cases = itertools.product(LENGTHS, ("32", "bf16-mixed"), ("training", "inference"))
    policy = options.memory_policy
    for case in cases:
        found = {
            side: _measured("--child", policy, side, *case) for side in ("tpcore", "transformers")
        }
        peak = {side: facts["peak"] / 2**20 for side, facts in found.items()}
        above = {s: (facts["peak"] - facts["start"]) / 2**20 for s, facts in found.items()}
        row = {
            "lengths": case[0],
            "precision": case[1],
            "step": case[2],
            "memory_policy": policy,
            "tpcore_mib": peak["tpcore"],
            "transformers_mib": peak["transformers"],
            "tpcore_above_start_mib": above["tpcore"],
            "transformers_above_start_mib": above["transformers"],
            "above_start_over_transformers": above["tpcore"] / above["transformers"],
        }
        table.add([row])
        print(row, flush=True)
    table.finish(
        [f"encoder: {SIZES}; lengths: { {k: sorted(set(v)) for k, v in LENGTHS.items()} }"]
    )
    return 0 if all(row["above_start_over_transformers"] < 1 for row in table.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
