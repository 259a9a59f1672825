"""One training step of the encoder at several tensor-parallel sizes, with the same total threads.

    python benchmarks/encoder_sizes.py [--total-threads 2] [--sizes 1 2 4] [--rounds 15]
    python benchmarks/encoder_sizes.py --profile 2      what a rank of size 2 does beyond size 1

Every rank is a process of its own; a size has total-threads / size threads each, at least one (a
configuration with more threads than there are processors is marked: they share cores). Collectives
go through shared memory and, beside it, through gloo. All configurations are started first and wait
in the kernel; then they take turns, one step each in every round, and the slowest rank counts. What
is reported is the median over the rounds of time / time of size 1 in the same round: other work on
the machine slows neighbours in time alike.

A step: forward and backward of a BERT encoder with a classification head and dropout 0.1 on packed
sequences, and one step of AdamW; float32.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.run import device_name  # noqa: E402 - after the path
from tpcore import memory  # noqa: E402
from tpcore.models.bert import BertModel  # noqa: E402
from tpcore.models.config import BertConfig  # noqa: E402
from tpcore.models.heads import build_head  # noqa: E402
from tpcore.models.packing import pack_sequences  # noqa: E402
from tpcore.parallel.group import TensorParallelGroup  # noqa: E402
from tpcore.parallel.shared_memory import channel_of  # noqa: E402

LENGTHS = (25, 60, 128, 256, 43)
COLUMNS = (
    "size",
    "transport",
    "threads_per_rank",
    "shares_cores",
    "median_ms",
    "min_ms",
    "over_size_1_median",
    "over_size_1_min",
    "tokens_per_s",
    "load_average",
)


@dataclass(frozen=True)
class Setup:
    """One configuration: a tensor-parallel size and what its collectives go through."""

    size: int
    transport: str
    threads: int


class Stepper:
    """The model of one rank, and its next step."""

    def __init__(self, setup: Setup, options: argparse.Namespace, tp: TensorParallelGroup) -> None:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=30522,
            hidden_size=options.hidden,
            num_layers=options.layers,
            num_attention_heads=options.heads,
        )
        head = build_head("sequence_classification", config, tp=tp, num_labels=2)
        self.model = BertModel(
            config, tp=tp, head=head, sequence_parallel=options.sequence_parallel
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        lengths = LENGTHS * max(1, options.tokens // sum(LENGTHS))
        ids = [torch.randint(5, 30000, (length,)).tolist() for length in lengths]
        self.packed, self.labels = pack_sequences(ids), torch.arange(len(ids)) % 2
        self.seed = 0

    def step(self) -> float:
        """Seconds of one step."""
        self.seed += 1
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model.forward_packed(self.packed, self.labels, seed=self.seed).loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def run_rank(
    connection: Connection, store: str, rank: int, setup: Setup, options: argparse.Namespace
) -> None:
    """The life of one rank: a step for each message, until one that says stop."""
    torch.set_num_threads(setup.threads)
    tp = TensorParallelGroup.single()
    if setup.size > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=setup.size
        )
        shared = setup.transport == "shared memory"
        tp = TensorParallelGroup.from_process_group(dist.group.WORLD, shared_memory=shared)
        assert (channel_of(tp) is not None) == shared
    stepper = Stepper(setup, options, tp)
    connection.send(stepper.packed.sequences.num_tokens)
    while (message := connection.recv()) != "stop":
        if message == "profile":
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                stepper.step()
            events = [
                (e.key, e.count, e.self_cpu_time_total / 1e3) for e in recorded.key_averages()
            ]
            connection.send(events)
        else:
            connection.send(stepper.step())
    if setup.size > 1:
        dist.destroy_process_group()


class Ranks:
    """The processes of one configuration."""

    def __init__(self, setup: Setup, options: argparse.Namespace, store: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(setup.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(theirs, store, rank, setup, options))
            process.start()
            self.connections.append(ours)
            self.processes.append(process)
        self.num_tokens = self._answers()[0]

    def ask(self, message: str) -> list:
        """What every rank answers."""
        for connection in self.connections:
            connection.send(message)
        return self._answers()

    def close(self) -> None:
        for connection in self.connections:
            connection.send("stop")
        for process in self.processes:
            process.join()

    def _answers(self) -> list:
        return [connection.recv() for connection in self.connections]


def setups(options: argparse.Namespace) -> list[Setup]:
    """Size 1 first, to which the others are compared."""
    chosen = []
    for size in sorted({1, *options.sizes}):
        threads = max(1, options.total_threads // size)
        transports = ["none"] if size == 1 else options.transports
        chosen += [Setup(size, transport, threads) for transport in transports]
    return chosen


def measure(options: argparse.Namespace) -> list[dict]:
    """One row for each configuration."""
    chosen = setups(options)
    with tempfile.TemporaryDirectory() as folder:
        every = [Ranks(s, options, f"{folder}/store{i}") for i, s in enumerate(chosen)]
        for _ in range(options.warmup):
            for ranks in every:
                ranks.ask("step")
        loads, seconds = [], [[] for _ in every]
        for _ in range(options.rounds):
            for ranks, own in zip(every, seconds, strict=True):
                own.append(max(ranks.ask("step")))
            loads.append(os.getloadavg()[0])
        for ranks in every:
            ranks.close()
    rows = []
    for setup, own, ranks in zip(chosen, seconds, every, strict=True):
        paired = [a / b for a, b in zip(own, seconds[0], strict=True)]
        rows.append(
            {
                "size": setup.size,
                "transport": setup.transport,
                "threads_per_rank": setup.threads,
                "shares_cores": setup.size * setup.threads > (os.cpu_count() or 1),
                "median_ms": 1e3 * statistics.median(own),
                "min_ms": 1e3 * min(own),
                "over_size_1_median": statistics.median(paired),
                "over_size_1_min": min(own) / min(seconds[0]),
                "tokens_per_s": ranks.num_tokens / statistics.median(own),
                "load_average": statistics.median(loads),
            }
        )
    return rows


def compare_profiles(options: argparse.Namespace) -> None:
    """Print operators' own time of rank 0, at size 1 and at another size, side by side."""
    options.sizes, options.transports = [options.profile], ["shared memory"]
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for number, setup in enumerate(setups(options)):
            ranks = Ranks(setup, options, f"{folder}/store{number}")
            for _ in range(options.warmup):
                ranks.ask("step")
            tables.append({key: (count, ms) for key, count, ms in ranks.ask("profile")[0]})
            ranks.close()
    alone, split = tables
    print(f"| operator | calls | ms at size 1 | calls | ms at size {options.profile} | more |")
    print("|---|---|---|---|---|---|")

    def more(key: str) -> float:
        return split.get(key, (0, 0.0))[1] - alone.get(key, (0, 0.0))[1]

    for key in sorted(alone.keys() | split.keys(), key=more, reverse=True):
        (calls, ms), (own_calls, own_ms) = alone.get(key, (0, 0.0)), split.get(key, (0, 0.0))
        if max(ms, own_ms) >= 0.2:
            print(f"| {key} | {calls} | {ms:.1f} | {own_calls} | {own_ms:.1f} | {more(key):+.1f} |")
    print(f"| all | | {sum(m for _, m in alone.values()):.1f} | | ", end="")
    print(f"{sum(m for _, m in split.values()):.1f} | |")


def line_of(row: dict) -> str:
    shown = [f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]
    return "| " + " | ".join(shown) + " |"


def write(rows: list[dict], options: argparse.Namespace) -> None:
    cpu = device_name().rsplit(",", 1)[0] + f", {os.cpu_count()} processors"
    date = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
    target = HERE / "results" / f"encoder_sizes_{slug}_{options.total_threads}-threads_{date}"
    target.parent.mkdir(exist_ok=True)
    crowded = any(row["shares_cores"] for row in rows)
    facts = (
        f"torch {torch.__version__}, {date}; {options.layers} layers, hidden size "
        f"{options.hidden}, {options.heads} heads, packed lengths {LENGTHS} repeated to about "
        f"{options.tokens} tokens"
        f"{', sequence-parallel' if options.sequence_parallel else ''}; "
        f"{options.total_threads} threads in all"
        f"{', MORE THAN THE PROCESSORS, which they take turns on' if crowded else ''}; "
        f"{options.rounds} rounds. CPU memory: "
        f"{memory.memory_policy()}. `over_size_1`: time over that of size 1, median of the ratios "
        "of each round and ratio of the minima. What is measured stands in "
        "benchmarks/encoder_sizes.py."
    )
    header = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    table = "\n".join([*header, *map(line_of, rows)])
    target.with_suffix(".md").write_text(
        f"# A step of the encoder by tensor-parallel size, on {cpu}\n\n{facts}\n\n{table}\n"
    )
    with target.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {target}.md and .csv")


def main() -> None:
    memory.restart_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--total-threads", type=int, default=os.cpu_count())
    parser.add_argument("--transports", nargs="+", default=["shared memory", "gloo"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--profile", type=int, metavar="SIZE", help="compare profiles; no table")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    if options.profile:
        compare_profiles(options)
        return
    rows = measure(options)
    print("| " + " | ".join(COLUMNS) + " |")
    print("\n".join(map(line_of, rows)))
    if not options.no_write:
        write(rows, options)


if __name__ == "__main__":
    main()
