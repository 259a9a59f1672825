"""What stands between the backward and the next forward with bfloat16 weights: one pass or three.

    python -m benchmarks.optimizer [MODEL ...]     of benchmarks/finetune_sides.py; prints a table

"three": gradients to float32, torch's fused AdamW, and main weights to bfloat16. "one": the step of
tpcore on the gradients as they are. Both in turn on one thread, on the same random gradients;
medians and least of the rounds, in milliseconds of the processor.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.finetune_sides import MODELS, VOCABULARY
from tpcore import memory
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.train.config import OptimConfig
from tpcore.train.optimizer import OnePassAdamW, build_optimizer, step_weights
from tpcore.train.precision import PRECISIONS, Weights

ROUNDS = 15


def _milliseconds(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def _weights(model: str) -> Weights:
    sizes = MODELS[model]
    names = {"layers": "num_layers", "hidden": "hidden_size", "heads": "num_attention_heads"}
    config = BertConfig(vocab_size=VOCABULARY, **{name: sizes[key] for key, name in names.items()})
    return Weights(BertModel(config), PRECISIONS["bf16"])


def measure(model: str) -> tuple[list[float], list[float], int]:
    """Milliseconds of three passes, of one, and the number of parameters."""
    weights = _weights(model)
    main = weights.main
    gradients = {n: torch.randn(p.shape).mul_(1e-3).bfloat16() for n, p in main.items()}
    one = build_optimizer(main, OptimConfig(), weights.copies)
    assert isinstance(one, OnePassAdamW)
    plain = torch.optim.AdamW(main.values(), lr=1e-6, fused=True)

    def set_gradients(convert: Callable[[Tensor], Tensor]) -> None:
        for name, parameter in main.items():
            parameter.grad = convert(gradients[name])

    def three_passes() -> None:
        set_gradients(Tensor.float)
        plain.step()
        weights.publish()

    def one_pass() -> None:
        set_gradients(lambda gradient: gradient)
        step_weights(one, weights)

    times: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 2):
        for function, found in zip((three_passes, one_pass), times, strict=True):
            duration_ms = _milliseconds(function)
            weights.zero_gradients()
            if number >= 2:
                found.append(duration_ms)
    return *times, sum(p.numel() for p in main.values())


def main(models: list[str]) -> int:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{ROUNDS} rounds, one thread, load average {os.getloadavg()[0]:.1f}\n")
    print("| model | parameters | three passes: median, least | one pass: median, least |")
    print("|---|---|---|---|")
    for model in models or ["MiniLM-L6"]:
        three, one, count = measure(model)
        cells = [f"{statistics.median(t):.1f}, {min(t):.1f}" for t in (three, one)]
        print(f"| {model} | {count / 1e6:.1f} M | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    memory.restart_process()
    sys.exit(main(sys.argv[1:]))
