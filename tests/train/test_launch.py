"""Threads, errors on several ranks, and the launcher's exit status."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_mesh
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.train import launch
from tpcore.train.launch import RankError, num_cores, on_all_ranks, report_error, set_num_threads

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """torchrun's environment for two ranks of a machine with 8 cores."""
    before = torch.get_num_threads()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "num_cores", lambda: 8)
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("omp", "configured", "expected"),
    [
        ("1", None, 4),  # torchrun's own default
        (None, None, 4),
        ("3", None, 3),  # the user's
        ("1", 2, 2),
        ("3", 2, 2),
    ],
)
def test_threads_of_a_rank(
    torchrun: pytest.MonkeyPatch, omp: str | None, configured: int | None, expected: int
) -> None:
    if omp is None:
        torchrun.delenv("OMP_NUM_THREADS", raising=False)
    else:
        torchrun.setenv("OMP_NUM_THREADS", omp)
    assert set_num_threads(configured) == expected
    assert torch.get_num_threads() == expected


def test_too_many_threads_are_refused(torchrun: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"trainer\.num_threads=33: .* 8 core.* at most 32"):
        set_num_threads(33)
    assert torch.get_num_threads() == before


def test_threads_of_a_single_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    assert set_num_threads(None) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", 6), ("150000 100000", 1), ("400000 100000", 4), ("9000000 100000", 6)],
)
def test_cores_heed_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(f"{text}\n")
    monkeypatch.setattr(launch, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert num_cores() == expected


def _check_on_all_ranks(tp: TensorParallelGroup, dp: DataParallelGroup) -> None:
    rank = dp.rank * tp.size + tp.rank
    assert on_all_ranks(lambda: rank, tp, dp) == rank

    def fail_from(first: int) -> None:
        if rank >= first:
            raise ValueError(f"no luck on {rank}")

    for first in range(4):
        # The first that failed raises its own error, all others raise that rank's.
        with pytest.raises(ValueError, match=f"no luck on {first}") as caught:
            on_all_ranks(lambda first=first: fail_from(first), tp, dp)
        assert (type(caught.value) is RankError) == (rank != first)
        assert str(caught.value).startswith(f"rank {first}: ") == (rank != first)


@pytest.mark.parametrize(("tp_size", "dp_size"), [(4, 1), (2, 2), (1, 4)])
def test_failure_of_one_rank_reaches_all(tp_size: int, dp_size: int) -> None:
    run_mesh(_check_on_all_ranks, tp_size, dp_size)


def test_only_rank_0_speaks_at_once(
    torchrun: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_error("two\n  lines") == 2
    assert capsys.readouterr().err == "tpcore: error: two lines\n"
    waited: list[str] = []
    torchrun.setenv("RANK", "1")
    torchrun.setattr(launch.time, "sleep", lambda _: waited.append(capsys.readouterr().err))
    assert report_error("alone", 3) == 3
    assert waited == [""]
    assert capsys.readouterr().err == "tpcore: error: rank 1: alone\n"


def test_status_of_a_failed_rank_is_returned(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("OMP_NUM_THREADS", "1"), ("GLOO_SOCKET_IFNAME", "lo")):
        monkeypatch.setenv(name, value)  # `launch` sets what is not there; take it back after
    assert launch.launch(["finetune", "no-such-file.yaml"], 2) == 2
    assert "tpcore: error: no-such-file.yaml" in capfd.readouterr().err
