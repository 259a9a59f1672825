"""An interrupted and resumed run is the run that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_mesh
from tests.train import tiny
from tests.train.tiny import write_manifest
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.train.checkpoint_files import (
    find_file,
    list_checkpoints,
    manifest_path,
    rank_folder,
    read_all_ranks,
    read_checkpoint,
    read_manifest,
    recover,
)
from tpcore.train.config import ConfigError
from tpcore.train.faults import StoppedError
from tpcore.train.launch import on_all_ranks
from tpcore.train.logging import RunLog
from tpcore.train.prepare import build_model, prepare
from tpcore.train.run_state import choose_run
from tpcore.train.saving import FitResult
from tpcore.train.trainer import Trainer

SINGLE = (TensorParallelGroup.single(), DataParallelGroup.single())
LAST = "tiny-last.ckpt"
# 4 steps an epoch, validated after 2 and 4; a schedule, clipping and dropout that all go on.
RUN = {
    "trainer__max_epochs": 3,
    "trainer__val_check_interval": 0.5,
    "trainer__gradient_clip_val": 0.5,
    "model__optim__sched__warmup_steps": 3,
    "exp_manager__checkpoint_callback_params__save_top_k": 2,
    "exp_manager__resume_if_exists": "true",
}


class _Interrupted(Trainer):
    """Is told to stop at a step, as by SIGTERM."""

    stop_at = -1

    def train_step(self, *arguments: Any) -> Any:
        result = super().train_step(*arguments)
        return result._replace(signal=15) if self.global_step + 1 == self.stop_at else result


def _fit(
    tp: TensorParallelGroup, dp: DataParallelGroup, folder: Path, version: str, **values: Any
) -> FitResult | None:
    """The run until its end, or until `stop_at`: None."""
    stop_at = values.pop("stop_at", -1)
    values = RUN | {"model__tensor_model_parallel_size": tp.size} | values
    config = tiny.config(folder, exp_manager__version=version, **values)
    job = on_all_ranks(lambda: prepare(config, tp.size * dp.size), tp, dp)
    trainer = _Interrupted(
        job,
        build_model(job, tp, torch.device("cpu")),
        tp=tp,
        dp=dp,
        run=on_all_ranks(lambda: choose_run(config.exp_manager), tp, dp),
        log=RunLog(enabled=tp.rank == 0 and dp.rank == 0, progress_bar=False),
    )
    trainer.stop_at = stop_at
    try:
        return trainer.fit()
    except StoppedError:
        return None
    finally:
        trainer.log.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_inputs(tmp_path)


def _run(folder: Path, version: str) -> Path:
    return folder / "runs/tiny" / version


def _records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timing = ("tokens_per_s", "mfu", "memory_mib")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def check_equal(a: Any, b: Any, where: str = "") -> None:
    """Same structure, tensors of the same bits."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            check_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            check_equal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def _check_same_run(a: Path, b: Path) -> None:
    assert _records(a) == _records(b)
    names = sorted(manifest.filename for manifest in list_checkpoints(a)[0])
    assert names == sorted(manifest.filename for manifest in list_checkpoints(b)[0])
    for name in names:
        for ours, theirs in zip(read_all_ranks(a, name), read_all_ranks(b, name), strict=True):
            for content in (ours, theirs):
                content["training"].pop("random")  # what drew from it differs, not training
            check_equal(ours, theirs, name)


@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-mixed", "16-mixed", "32 by tokens"])
def test_interrupted_run_is_bitcheck_equal(precision: str, folder: Path) -> None:
    values = {"trainer__precision": precision.split()[0], "trainer__loss_scale_window": 3}
    if "tokens" in precision:
        values["model__train_ds__max_tokens_per_batch"] = 45
    assert _fit(*SINGLE, folder, "whole", **values)
    # In the middle of an epoch, where a validation was due, and at the end of an epoch.
    for step in (3, 6, 8):
        assert _fit(*SINGLE, folder, "cut", stop_at=step, **values) is None
        assert read_manifest(_run(folder, "cut"), LAST).global_step == step
    assert _fit(*SINGLE, folder, "cut", **values)
    _check_same_run(_run(folder, "whole"), _run(folder, "cut"))


def test_frozen_parameters_early_stopping_and_layerwise_decay_resume(folder: Path) -> None:
    values = {
        "model__frozen_parameters": "[embeddings.*]",
        "model__optim__layerwise_lr_decay": 0.8,
        "model__optim__lr": 1e-5,
        "exp_manager__create_early_stopping_callback": "true",
        "exp_manager__early_stopping_callback_params__patience": 2,
        "exp_manager__early_stopping_callback_params__min_delta": 0.5,
    }
    whole = _fit(*SINGLE, folder, "whole", **values)
    assert whole
    assert whole.global_step == 6  # the first validation is the best; two more without any better
    assert _fit(*SINGLE, folder, "cut", stop_at=5, **values) is None
    cut = _fit(*SINGLE, folder, "cut", **values)
    assert cut
    assert cut.global_step == 6
    _check_same_run(_run(folder, "whole"), _run(folder, "cut"))


def _curve(run: Path) -> list[float]:
    return [record["train_loss"] for record in _records(run) if "train_loss" in record]


def test_other_sizes_continue_the_curve(folder: Path) -> None:
    assert _fit(*SINGLE, folder, "whole")
    expected = _curve(_run(folder, "whole"))
    run_mesh(_stop_at, 2, 1, folder, 4)
    run_mesh(_stop_at, 1, 1, folder, 6)
    run_mesh(_stop_at, 4, 1, folder, 8)
    run_mesh(_stop_at, 1, 2, folder, 10)
    run_mesh(_stop_at, 2, 2, folder, -1)
    assert _curve(_run(folder, "cut")) == pytest.approx(expected, rel=2e-5)
    assert len(expected) == 12
    sessions = json.loads((_run(folder, "cut") / "environment.json").read_text())["sessions"]
    assert [session["tensor_parallel_size"] for session in sessions] == [2, 1, 4, 1, 2]


def _stop_at(tp: TensorParallelGroup, dp: DataParallelGroup, folder: Path, step: int) -> None:
    _fit(tp, dp, folder, "cut", stop_at=step)


# --- what a kill leaves behind ------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and the run `cut` of two ranks that was stopped after its fifth step."""
    folder = tiny.write_inputs(tmp_path_factory.mktemp("stopped"))
    run_mesh(_stop_at, 2, 1, folder, 5)
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_run(stopped, "cut"), tmp_path / "run"))


@pytest.mark.parametrize("committed", [False, True])
def test_files_are_found_on_both_sides_of_the_commit(copy: Path, committed: bool) -> None:
    """As if killed right before, and right after, the manifest was put in place."""
    other = copy.with_name("other")
    shutil.copytree(copy, other)
    manifest = read_manifest(copy, LAST)
    newer = [read_checkpoint(find_file(copy, manifest, rank)) for rank in range(2)]
    names = []
    for rank, content in enumerate(newer):
        path = rank_folder(other, rank) / f".{LAST}.tmp"
        torch.save(content | {"global_step": 99}, path)
        names.append(path)
    if committed:
        write_manifest(other, LAST, names)
        os.replace(names[0], rank_folder(other, 0) / LAST)  # rank 0 was quicker than rank 1
    found = [content["global_step"] for content in read_all_ranks(other, LAST)]
    assert found == ([99, 99] if committed else [5, 5])
    recover(other)
    assert not list(other.rglob("*.tmp"))
    assert [c["global_step"] for c in read_all_ranks(other, LAST)] == found


def test_half_written_and_damaged_checkpoints_are_named_and_passed_over(
    stopped: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.write_inputs(tmp_path)
    target = _run(folder, "cut")
    target.parent.mkdir(parents=True)
    copy.rename(target)
    text = (target / "config.yaml").read_text().replace(str(stopped), str(folder))
    (target / "config.yaml").write_text(text)
    last = rank_folder(target, 0) / LAST
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    (rank_folder(target, 0) / "half.ckpt").write_bytes(b"no manifest")
    # What a run can do without does not stop it either.
    (target / "environment.json").unlink()
    (target / "metrics.jsonl").write_bytes((target / "metrics.jsonl").read_bytes() + b"3\n\xff\n")
    assert _fit(*SINGLE, folder, "cut")
    out = capsys.readouterr().out
    assert f"passed over: {last}: " in out
    assert "damaged" in out
    assert f"passed over: {rank_folder(target, 0) / 'half.ckpt'} has no manifest" in out
    assert "resumed from tiny--val_accuracy=" in out
    assert "step 4" in out
    assert not (rank_folder(target, 0) / "half.ckpt").exists()
    expected = _fit(*SINGLE, folder, "whole")
    assert expected
    assert _curve(target) == pytest.approx(_curve(_run(folder, "whole")), rel=2e-5)


# --- which run goes on --------------------------------------------------------------------------


def test_a_finished_run_trains_on_only_for_more_epochs(folder: Path) -> None:
    first = _fit(*SINGLE, folder, "v", trainer__max_epochs=1)
    again = _fit(*SINGLE, folder, "v", trainer__max_epochs=1)
    assert first
    assert again == first
    more = _fit(*SINGLE, folder, "v", trainer__max_epochs=2)
    assert more
    assert more.global_step == 8


def test_other_settings_are_refused(folder: Path) -> None:
    _fit(*SINGLE, folder, "v", trainer__max_epochs=1)
    with pytest.raises(ConfigError, match=r"made with model\.optim\.lr=0\.001, and now it is 0\.1"):
        _fit(*SINGLE, folder, "v", trainer__max_epochs=1, model__optim__lr=0.1)
    (_run(folder, "v") / "task.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a run whose task\.json is missing"):
        _fit(*SINGLE, folder, "v", trainer__max_epochs=1)


def test_without_a_version_the_newest_unfinished_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(**values: Any) -> tuple[str, bool]:
        config = tiny.config(folder, exp_manager__version=None, **RUN | values)
        choice = choose_run(config.exp_manager)
        return choice.path.name, choice.resumes

    assert not choose()[1]
    _fit(*SINGLE, folder, "done", trainer__max_epochs=1)
    assert not choose()[1]
    _fit(*SINGLE, folder, "cut", stop_at=2)
    assert choose() == ("cut", True)
    assert not choose(exp_manager__resume_if_exists="false")[1]
    # torchrun, which has started these ranks again, resumes what it had started.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert not choose(exp_manager__resume_if_exists="false")[1]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert choose(exp_manager__resume_if_exists="false") == ("cut", True)


def test_manifest_that_cannot_be_read_is_named(copy: Path) -> None:
    manifest_path(copy, LAST).write_text('{"files": [')
    manifests, problems = list_checkpoints(copy)
    assert LAST not in [manifest.filename for manifest in manifests]
    assert any(f"{LAST}.json is damaged" in problem for problem in problems)
