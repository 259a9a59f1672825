"""What `tpcore plan` predicts for this CPU beside what a step takes here, and the errors.

    python benchmarks/plan_errors.py [--rounds 5]       a table under benchmarks/results/

Speeds of the device are measured by `tpcore.train.measure`, as the command does, right before the
steps. A step: forward and backward of the encoder in training on packed sequences, and AdamW. The
rows of size 2 are those that benchmarks/encoder_sizes.py has measured, with the link speed that
benchmarks/collectives.py has; their machine was not idle.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.measure import Table, results_folder  # noqa: E402 - after the path
from tpcore import memory  # noqa: E402
from tpcore.models.bert import BertModel  # noqa: E402
from tpcore.models.config import BertConfig  # noqa: E402
from tpcore.models.cost import Device, Layout, step_time  # noqa: E402
from tpcore.models.packing import pack_sequences  # noqa: E402
from tpcore.train import measure  # noqa: E402

# layers, hidden size, heads, lengths, precision
CASES = (
    (6, 384, 12, (25, 60, 128, 40) * 8, "32"),
    (6, 384, 12, (25, 60, 128, 40) * 8, "bf16-mixed"),
    (4, 768, 12, (25, 60, 128, 256, 43) * 2, "32"),
    (4, 768, 12, (25, 60, 128, 256, 43) * 2, "bf16-mixed"),
    (2, 1024, 16, (128,) * 8, "32"),
    (2, 1024, 16, (128,) * 8, "bf16-mixed"),
)
SIZES_CASE = (4, 768, 12, (25, 60, 128, 256, 43) * 2, "32")
COLUMNS = (
    "model",
    "precision",
    "tokens",
    "tp",
    "products_ms",
    "kernels_ms",
    "collectives_ms",
    "optimizer_ms",
    "predicted_ms",
    "measured_ms",
    "predicted_over_measured",
)


def _config(layers: int, hidden: int, heads: int) -> BertConfig:
    return BertConfig(
        vocab_size=30522, hidden_size=hidden, num_layers=layers, num_attention_heads=heads
    )


def _row(case: tuple, device: Device, measured_s: float, tp: int = 1) -> dict:
    layers, hidden, heads, lengths, precision = case
    layout = Layout(
        tokens=sum(lengths),
        mean_keys=sum(n * n for n in lengths) / sum(lengths),
        tensor_parallel_size=tp,
        precision=precision,
    )
    predicted = step_time(_config(layers, hidden, heads), layout, device)
    return {
        "model": f"{layers} layers, h {hidden}",
        "precision": precision,
        "tokens": layout.tokens,
        "tp": tp,
        "products_ms": 1e3 * predicted.products_s,
        "kernels_ms": 1e3 * predicted.kernels_s,
        "collectives_ms": 1e3 * predicted.collectives_s,
        "optimizer_ms": 1e3 * predicted.optimizer_s,
        "predicted_ms": 1e3 * predicted.total_s,
        "measured_ms": 1e3 * measured_s,
        "predicted_over_measured": predicted.total_s / measured_s,
    }


def _measured_s(case: tuple, rounds: int) -> float:
    layers, hidden, heads, lengths, precision = case
    torch.manual_seed(0)
    model = BertModel(_config(layers, hidden, heads)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    packed = pack_sequences([torch.randint(5, 30000, (n,)).tolist() for n in lengths])
    times = []
    for seed in range(rounds + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            output = model.forward_packed(packed, seed=seed).pooler_output
        output.float().square().sum().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _committed(name: str) -> list[dict]:
    files = sorted((HERE / "results").glob(f"{name}_*.csv"))
    return list(csv.DictReader(files[-1].open())) if files else []


def main() -> int:
    """Measure, compare, write; fails if a prediction for one rank is off by more than a half."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    memory.restart_process()
    table = Table(results_folder(), "plan_errors", COLUMNS, "cpu")
    sent = [r for r in _committed("collectives") if r["collective"] == "all_reduce"]
    largest = max(sent, key=lambda row: int(row["bytes"]))
    # An all-reduce of two ranks moves each byte once to the other one and back.
    link = float(largest["bytes"]) / float(largest["tpcore_median_us"]) * 1e6
    latency = min(float(row["tpcore_median_us"]) for row in sent) * 1e-6 / 2
    notes = []

    def device(precision: str) -> Device:
        dtype = torch.float32 if precision == "32" else torch.bfloat16
        found = Device(
            matrix_flops_per_s=measure.matrix_flops_per_s("cpu", dtype),
            copy_bytes_per_s=measure.copy_bytes_per_s("cpu"),
            memory_bytes=measure.memory_bytes("cpu"),
            link_bytes_per_s=link,
            link_latency_s=latency,
        )
        notes.append(
            f"{precision}, {torch.get_num_threads()} thread(s): "
            f"{found.matrix_flops_per_s / 1e9:.0f} GFLOP/s, copy "
            f"{found.copy_bytes_per_s / 1e9:.1f} GB/s, link {link / 1e9:.1f} GB/s"
        )
        return found

    for case in CASES:
        row = _row(case, device(case[-1]), _measured_s(case, options.rounds))
        table.add([row])
        print(row, flush=True)
    torch.set_num_threads(1)
    for found in _committed("encoder_sizes"):
        if found["size"] == "2" and found["transport"] == "shared memory":
            row = _row(SIZES_CASE, device("32"), float(found["median_ms"]) / 1e3, tp=2)
            table.add([row])
            print(row, flush=True)
    table.finish(notes)
    ratios = [row["predicted_over_measured"] for row in table.rows if row["tp"] == 1]
    return 0 if all(0.5 < ratio < 1.5 for ratio in ratios) else 1


if __name__ == "__main__":
    sys.exit(main())
