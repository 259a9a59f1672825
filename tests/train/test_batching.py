"""Batches by length under a token budget."""

from __future__ import annotations

import random
from itertools import chain, pairwise
from pathlib import Path

import pytest

from tests.train import tiny
from tpcore import load_run
from tpcore.cli import main
from tpcore.parallel.group import DataParallelGroup
from tpcore.tasks.sections import DataConfig, TrainDataConfig
from tpcore.tasks.task import Example
from tpcore.train.batching import (
    epoch_batches,
    evaluation_batches,
    num_batches,
    overlong_notes,
    own_share,
)
from tpcore.train.config import ConfigError
from tpcore.train.finetune import finetune
from tpcore.train.prepare import prepare
from tpcore.train.run import Run

BUDGET = 50


def _examples(count: int = 200) -> list[Example]:
    draw = random.Random(0)
    lengths = [draw.randint(3, 40) for _ in range(count)]
    return [Example(i, [0] * n, [0] * n) for i, n in enumerate(lengths)]


def _batches(
    examples: list[Example], data: TrainDataConfig, seed: int, epoch: int
) -> list[list[Example]]:
    return [[examples[i] for i in batch] for batch in epoch_batches(examples, data, seed, epoch)]


def _in_order(batches: list[list[Example]]) -> list[int]:
    return list(chain.from_iterable(_numbers(batches)))


def _numbers(batches: list[list[Example]]) -> list[list[int]]:
    return [[example.index for example in batch] for batch in batches]


def test_every_epoch_has_each_example_once_in_as_many_batches_within_the_budget() -> None:
    examples, data = _examples(), TrainDataConfig(max_tokens_per_batch=BUDGET)
    seen = []
    for epoch in range(4):
        batches = _batches(examples, data, 7, epoch)
        assert len(batches) == num_batches(examples, data)
        assert sorted(_in_order(batches)) == list(range(len(examples)))
        assert max(sum(map(len, batch)) for batch in batches) <= BUDGET
        seen.append(_numbers(batches))
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    composed = [sorted(map(sorted, batches)) for batches in seen]
    assert composed[0] != composed[1]  # not only their order is new
    assert seen[0] == (epoch_batches(examples, data, 7, 0))
    assert seen[0] != (epoch_batches(examples, data, 8, 0))


def test_lengths_within_a_batch_are_alike_and_batches_are_full() -> None:
    examples, data = _examples(), TrainDataConfig(max_tokens_per_batch=BUDGET)
    batches = _batches(examples, data, 7, 0)
    batches.sort(key=lambda batch: (min(map(len, batch)), max(map(len, batch))))
    for batch, following in pairwise(batches):
        assert max(map(len, batch)) <= min(map(len, following))
        assert sum(map(len, batch)) + len(following[0]) > BUDGET


def test_in_the_order_of_the_file_where_nothing_is_shuffled() -> None:
    examples = _examples()
    data = TrainDataConfig(max_tokens_per_batch=BUDGET, shuffle=False)
    assert _in_order(_batches(examples, data, 7, 3)) == list(range(len(examples)))
    assert len(epoch_batches(examples, data, 7, 3)) == num_batches(examples, data)


def test_a_longer_example_is_alone_and_told_of() -> None:
    examples, data = _examples(), TrainDataConfig(max_tokens_per_batch=20)
    longer = [example.index for example in examples if len(example) > 20]
    batches = epoch_batches(examples, data, 7, 0)
    assert [[number] in batches for number in longer] == [True] * len(longer)
    (note,) = overlong_notes(examples, data, "model.train_ds")
    assert note.startswith(f"{len(longer)} example(s) have more than model.train_ds.max_tokens")
    assert overlong_notes(examples, TrainDataConfig(max_tokens_per_batch=40), "x") == []
    assert overlong_notes(examples, TrainDataConfig(), "x") == []


@pytest.mark.parametrize("budget", [None, 1, BUDGET])
def test_evaluation_takes_each_example_once(budget: int | None) -> None:
    examples = _examples()
    batches = evaluation_batches(examples, DataConfig(batch_size=9, max_tokens_per_batch=budget))
    assert sorted(_in_order(batches)) == list(range(len(examples)))
    lengths = [len(example) for batch in batches for example in batch]
    assert lengths == sorted(lengths)


def test_shares_of_batches_smaller_than_the_number_of_ranks_are_complete() -> None:
    examples, data = _examples(20), TrainDataConfig(max_tokens_per_batch=20)
    for batch in _batches(examples, data, 7, 0):
        shares = [own_share(batch, DataParallelGroup(object(), rank, 4)) for rank in range(4)]  # type: ignore[arg-type]
        assert sorted(e.index for share in shares for e in share) == sorted(
            example.index for example in batch
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tiny.write_inputs(tmp_path_factory.mktemp("run"))
    config = tiny.config(folder, trainer__max_steps=2, model__train_ds__max_tokens_per_batch=30)
    return load_run(finetune(config).path)


def test_predictions_come_in_the_order_of_the_inputs(run: Run) -> None:
    draw = random.Random(1)
    texts = [" ".join(draw.choices(tiny.OTHER, k=draw.randint(1, 25))) for _ in range(30)]
    alone = [run.predict([text])[0] for text in texts]
    assert len({str(prediction) for prediction in alone}) > 20  # so that their order is seen
    for budget in (1, 40, 10**6):
        together = run.predict(texts, max_tokens_per_batch=budget)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)


def test_evaluation_does_not_depend_on_the_budget(run: Run, tmp_path: Path) -> None:
    expected = run.evaluate()
    for budget in (1, 40):
        found = run.evaluate(max_tokens_per_batch=budget)
        assert found.metrics == pytest.approx(expected.metrics, abs=1e-6)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    output = tmp_path / "out.jsonl"
    data = run.config.model.source("validation_ds")
    arguments = ["predict", str(run.path), str(data), "--max-tokens-per-batch", "30"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert len(output.read_text().splitlines()) == len(expected.predictions)


def test_the_number_of_steps_is_known_and_longer_examples_are_named(tmp_path: Path) -> None:
    folder = tiny.write_inputs(tmp_path)
    config = tiny.config(
        folder, model__train_ds__max_tokens_per_batch=8, trainer__accumulate_grad_batches=3
    )
    job = prepare(config)
    batches = num_batches(job.train.examples, config.model.train_ds)
    assert job.steps_per_epoch == -(-batches // 3)
    assert any("model.train_ds.max_tokens_per_batch=8 tokens" in note for note in job.notes)
    with pytest.raises(ConfigError, match=r"model\.test_ds\.max_tokens_per_batch=0"):
        tiny.config(folder, model__test_ds__max_tokens_per_batch=0)
