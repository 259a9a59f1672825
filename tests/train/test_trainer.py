"""The loop: it learns, it does not depend on how work is split, and it keeps what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_mesh
from tests.train import tiny
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.tasks import TASKS, task_class
from tpcore.tasks.settings import SECTIONS
from tpcore.tasks.task import Example
from tpcore.train.batching import epoch_order, own_share
from tpcore.train.checkpoint_files import rank_folder
from tpcore.train.config import ConfigError, TrainConfig
from tpcore.train.faults import DivergedError
from tpcore.train.finetune import finetune
from tpcore.train.launch import on_all_ranks
from tpcore.train.logging import RunLog
from tpcore.train.prepare import build_model, prepare
from tpcore.train.run_state import choose_run
from tpcore.train.saving import FitResult
from tpcore.train.trainer import Trainer

SINGLE = (TensorParallelGroup.single(), DataParallelGroup.single())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_inputs(tmp_path)


def _trainer(
    config: TrainConfig, tp: TensorParallelGroup, dp: DataParallelGroup, threads: int = 1
) -> Trainer:
    job = on_all_ranks(lambda: prepare(config, tp.size * dp.size), tp, dp)
    return Trainer(
        job,
        build_model(job, tp, torch.device("cpu")),
        tp=tp,
        dp=dp,
        run=choose_run(config.exp_manager),
        log=RunLog(enabled=tp.rank == 0 and dp.rank == 0, progress_bar=False),
    )


def _records(run: Path, key: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def _checkpoints(run: Path, rank: int = 0) -> list[str]:
    return sorted(path.name for path in rank_folder(run, rank).iterdir())


# --- learning -----------------------------------------------------------------------------------


def test_overfits_a_few_examples(folder: Path) -> None:
    config = tiny.config(
        folder,
        model__validation_ds__file_path=folder / "train.tsv",
        model__test_ds__file_path=folder / "train.tsv",
        model__optim__lr=3e-3,
        trainer__max_epochs=15,
    )
    result = finetune(config)
    assert result.global_step == 15 * 4
    assert result.best["val_accuracy"] == 1.0
    assert result.test["test_accuracy"] == 1.0
    assert result.last["val_loss"] < 0.05
    losses = [record["train_loss"] for record in _records(result.path, "train_loss")]
    assert len(losses) == result.global_step
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])


def test_starts_from_a_checkpoint_and_its_vocabulary(folder: Path) -> None:
    path = tiny.write_checkpoint(folder / "megatron")
    (folder / "vocab.txt").unlink()
    config = tiny.config(
        folder,
        model__language_model__lm_checkpoint=path,
        model__language_model__config=None,
        model__tokenizer__vocab_file=None,
        trainer__max_steps=1,
    )
    job = prepare(config)
    assert job.encoder.vocab_size == len(tiny.VOCABULARY)
    model = build_model(job, SINGLE[0], torch.get_default_device())
    torch.manual_seed(0)
    expected = tiny.BertModel(tiny.CONFIG).state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith("head."):
            rows = expected[name].shape[0]
            assert torch.equal(tensor[:rows], expected[name][: tensor.shape[0]]), name
    assert finetune(config).global_step == 1


# --- the same numbers however the work is split -------------------------------------------------


def _fit(tp: TensorParallelGroup, dp: DataParallelGroup, folder: Path, **values: Any) -> FitResult:
    values |= {
        "exp_manager__version": f"tp{tp.size}-dp{dp.size}",
        "model__tensor_model_parallel_size": tp.size,
    }
    return _trainer(tiny.config(folder, **values), tp, dp).fit()


def _check_fit(
    tp: TensorParallelGroup,
    dp: DataParallelGroup,
    folder: Path,
    values: dict[str, Any],
    expected: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    result = _fit(tp, dp, folder, **values)
    if tp.rank or dp.rank:
        return
    train, validation = expected
    for ours, theirs in zip(_records(result.path, "train_loss"), train, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for name in ("train_loss", "grad_norm", "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), (name, ours, theirs)
    for ours, theirs in zip(_records(result.path, "val_loss"), validation, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    for rank in range(tp.size):
        assert _checkpoints(result.path, rank) == _checkpoints(result.path.with_name("tp1-dp1"))


# Batches of 5, 5 | 5, 3: unequal shares on 2 ranks, an empty share on 4.
UNEVEN = {
    "model__train_ds__batch_size": 5,
    "model__dataset__class_balancing": "weighted_loss",
    "model__optim__sched__warmup_steps": 2,
    "trainer__accumulate_grad_batches": 2,
    "trainer__max_epochs": 3,
}


@pytest.fixture(scope="module")
def single_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.write_inputs(tmp_path_factory.mktemp("mesh"), num_train=18)
    # Unbalanced labels, so that weights of classes differ and so do the counts of ranks.
    lines = (folder / "train.tsv").read_text().splitlines()
    more = [line.replace("neg\t", "pos\t") for line in lines[:6:2]]
    (folder / "train.tsv").write_text("\n".join(lines[6:] + more + lines[1:6:2]) + "\n")
    run = _fit(*SINGLE, folder, **UNEVEN).path
    return folder, (_records(run, "train_loss"), _records(run, "val_loss"))


@pytest.mark.parametrize(("tp_size", "dp_size"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_curve_does_not_depend_on_the_mesh(tp_size: int, dp_size: int, single_process: Any) -> None:
    folder, expected = single_process
    assert len(expected[0]) == 6
    assert len(expected[1]) == 3
    run_mesh(_check_fit, tp_size, dp_size, folder, UNEVEN, expected)


BY_TOKENS = UNEVEN | {
    "exp_manager__name": "tokens",
    "model__train_ds__max_tokens_per_batch": 60,
    "model__validation_ds__max_tokens_per_batch": 50,
    "trainer__accumulate_grad_batches": 1,
    "trainer__max_epochs": 2,
}


def test_batches_by_tokens_do_not_depend_on_the_mesh(single_process: Any) -> None:
    folder, _ = single_process
    result = _fit(*SINGLE, folder, **BY_TOKENS)
    train, validation = (_records(result.path, name) for name in ("train_loss", "val_loss"))
    assert len(train) == result.global_step == train[-1]["step"]
    assert len(train) % 2 == 0
    assert max(record["tokens"] for record in train) <= 60
    # The schedule, 2 steps up and then down to zero, ends with the run.
    assert train[-1]["lr"] == pytest.approx(1e-3 / (len(train) - 2))
    for tp_size, dp_size in ((2, 1), (1, 2)):
        run_mesh(_check_fit, tp_size, dp_size, folder, BY_TOKENS, (train, validation))


def test_accumulation_is_one_larger_batch(folder: Path) -> None:
    one = _trainer(tiny.config(folder, model__train_ds__batch_size=7), *SINGLE)
    cut = _trainer(tiny.config(folder, model__train_ds__batch_size=7), *SINGLE)
    examples = list(one.job.train.examples[:7])
    whole = one.train_step([examples], lr=1e-3)
    parts = cut.train_step([examples[:2], examples[2:3], examples[3:]], lr=1e-3)
    assert whole[:2] == pytest.approx(parts[:2], rel=1e-5)
    others = dict(cut.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        # Gradients of key biases are zero but for rounding; norms are clipped to 1.
        torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-7)


def test_seed_decides_everything(folder: Path) -> None:
    def curve(version: str, seed: int) -> list[float]:
        config = tiny.config(
            folder, exp_manager__version=version, trainer__seed=seed, trainer__max_epochs=2
        )
        return [record["train_loss"] for record in _records(finetune(config).path, "train_loss")]

    first = curve("a", seed=1)
    torch.manual_seed(99)
    torch.rand(10)
    assert curve("b", seed=1) == first
    assert curve("c", seed=2) != first


def test_order_is_a_new_permutation_in_every_epoch() -> None:
    first, second = epoch_order(50, 3, 0), epoch_order(50, 3, 1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first == epoch_order(50, 3, 0)
    assert first != epoch_order(50, 4, 0)
    assert epoch_order(4, 3, 1, shuffle=False) == [0, 1, 2, 3]


def test_shares_are_disjoint_complete_and_balanced() -> None:
    batch = [Example(i, [1] * length, [0] * length) for i, length in enumerate([9, 1, 8, 2, 7])]
    shares = [own_share(batch, DataParallelGroup(object(), rank, 2)) for rank in range(2)]  # type: ignore[arg-type]
    assert sorted(e.index for share in shares for e in share) == [0, 1, 2, 3, 4]
    assert [sum(map(len, share)) for share in shares] == [1 + 7 + 9, 2 + 8]


# --- options ------------------------------------------------------------------------------------


def test_bf16_is_near_fp32(folder: Path) -> None:
    curves = []
    for precision in ("32", "bf16-mixed"):
        config = tiny.config(
            folder,
            exp_manager__version=precision,
            trainer__precision=precision,
            trainer__max_epochs=2,
        )
        trainer = _trainer(config, *SINGLE)
        assert trainer.fit().last["val_loss"] > 0
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        records = _records(trainer.run_path, "train_loss")
        curves.append([record["train_loss"] for record in records])
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.05)


def test_validation_interval_and_max_steps(folder: Path) -> None:
    def steps(version: str, **values: Any) -> list[int]:
        result = finetune(tiny.config(folder, exp_manager__version=version, **values))
        return [record["step"] for record in _records(result.path, "val_loss")]

    # 4 steps an epoch
    assert steps("a", trainer__max_epochs=2) == [4, 8]
    assert steps("b", trainer__max_epochs=2, trainer__val_check_interval=0.5) == [2, 4, 6, 8]
    assert steps("c", trainer__max_epochs=2, trainer__val_check_interval=3) == [3, 6, 8]
    assert steps("d", trainer__max_steps=6) == [4, 6]
    assert steps("e", trainer__max_epochs=1, model__train_ds__num_samples=6) == [2]


def test_log_lines_come_every_n_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = finetune(tiny.config(folder, trainer__log_every_n_steps=3, trainer__max_epochs=2))
    assert [record["step"] for record in _records(result.path, "train_loss")] == [1, 3, 6]
    shown = capsys.readouterr().out
    logged = (result.path / "log.txt").read_text()
    for text in ("step 3/8 | epoch 0 | loss", "val_accuracy", "tok/s", "tiny: finished"):
        assert text in shown
        assert text in logged
    assert "step 2/8" not in shown


def test_monitor_and_top_k(folder: Path) -> None:
    result = finetune(
        tiny.config(
            folder,
            trainer__max_epochs=4,
            exp_manager__checkpoint_callback_params__monitor="val_loss",
            exp_manager__checkpoint_callback_params__save_top_k=2,
            exp_manager__checkpoint_callback_params__save_last="false",
        )
    )
    scores = {r["epoch"]: r["val_loss"] for r in _records(result.path, "val_loss")}
    best = sorted(scores, key=scores.__getitem__)[:2]
    expected = [f"tiny--val_loss={scores[epoch]:.2f}-epoch={epoch}.ckpt" for epoch in best]
    assert _checkpoints(result.path) == sorted(expected)


def test_unknown_monitor_is_refused_before_anything_is_written(folder: Path) -> None:
    config = tiny.config(folder, exp_manager__checkpoint_callback_params__monitor="val_rouge")
    with pytest.raises(ConfigError, match=r"val_rouge.*val_loss, val_accuracy"):
        finetune(config)
    assert not (folder / "runs").exists()


def test_without_validation_the_last_checkpoint_is_kept(folder: Path) -> None:
    config = tiny.config(folder, model__validation_ds__file_path=None, trainer__max_epochs=1)
    result = finetune(config)
    assert (result.best, result.last, result.test) == ({}, {}, {})
    assert _checkpoints(result.path) == ["tiny-last.ckpt"]


def test_diverging_run_names_its_step(folder: Path) -> None:
    config = tiny.config(folder, model__optim__lr=1e30, trainer__gradient_clip_val=None)
    with pytest.raises(DivergedError, match=r"(loss|gradient norm) is (nan|inf) at step 2;"):
        finetune(config)


def test_configuration_knows_the_tasks() -> None:
    assert set(TASKS) == set(SECTIONS)
    for name in TASKS:
        assert task_class(name).name == name
