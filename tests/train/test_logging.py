"""What a run says: on a terminal, elsewhere, in its files, and on silent ranks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tpcore.train.logging import RunLog, format_metrics

RECORD = {
    "step": 3,
    "epoch": 1,
    "train_loss": 0.123456789012345,
    "lr": 5e-5,
    "grad_norm": 1.5,
    "tokens_per_s": 1234.5,
}
LINE = "step  3/20 | epoch 1 | loss   0.1235 | lr 5.00e-05 | norm   1.500 |     1234 tok/s"


def _say(log: RunLog, folder: Path) -> None:
    log.info("before [there] is a folder")
    log.open_folder(folder)
    log.start_progress(20)
    log.metrics(RECORD)
    log.step(RECORD, 20, line=True)
    log.step(RECORD | {"step": 4}, 20, line=False)
    with log.capture():
        logging.getLogger("tpcore.somewhere").warning("%d keys", 3)
    log.table("the end", [("accuracy", "0.5"), ("run", "runs/x")])
    log.close()


def test_plain_lines_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _say(RunLog(), tmp_path)
    shown = capsys.readouterr().out
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert logged[:3] == ["before [there] is a folder", LINE, "3 keys"]
    assert logged[3:] == ["the end", "  accuracy  0.5", "  run       runs/x"]
    assert shown.splitlines()[:3] == logged[:3]
    assert "accuracy" in shown
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == RECORD


def test_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    _say(RunLog(), tmp_path)
    shown = capsys.readouterr().out
    assert "4/20" in shown
    assert "epoch 1" in shown
    assert LINE not in shown
    assert LINE in (tmp_path / "log.txt").read_text()


def test_bar_can_be_turned_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    _say(RunLog(progress_bar=False), tmp_path)
    assert LINE in capsys.readouterr().out


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _say(RunLog(enabled=False), tmp_path)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_metrics_of_single_classes_are_left_out_of_tables() -> None:
    assert format_metrics({"val_f1": 0.12345, "val_f1/spam": 1.0}) == [("val_f1", "0.1235")]


def test_event_files_hold_the_same_numbers_and_forget_what_comes_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step, steps in ((1, range(1, 6)), (4, range(4, 7))):  # cut off after 5, resumed at 4
        log = RunLog()
        log.open_folder(tmp_path, tensorboard=True, first_step=first_step)
        for step in steps:
            log.metrics(RECORD | {"step": step, "train_loss": first_step + step / 8})
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert {"train_loss", "lr", "grad_norm"} <= set(events.Tags()["scalars"])
    found = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert found == [(1, 1.125), (2, 1.25), (3, 1.375), (4, 4.5), (5, 4.625), (6, 4.75)]
