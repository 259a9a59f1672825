"""Which examples form a batch: functions of the data, the seed and the epoch alone.

Batches are formed for all data-parallel ranks together and cut over them afterwards, so neither
the number of ranks nor anything that runs beside them changes what a step learns from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpcore.parallel.group import DataParallelGroup
from tpcore.parallel.random import step_seed
from tpcore.tasks.sections import DataConfig, TrainDataConfig
from tpcore.tasks.task import Example

_ORDER_STREAM = 1 << 32
"""Added to the epoch so that data order and dropout, which counts steps, use different seeds."""
_BATCH_ORDER_STREAM = 1 << 33
"""The same for the order of batches that are formed by length."""


def epoch_order(num_examples: int, seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
    """The order of the examples in an epoch: a function of the seed and the epoch alone."""
    if not shuffle:
        return list(range(num_examples))
    return _permutation(num_examples, step_seed(seed, _ORDER_STREAM + epoch))


def epoch_batches(
    examples: Sequence[Example], data: TrainDataConfig, seed: int, epoch: int
) -> list[list[int]]:
    """All batches of an epoch, in order, before they are cut over ranks: places in `examples`.

    Without `max_tokens_per_batch` they are cut from the shuffled examples. With it they hold
    examples of similar length: the shuffled examples are sorted by length, which leaves equal
    lengths in their new order, cut, and the batches shuffled. The lengths in order are those of
    every epoch, so the cuts are too, and an epoch always has `num_batches` batches.
    """
    order = epoch_order(len(examples), seed, epoch, shuffle=data.shuffle)
    if data.max_tokens_per_batch is None:
        return _cut_by_number(order, data.batch_size)
    lengths = [len(example) for example in examples]
    if not data.shuffle:
        return _cut_by_tokens(order, lengths, data.max_tokens_per_batch)
    order.sort(key=lengths.__getitem__)
    batches = _cut_by_tokens(order, lengths, data.max_tokens_per_batch)
    shuffled = _permutation(len(batches), step_seed(seed, _BATCH_ORDER_STREAM + epoch))
    return [batches[i] for i in shuffled]


def evaluation_batches(examples: Sequence[Example], data: DataConfig) -> list[list[Example]]:
    """Batches of similar length, the shortest first; each example is in one of them."""
    by_length = sorted(examples, key=len)
    order = list(range(len(by_length)))
    if data.max_tokens_per_batch is None:
        batches = _cut_by_number(order, data.batch_size)
    else:
        lengths = [len(example) for example in by_length]
        batches = _cut_by_tokens(order, lengths, data.max_tokens_per_batch)
    return [[by_length[i] for i in batch] for batch in batches]


def num_batches(examples: Sequence[Example], data: TrainDataConfig) -> int:
    """How many batches every epoch has."""
    return len(epoch_batches(examples, data, seed=0, epoch=0))


def _cut_by_number(order: list[int], batch_size: int) -> list[list[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _cut_by_tokens(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """As many as have `budget` tokens together; a longer one is a batch of its own."""
    batches: list[list[int]] = []
    num_tokens = 0
    for index in order:
        if not batches or num_tokens + lengths[index] > budget:
            batches.append([])
            num_tokens = 0
        batches[-1].append(index)
        num_tokens += lengths[index]
    return batches


def overlong_notes(examples: Sequence[Example], data: DataConfig, key: str) -> list[str]:
    """What to tell of examples that exceed the budget of the section `key`, if there are any."""
    budget = data.max_tokens_per_batch
    longer = 0 if budget is None else sum(len(example) > budget for example in examples)
    if not longer:
        return []
    return [
        f"{longer} example(s) have more than {key}.max_tokens_per_batch={budget} tokens; each is "
        "a batch of its own"
    ]


def own_share(batch: Sequence[Example], dp: DataParallelGroup) -> list[Example]:
    """Every `dp.size`-th example in order of length, so that ranks get about as many tokens."""
    return sorted(batch, key=lambda example: (len(example), example.index))[dp.rank :: dp.size]


def _permutation(size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator, device="cpu").tolist()
