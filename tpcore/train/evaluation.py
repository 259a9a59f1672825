"""A model over a whole dataset, each example counted once for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tpcore.models.bert import BertModel
from tpcore.parallel.group import DataParallelGroup
from tpcore.tasks.task import Dataset, Task


@dataclass(frozen=True)
class Evaluation:
    """What came out of `evaluate`, equal on all ranks."""

    predictions: list[Any]
    """One for each record."""
    loss: float | None
    """None when the dataset has no labels."""
    metrics: dict[str, float]
    """Of the task; empty when the dataset has no labels."""


def evaluate(
    model: BertModel,
    task: Task,
    dataset: Dataset,
    *,
    batch_size: int,
    dp: DataParallelGroup,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    beat: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Run `model` in evaluation mode over `dataset`; the mode is restored afterwards.

    Batches are cut from the examples in order of length and dealt to the data-parallel ranks in
    turn. Loss sums are added in the order of the batches, so that the result is the same at every
    data-parallel size. `beat` is told of every batch.
    """
    order = sorted(dataset.examples, key=len)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    decoded: dict[int, Any] = {}
    sums: dict[int, tuple[list[float], list[float]]] = {}  # batch number -> loss sums, counts
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast():
        for number in range(dp.rank, len(batches), dp.size):
            beat(f"batch {number + 1} of {len(batches)} of {dataset.source}")
            batch = task.collate(batches[number], device)
            output = model.forward_packed(batch.packed)
            for example, result in zip(batch.examples, task.decode(output, batch), strict=True):
                decoded[example.index] = result
            if batch.labels:
                losses = task.loss_sums(output, batch).double().tolist()
                sums[number] = (losses, list(task.label_counts(batch)))
    model.train(was_training)

    if dp.size > 1:
        gathered: list[Any] = [None] * dp.size
        dist.all_gather_object(gathered, (decoded, sums), group=dp.process_group)
        for other_decoded, other_sums in gathered:
            decoded |= other_decoded
            sums |= other_sums
    assert len(decoded) == len(dataset.examples)
    predictions = task.predictions(dataset, [decoded[i] for i in range(len(decoded))])
    if not sums:
        return Evaluation(predictions, None, {})
    return Evaluation(predictions, _total_loss(sums), task.metrics(dataset, predictions))


def _total_loss(sums: dict[int, tuple[list[float], list[float]]]) -> float:
    """sum_k (sum of losses_k) / (sum of counts_k), over the batches in their order."""
    in_order = [sums[number] for number in sorted(sums)]
    losses = [sum(term) for term in zip(*(losses for losses, _ in in_order), strict=True)]
    counts = [sum(term) for term in zip(*(counts for _, counts in in_order), strict=True)]
    return sum(loss / count if count else 0.0 for loss, count in zip(losses, counts, strict=True))


def named_metrics(evaluation: Evaluation, part: str) -> dict[str, float]:
    """Loss and metrics under the names of `part`: val_loss, val_accuracy; "": loss, accuracy."""
    loss = {} if evaluation.loss is None else {"loss": evaluation.loss}
    prefix = f"{part}_" if part else ""
    return {f"{prefix}{name}": value for name, value in (loss | evaluation.metrics).items()}
