"""Where the time of one training step of the encoder goes on the CPU, by torch's profiler.

    python benchmarks/profile_step.py         a table on standard output

Two blocks of BERT-large on 4096 packed tokens with dropout, classification head, forward and
backward, float32. Prints the share of each operator's own time, and fails if an elementwise or
reducing operator of torch takes more than a hundredth of the step: the fused kernels are there so
that none does.
"""

from __future__ import annotations

import os
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from tpcore import memory
from tpcore.models.bert import BertModel
from tpcore.models.config import BertConfig
from tpcore.models.heads import build_head
from tpcore.models.packing import pack_sequences
from tpcore.parallel.group import TensorParallelGroup

LENGTHS = (25, 60, 128, 256, 43) * 8
# Our own, matrix products, allocation, lookup.
NOT_ELEMENTWISE = (
    "tpcore::",
    "aten::addmm",
    "aten::mm",
    "aten::bmm",
    "aten::empty",
    "aten::embedding",
)
LIMIT = 0.01


def main() -> int:
    """Profile, print, and say whether anything is left that should not be."""
    memory.restart_process()
    torch.manual_seed(0)
    tp = TensorParallelGroup.single()
    config = BertConfig(vocab_size=30522, hidden_size=1024, num_layers=2, num_attention_heads=16)
    head = build_head("sequence_classification", config, tp=tp, num_labels=2)
    model = BertModel(config, tp=tp, head=head).train()
    ids = [torch.randint(5, 30000, (length,)).tolist() for length in LENGTHS]
    packed, labels = pack_sequences(ids), torch.arange(len(ids)) % 2

    def step(seed: int) -> None:
        model.zero_grad()
        loss = model.forward_packed(packed, labels, seed=seed).loss
        loss.backward()

    for seed in range(2):
        step(seed)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(2)
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    print(f"{packed.sequences.num_tokens} tokens, {torch.get_num_threads()} threads, ", end="")
    print(f"load average {os.getloadavg()[0]:.2f}, {total / 1e3:.0f} ms\n")
    print("| operator | calls | ms | share |\n|---|---|---|---|")
    left = []
    for event in events:
        name, time_ms = event.key, event.self_cpu_time_total / 1e3
        share = event.self_cpu_time_total / total
        if share >= LIMIT / 10:
            print(f"| {name} | {event.count} | {time_ms:.1f} | {share:.1%} |")
        if share > LIMIT and name.startswith("aten::") and not name.startswith(NOT_ELEMENTWISE):
            left.append(name)
    if left:
        print(f"\nleft to torch: {', '.join(left)}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
