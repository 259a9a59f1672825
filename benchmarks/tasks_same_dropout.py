"""Whether tpcore's training and transformers' are one program: both with the same dropout bits.

    python -m benchmarks.tasks_same_dropout DATA_FOLDER [--only chemprot,stsb,squad2_half]
        [--seeds 1] [--rows 480] [--dropout 0] [--twin] [--results RUNS.jsonl]

The cases and settings are those of `tasks.py --short`. There each side draws its own dropout bits,
so that the two sides differ as two seeds do. Here every dropout of transformers' model (embedding,
attention probabilities, attention output, MLP output, head) takes the bits that tpcore takes for
the same step, place in the model, token and head, and all that is left is rounding: the loss of
every step must agree, until rounding has grown. How fast it grows shows `--twin`: transformers
against itself, with the same bits, and 3 examples padded to one length instead of 8.

Each case is one line of RUNS.jsonl with the losses of all steps. `--dropout 0` trains without.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from benchmarks.run import device_name
from benchmarks.tasks import (
    CASES,
    CHUNK,
    Peer,
    Place,
    evaluate_peer,
    settings_of,
    train_peer,
)
from tpcore._native import attention_dropout_keep_mask, dropout_keep_mask
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.random import Site, dropout_stream, step_seed
from tpcore.train.finetune import finetune
from tpcore.train.logging import METRICS_FILE
from tpcore.train.prepare import build_model, prepare
from tpcore.train.read_config import load_config

EARLY_STEPS = 20
TWIN_CHUNK = 3
ATTENTION = "tpcore_dropout"


class KeyedDropout(nn.Module):
    """nn.Dropout with tpcore's bits of one place in the model."""

    def __init__(self, p: float, run_seed: int, stream: int, place: Place) -> None:
        super().__init__()
        self.p, self.run_seed, self.stream, self.place = p, run_seed, stream, place

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        rows = self.place.row_ids.reshape(-1)
        keep = dropout_keep_mask(self.p, self._seed(), self.stream, rows, x.shape[-1])
        return x * keep.view(x.shape) / (1 - self.p)

    def of_probabilities(self, probs: Tensor) -> Tensor:
        """The same for attention probabilities [b, n, s, s]."""
        if not self.training or self.p == 0:
            return probs
        _, n, _, s = probs.shape
        keep = attention_dropout_keep_mask(
            self.p, self._seed(), self.stream, self.place.row_ids, n, s
        )
        return probs * keep / (1 - self.p)

    def _seed(self) -> Tensor:
        return torch.tensor([step_seed(self.run_seed, self.place.step)])


def keyed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention, in the same order, with the module's own dropout."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = module.dropout.of_probabilities(nn.functional.softmax(scores, dim=-1))
    return torch.matmul(probs, value).transpose(1, 2).contiguous(), probs


def use_tpcore_bits(peer: Peer, run_seed: int) -> None:
    """Replace every dropout of the peer; an unknown one is an error."""
    layers = peer.encoder.encoder.layer
    streams = {
        "encoder.embeddings.dropout": dropout_stream(len(layers), Site.EMBEDDING),
        "dropout": dropout_stream(len(layers), Site.HEAD),
    }
    for i in range(len(layers)):
        prefix = f"encoder.encoder.layer.{i}"
        streams |= {
            f"{prefix}.attention.self.dropout": dropout_stream(i, Site.ATTENTION_PROBS),
            f"{prefix}.attention.output.dropout": dropout_stream(i, Site.ATTENTION_OUTPUT),
            f"{prefix}.output.dropout": dropout_stream(i, Site.MLP_OUTPUT),
        }
    found = {name: m.p for name, m in peer.named_modules() if isinstance(m, nn.Dropout)}
    assert found.keys() == streams.keys(), found.keys() ^ streams.keys()
    for name, p in found.items():
        peer.set_submodule(name, KeyedDropout(p, run_seed, streams[name], peer.place))
    AttentionInterface.register(ATTENTION, keyed_attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    peer.encoder.set_attn_implementation(ATTENTION)


def losses_of_run(path: Path) -> list[float]:
    """Of each step of a run of tpcore that logs them all."""
    with (path / METRICS_FILE).open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record["train_loss"] for record in records if "train_loss" in record]


def compare(
    name: str, data: Path, seed: int, dropout: float, rows: int | None, twin: bool
) -> dict[str, Any]:
    """All trainings of one case, as a line of the results."""
    case = CASES[name]
    losses: dict[str, list[float]] = {}
    metrics: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(case, data, folder, seed, short=True, dropout=dropout)
        settings.append("trainer.log_every_n_steps=1")
        if rows is not None:
            settings.append(f"model.train_ds.num_samples={rows}")
        config = load_config(None, settings)
        job = prepare(config)
        assert job.validation is not None
        for side, chunk in (("transformers", CHUNK), ("twin", TWIN_CHUNK))[: 2 if twin else 1]:
            model = build_model(job, TensorParallelGroup.single(), torch.device("cpu"))
            peer = Peer(model, chunk)
            use_tpcore_bits(peer, seed)
            losses[side] = train_peer(job, peer)
            found = evaluate_peer(job.task, peer, job.validation)
            metrics[side] = {m: found[m] for m in case.metrics}
        result = finetune(config)
        losses["tpcore"] = losses_of_run(result.path)
        metrics["tpcore"] = {m: result.last[f"val_{m}"] for m in case.metrics}
    return {
        "case": name,
        "seed": seed,
        "dropout": dropout,
        "rows": len(job.train.records),
        "steps": job.total_steps,
        "held_out": len(job.validation.records),
        "metrics": metrics,
        "losses": losses,
        "device": device_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "load": round(os.getloadavg()[0], 1),
    }


def largest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two lists of equal length."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Losses and metrics of both sides; in brackets transformers against its twin."""
    lines = [
        f"| data | seed | dropout | steps | losses, step 1 | difference, {EARLY_STEPS} steps "
        "| all steps | metric | tpcore | transformers | twin |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        losses = result["losses"]
        peer = losses["transformers"]
        cells = []
        for end in (EARLY_STEPS, None):
            cell = f"{largest_difference(losses['tpcore'][:end], peer[:end]):.1e}"
            if "twin" in losses:
                cell += f" ({largest_difference(losses['twin'][:end], peer[:end]):.1e})"
            cells.append(cell)
        for metric in result["metrics"]["tpcore"]:
            values = [
                f"{result['metrics'][side][metric]:.4f}" if side in losses else ""
                for side in ("tpcore", "transformers", "twin")
            ]
            lines.append(
                f"| {result['case']} | {result['seed']} | {result['dropout']} | {result['steps']} "
                f"| {losses['tpcore'][0]:.6f}, {peer[0]:.6f} | {' | '.join(cells)} | {metric} "
                f"| {' | '.join(values)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="chemprot,stsb,squad2_half")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--rows", type=int, help="training rows, in place of the case's own")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--twin", action="store_true", help="train transformers twice")
    parser.add_argument("--results", type=Path, default=Path("runs/tasks_same_dropout.jsonl"))
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            result = compare(
                name, arguments.data, seed, arguments.dropout, arguments.rows, arguments.twin
            )
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(table([result]), flush=True)
    lines = arguments.results.read_text(encoding="utf-8").splitlines()
    print(table([json.loads(line) for line in lines]))


if __name__ == "__main__":
    main()
