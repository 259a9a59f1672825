"""Training and inference from tokens to weights, tpcore beside transformers, case by case.

    python -m benchmarks.finetune --data sst2 --models 345m --dtypes bf16 [--modes train infer]
    python -m benchmarks.finetune --data fixed128 fixed512 --dtypes fp32 --seconds 40
    python -m benchmarks.finetune --clock cpu    on a machine that is not idle: see below
    python -m benchmarks.finetune --missing      only the cases that the table has not: go on
    python -m benchmarks.finetune --table        only write the table and the plot anew

Data: lengths of SST-2, WNUT-17, and windows of 384 tokens of SQuAD (from --folder), in batches of
32, or sequences of one length. A case is one model, data, dtype and mode; every side of it is a
process of its own, and sides take turns until the seconds are over. A pass is a few batches: those
at evenly spaced quantiles of their number of tokens, so that a few stand for all. A training step
is forward, backward and AdamW (fused, on both sides), dropout 0.1; no clipping, no data loading.

Ways of padding: "packed" (tpcore: none), "max" (to 128, or 384 for SQuAD), "dynamic" (to the
longest of a random batch), "grouped" (the same after sorting pools of 50 batches by length, as
`group_by_length` does; inference: everything is sorted, for tpcore too). Only real tokens count.
bf16: tpcore has bfloat16 weights and float32 main weights. Transformers under autocast has float32
weights, gradients and moments: the equal thing. With bfloat16 weights it has nothing in float32:
faster and smaller, and updates below a 256th of a weight are rounded away.

"over_products": the time over that of the matrix products alone, which are done in turn with the
other sides. "percent_of_best": arithmetic of the needed matrix products over that of the best
product of two 2048 x 2048 matrices in the run. With --clock cpu every side has one thread, seconds
are those that the processor spent on it, and the table is one of its own, finetune_*_cpu-clock.
Peaks are those of the side's processes after their first pass over a way; ways with more padding
come later, and have those before them in their peak. Rows are appended to
benchmarks/results/finetune_*.csv; the Markdown and the plot show the latest row of each case.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune_sides import MODELS, VOCABULARY, Case, Example, Ranks, Side, flops
from benchmarks.run import device_name
from tpcore import memory
from tpcore.tokenizer import WordPieceTokenizer

RESULTS = Path(__file__).parent / "results"
TASKS = {
    "sst2": "sequence_classification",
    "wnut17": "token_classification",
    "squad384": "question_answering",
    "fixed128": "sequence_classification",
    "fixed512": "sequence_classification",
}
BATCH, POOL = 32, 50
COLUMNS = (
    "model",
    "data",
    "dtype",
    "mode",
    "side",
    "padding",
    "batches",
    "batch_size",
    "rounds",
    "seconds",
    "optimizer_seconds",
    "tokens_per_s",
    "examples_per_s",
    "tpcore_is_faster_by",
    "over_products",
    "percent_of_best",
    "best_gflops",
    "peak_mib",
    "load_before",
    "load_after",
    "time",
)
KEY = ("model", "data", "dtype", "mode", "side", "padding")


def examples_of(data: str, folder: Path, limit: int = 3200) -> list[Example]:
    """Token ids and a label; random tokens for a fixed length."""
    draw = random.Random(0)
    if data.startswith("fixed"):
        length = int(data.removeprefix("fixed"))
        return [
            ([draw.randrange(1000, VOCABULARY) for _ in range(length)], draw.randrange(2))
            for _ in range(256)
        ]
    tokenizer = WordPieceTokenizer.from_vocab_file(
        str(folder / "vocab" / "bert-base-uncased-vocab.txt")
    )
    if data == "squad384":
        found = list(_squad_windows(folder / "squad2_half" / "answerable-v1.1.json", tokenizer))
        return draw.sample(found, min(limit, len(found)))
    if data == "sst2":
        rows = (folder / "sst2" / "train.tsv").read_text().splitlines()[1:]
        pairs = [row.rsplit("\t", 1) for row in draw.sample(rows, limit)]
        return [(tokenizer.encode(text, max_length=128).ids, int(label)) for text, label in pairs]
    blocks = (folder / "wnut17" / "wnut17train.conll").read_text().split("\n\n")
    texts = [" ".join(line.split("\t")[0] for line in b.splitlines()) for b in blocks if b.strip()]
    ids = [tokenizer.encode(text, max_length=128).ids for text in texts]
    labels = [[-100, *(draw.randrange(13) for _ in i[2:]), -100] for i in ids]
    return draw.sample(list(zip(ids, labels, strict=True)), min(limit, len(ids)))


def _squad_windows(path: Path, tokenizer: Any, length: int = 384) -> Iterator[Example]:
    articles = json.loads(path.read_text())["data"]
    for paragraph in (p for article in articles for p in article["paragraphs"]):
        context = tokenizer.encode(paragraph["context"]).ids
        for entry in paragraph["qas"][:3]:
            question = tokenizer.encode(entry["question"]).ids[:64]
            room = length - len(question) - 1
            for start in range(1, max(2, len(context) - 1 - room + 128), max(1, room - 128)):
                window = context[start : start + room]
                window = [*window[:-1], context[-1]] if window[-1] != context[-1] else window
                yield [*question, *window], (len(question), len(question) + 1)


def ways_of(
    examples: list[Example], train: bool, count: int, size: int
) -> dict[str, list[list[Example]]]:
    """The batches of a pass, by the way of padding."""
    shuffled = random.Random(1).sample(examples, len(examples))

    def cut(rows: list[Example]) -> list[list[Example]]:
        return [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]

    pools = [shuffled[i : i + POOL * size] for i in range(0, len(shuffled), POOL * size)]
    grouped = [b for pool in pools for b in cut(sorted(pool, key=lambda e: -len(e[0])))]
    if not train:
        grouped = cut(sorted(examples, key=lambda e: -len(e[0])))
    plain = _at_quantiles(cut(shuffled), count)
    sorted_ = _at_quantiles(grouped, count)
    packed = plain if train else sorted_
    return {"packed": packed, "grouped": sorted_, "dynamic": plain, "max": plain}


def _at_quantiles(batches: list[list[Example]], count: int) -> list[list[Example]]:
    ordered = sorted(batches, key=lambda b: sum(len(ids) for ids, _ in b))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def sides_of(options: argparse.Namespace, dtype: str) -> list[Side]:
    """tpcore at its sizes, the products, and the peers."""
    sides = [Side("tpcore", size) for size in options.tp] + [Side("floor")]
    for peer in options.peers:
        kind, attention, *rest = peer.split("-")
        own = [p for p in options.bf16_peers if p in rest] or options.bf16_peers
        precisions = own if dtype == "bf16" else ["pure"]
        for precision in precisions:
            side = Side(kind, 1, attention, "compile" in rest, precision == "autocast")
            sides.append(side)
    return sides


def turns_of(options: argparse.Namespace, sides: list[Side], data: str) -> list[tuple[Side, str]]:
    """Which side pads in which way: each of these becomes a row."""
    turns = []
    for side in sides:
        ways = ["packed"] if side.kind in ("tpcore", "floor") else options.padding
        if data.startswith("fixed") and side.kind not in ("tpcore", "floor"):
            ways = ["dynamic"]
        turns += [(side, way) for way in ways]
    return turns


def is_measured(options: argparse.Namespace, model: str, data: str, dtype: str, mode: str) -> bool:
    """Whether the table has every row of a case."""
    path = target(options)
    if not path.exists():
        return False
    rows = {tuple(row[name] for name in KEY) for row in latest(path)}
    turns = turns_of(options, sides_of(options, dtype), data)
    return all((model, data, dtype, mode, side.name, way) in rows for side, way in turns)


def measure(options: argparse.Namespace, case: Case, data: str, count: int) -> list[dict]:
    """The rows of one case."""
    sides = sides_of(options, case.dtype)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        ranks = {
            side: Ranks(side, case, options.threads, options.clock, f"{folder}/{i}")
            for i, side in enumerate(sides)
        }
        for group in ranks.values():
            group.answers()  # all are ready
        turns = turns_of(options, sides, data)
        for side in sides:  # the first step makes the optimizer's state
            ranks[side].ask(
                "pass",
                "packed"
                if side.size > 1 or side.kind in ("tpcore", "floor")
                else turns[[t[0] for t in turns].index(side)][1],
                0,
                1,
            )
        times: dict[tuple[Side, str], list[tuple[float, float]]] = {turn: [] for turn in turns}
        best: list[float] = []
        peaks: dict[tuple[Side, str], float] = {}
        end = time.monotonic() + options.seconds
        while not best or (time.monotonic() < end and len(best) < 3 * options.max_rounds):
            for side, way in turns:
                if side.kind == "floor":
                    best += [ranks[side].ask("pass", "best", 0, 0)[0][0] for _ in range(3)]
                found = ranks[side].ask("pass", way, 0, count)
                times[side, way].append(max(found))
                if (side, way) not in peaks:
                    peaks[side, way] = sum(ranks[side].ask("memory"))
        for group in ranks.values():
            group.close()
    floor = statistics.median(
        t for t, _ in next(v for k, v in times.items() if "floor" in k[0].kind)
    )
    rate = max(best)
    floor += flops(case, "packed")[1] / rate
    rows = []
    for (side, way), found in times.items():
        seconds = statistics.median(t for t, _ in found)
        if side.kind == "floor":
            seconds = floor
        of_optimizer = statistics.median(o for _, o in found)
        row = {
            "model": case.model,
            "data": data,
            "dtype": case.dtype,
            "mode": "train" if case.train else "infer",
            "side": side.name,
            "padding": way,
            "batches": count,
            "batch_size": len(case.batches[way][0]),
            "rounds": len(found),
            "seconds": seconds,
            "optimizer_seconds": of_optimizer,
            "tokens_per_s": case.tokens(way) / seconds,
            "examples_per_s": case.examples(way) / seconds,
            "over_products": seconds / floor * case.tokens("packed") / case.tokens(way),
            "percent_of_best": 100 * flops(case, way)[0] / seconds / rate,
            "best_gflops": rate / 1e9,
            "peak_mib": peaks[side, way],
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        }
        rows.append(row)
        ours = rows[0]["tokens_per_s"]
        row["tpcore_is_faster_by"] = ours / row["tokens_per_s"]
    return rows


def target(options: argparse.Namespace) -> Path:
    cpu = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    return RESULTS / f"finetune_{cpu}{'_cpu-clock' if options.clock == 'cpu' else ''}.csv"


def append(rows: list[dict], path: Path) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def latest(path: Path) -> list[dict[str, str]]:
    """The last row of each case, in the order of first appearance."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rows[tuple(row[name] for name in KEY)] = row
    return list(rows.values())


def write_table(path: Path) -> None:
    rows = latest(path)
    lines = [
        f"# Steps and inference on {device_name()}",
        "",
        f"torch {torch.__version__}; CPU memory: {memory.memory_policy()}. What is measured stands "
        "in benchmarks/finetune.py.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(row[c] for c in COLUMNS) + " |" for row in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(f"wrote {path.with_suffix('.md')}")
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        name = f"{row['model']}, {row['data']}\n{row['dtype']}, {row['mode']}"
        cases.setdefault(name, []).append(row)
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(8, 1 + 1.6 * len(cases)), squeeze=False)
    for axis, (name, members) in zip(axes[:, 0], cases.items(), strict=True):
        names = [f"{row['side']}, {row['padding']}" for row in members]
        colors = ["C0" if row["side"].startswith("tpcore") else "0.7" for row in members]
        axis.barh(names, [float(row["tokens_per_s"]) for row in members], color=colors)
        axis.invert_yaxis()
        axis.set_title(name.replace("\n", ", "), fontsize=8)
        axis.tick_params(labelsize=6)
    axes[-1, 0].set_xlabel("real tokens per second")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(f"wrote {path.with_suffix('.png')}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--models", nargs="+", default=["MiniLM-L6", "345m"], choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument(
        "--modes", nargs="+", default=["train", "infer"], choices=["train", "infer"]
    )
    parser.add_argument("--tp", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--peers",
        nargs="*",
        default=["MegatronBert-eager", "Bert-sdpa"],
        help="class of transformers, attention; perhaps compile, autocast, pure: Bert-sdpa-compile",
    )
    parser.add_argument("--bf16-peers", nargs="+", default=["autocast", "pure"])
    parser.add_argument(
        "--padding",
        nargs="+",
        default=["grouped", "dynamic", "max"],
        choices=["grouped", "dynamic", "max"],
    )
    parser.add_argument("--batches", type=int, default=2, help="of a pass")
    parser.add_argument(
        "--batch-size", type=int, help=f"default {BATCH}; fixed lengths: 1024 tokens"
    )
    parser.add_argument("--seconds", type=float, default=40, help="of a case, rounds are not cut")
    parser.add_argument("--max-rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: one thread, its own seconds"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parents[2] / "shared" / "data"
    )
    parser.add_argument(
        "--missing", action="store_true", help="leave out cases that the table has already"
    )
    parser.add_argument("--print", action="store_true", help="print only, write nothing")
    parser.add_argument(
        "--table", action="store_true", help="write table and plot, measure nothing"
    )
    options = parser.parse_args(arguments)
    if options.clock == "cpu":
        options.threads = 1
        torch.set_num_threads(1)
    if options.table:
        write_table(target(options))
        return 0
    for data in options.data:
        examples = examples_of(data, options.folder)
        size = options.batch_size or BATCH
        count = options.batches
        max_length = 384 if data == "squad384" else 128
        if data.startswith("fixed"):
            max_length, count = int(data.removeprefix("fixed")), 1
            size = options.batch_size or 1024 // max_length
        for model in options.models:
            for dtype in options.dtypes:
                for mode in options.modes:
                    if options.missing and is_measured(options, model, data, dtype, mode):
                        continue
                    ways = ways_of(examples, mode == "train", count, size)
                    case = Case(model, TASKS[data], dtype, mode == "train", max_length, ways)
                    rows = measure(options, case, data, count)
                    for row in rows:
                        print(
                            {
                                k: f"{v:.4g}" if isinstance(v, float) else v
                                for k, v in row.items()
                                if k not in KEY[:4] and k != "time"
                            },
                            flush=True,
                        )
                    if not options.print:
                        append(rows, target(options))
    if not options.print:
        write_table(target(options))
    return 0


if __name__ == "__main__":
    memory.restart_process()
    sys.exit(main())
