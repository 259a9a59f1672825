"""A model over a whole dataset, each example counted once for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tpcore.models.bert import BertModel
from tpcore.models.output import BertOutput
from tpcore.parallel.group import DataParallelGroup
from tpcore.tasks.sections import DataConfig
from tpcore.tasks.task import Dataset, Task, TaskBatch
from tpcore.train.batching import evaluation_batches


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
    data: DataConfig,
    dp: DataParallelGroup,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    beat: Callable[[str], None] = lambda _: None,
    predict: Callable[[TaskBatch], BertOutput] | None = None,
    in_step: bool = False,
) -> Evaluation:
    """Run `model` in evaluation mode over `dataset`; the mode is restored afterwards.

    Batches of `data.batch_size` examples, or of `data.max_tokens_per_batch` tokens, are cut from
    the examples in order of length and dealt to the data-parallel ranks in turn. Loss sums are
    added in the order of the batches, so that the result is the same at every data-parallel size.
    `beat` is told of every batch.

    `predict` computes what the model says of a batch, by default its `forward_packed`; where it is
    a meeting of all ranks, `in_step`, those that have run out of batches take part all the same.
    """
    if predict is None:

        def predict(batch: TaskBatch) -> BertOutput:
            return model.forward_packed(batch.packed, batch.head_labels, hidden_states=False)

    batches = evaluation_batches(dataset.examples, data)
    decoded: dict[int, Any] = {}
    sums: dict[int, tuple[list[float], list[float]]] = {}  # batch number -> loss sums, counts
    was_training = model.training
    model.eval()
    end = -(-len(batches) // dp.size) * dp.size if in_step else len(batches)
    # FSDP2 keeps what it allocates here for training, which tensors of inference mode are not for.
    with torch.no_grad() if in_step else torch.inference_mode(), autocast():
        for number in range(dp.rank, end, dp.size):
            beat(f"batch {number + 1} of {len(batches)} of {dataset.source}")
            batch = task.collate(batches[number % len(batches)], device)
            output = predict(batch)
            if number >= len(batches):
                continue
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
