"""What a run says: on a terminal, elsewhere, in its files, and on silent ranks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tpcore.models.config import BertConfig
from tpcore.train import logging as logging_module
from tpcore.train.logging import RunLog, format_duration, format_metrics
from tpcore.train.utilization import Utilization

RECORD = {
    "step": 3,
    "epoch": 1,
    "train_loss": 0.123456789012345,
    "lr": 5e-5,
    "grad_norm": 1.5,
    "tokens_per_s": 1234.5,
    "mfu": 0.4567,
    "memory_mib": 512.4,
}
LINE = (
    "step  3/20 | epoch 1 | loss   0.1235 | lr 5.00e-05 | norm   1.500 |     1234 tok/s | "
    "mfu 45.7% |    512 MiB | 0:00:17 left"
)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is made, the run begins, and three seconds later a step is shown."""
    clock = iter([0.0, 0.0, 3.0, *range(4, 100)])
    monkeypatch.setattr(logging_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))


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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (127, "0:02:07"), (90061, "25:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_time_left_of_a_resumed_run_counts_its_own_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = RunLog(progress_bar=False)
    log.start_progress(20, done=10)
    log.step(RECORD | {"step": 12}, 20, line=True)  # two steps in three seconds
    assert "0:00:12 left" in capsys.readouterr().out


def test_utilization_is_of_the_operations_that_formulas_need() -> None:
    """One sequence at a time: 3 (2 t (4 h^2 + 2 h f) + ...) a layer, written out."""
    config = BertConfig(vocab_size=100, hidden_size=8, num_layers=2, num_attention_heads=2)
    h, f, lengths = 8, 32, (3, 5)

    def of(first: bool = False, **sizes: int) -> float | None:
        use = Utilization(
            config,
            device=torch.device("cpu"),
            dtype=torch.float32,
            peak_tflops=1e-6,
            **{"tensor_parallel_size": 1, "data_parallel_size": 1, **sizes},
        )
        return use.of_step(lengths, 0, 0.5, first_tokens_only=first)

    linear = sum(2 * t * (4 * h * h + 2 * h * f) for t in lengths)
    attention = sum(4 * t * t * h for t in lengths)
    expected = 2 * (3 * linear + 3.5 * attention) / (0.5 * 1e6)
    assert of() == pytest.approx(expected, rel=1e-12)
    assert of(tensor_parallel_size=2) == pytest.approx(expected / 2, rel=1e-12)
    assert of(data_parallel_size=2) == pytest.approx(expected / 2, rel=1e-12)
    # Six of the eight tokens of the last layer go through its attention alone.
    less = 3 * sum(2 * (t - 1) * (h * h + 2 * h * f) for t in lengths) / (0.5 * 1e6)
    assert of(first=True) == pytest.approx(expected - less, rel=1e-12)


def test_a_peak_is_measured_where_none_is_stated() -> None:
    def use(peak: float | None) -> Utilization:
        config = BertConfig(vocab_size=100, hidden_size=8, num_layers=2, num_attention_heads=2)
        return Utilization(
            config,
            tensor_parallel_size=1,
            data_parallel_size=1,
            device=torch.device("cpu"),
            dtype=torch.float32,
            peak_tflops=peak,
        )

    assert 1e8 < use(None).peak < 1e14
    assert use(0.0).of_step([4], 0, 1.0) is None
