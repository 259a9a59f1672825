"""Ranks that are killed, stopped or hung, under torchrun, on real processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.train import tiny
from tests.train.test_resume import check_equal
from tpcore.train.checkpoint_files import list_checkpoints, read_all_ranks

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _start(
    folder: Path, version: str, num_ranks: int, *launcher: str, **values: Any
) -> subprocess.Popen[str]:
    values |= {"exp_manager__version": version, "trainer__num_threads": 1}
    launcher = launcher or ("--standalone", "--local-addr", "127.0.0.1")
    command = [*TORCHRUN, *launcher, "--nproc-per-node", str(num_ranks), "-m", "tpcore"]
    return subprocess.Popen(
        [*command, "finetune", *tiny.overrides(folder, **values)],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _children(pid: int) -> list[int]:
    try:
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def _wait(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate()[0][-4000:])
        time.sleep(0.02)


def _num_sessions(run: Path) -> int:
    try:
        return len(json.loads((run / "environment.json").read_text())["sessions"])
    except (OSError, ValueError):
        return 0


KILLED = {
    "model__tensor_model_parallel_size": 2,
    "trainer__max_epochs": 1000,
    "trainer__max_steps": 400,
    "trainer__log_every_n_steps": 50,
    "trainer__val_check_interval": 20,
    "exp_manager__checkpoint_callback_params__every_n_train_steps": 2,
}


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path: Path) -> None:
    folder = tiny.write_inputs(tmp_path)
    whole = _start(folder, "whole", 4, **KILLED)
    assert whole.wait(300) == 0, whole.communicate()[0][-4000:]

    run = folder / "runs/tiny/killed"
    launcher = ("--standalone", "--local-addr", "127.0.0.1", "--max-restarts", "30")
    process = _start(folder, "killed", 4, *launcher, **KILLED)
    draw = random.Random(7)
    for number in range(1, 21):
        _wait(lambda n=number: _num_sessions(run) >= n, process, 120)  # type: ignore[misc]
        ranks = _children(process.pid)
        # While checkpoints are restored and written, and between.
        time.sleep(draw.uniform(0, 0.6))
        os.kill(ranks[draw.randrange(4)], signal.SIGKILL)
        assert not (run / "result.json").exists(), "finished too early: give it more steps"
        if (run / "checkpoints").exists():
            for manifest in list_checkpoints(run)[0][:1]:
                read_all_ranks(run, manifest.filename)  # usable at any instant
        _wait(lambda old=ranks: _children(process.pid) != old, process, 60)  # type: ignore[misc]
    assert process.wait(300) == 0, process.communicate()[0][-4000:]
    assert _num_sessions(run) >= 20
    for name in ("tiny-last.ckpt",):
        both = [read_all_ranks(folder / "runs/tiny" / v, name) for v in ("whole", "killed")]
        for ours, theirs in zip(*both, strict=True):
            for content in (ours, theirs):
                content["training"].pop("random")
            check_equal(ours, theirs)
    assert [m.filename for m in list_checkpoints(run)[0]] == [
        m.filename for m in list_checkpoints(folder / "runs/tiny/whole")[0]
    ]
    assert not list(run.rglob("*.tmp"))


ENDLESS = {"trainer__max_epochs": 100000, "trainer__val_check_interval": 4}


def test_sigterm_saves_and_a_hung_rank_is_named(tmp_path: Path) -> None:
    folder = tiny.write_inputs(tmp_path)
    run = folder / "runs/tiny/v"
    timeout = {"trainer__timeout_s": 12}
    process = _start(folder, "v", 2, **ENDLESS, **timeout)
    last = run / "checkpoints/tiny-last.ckpt.json"
    _wait(last.exists, process, 120)
    os.kill(process.pid, signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert "stopped by SIGTERM after step" in out
    step = json.loads(last.read_text())["global_step"]
    assert f"after step {step};" in out

    before = last.stat().st_mtime
    process = _start(folder, "v", 2, **ENDLESS, **timeout, exp_manager__resume_if_exists="true")
    _wait(lambda: last.stat().st_mtime > before, process, 120)
    ranks = _children(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    try:
        _wait(lambda: not Path(f"/proc/{ranks[0]}").exists(), process, 60)
    finally:
        os.kill(ranks[1], signal.SIGKILL)
    out = process.communicate(timeout=60)[0]
    assert f"resumed from tiny-last.ckpt, step {step}" in out
    assert "no progress for " in out
    expected = "s: rank 1 (tensor-parallel 1, data-parallel 0), process "
    assert expected + str(ranks[1]) in out, out[-3000:]
    assert "does not answer" in out


@pytest.mark.slow
def test_two_nodes_meet(tmp_path: Path) -> None:
    """Two launchers on loopback, as on two machines."""
    import socket

    folder = tiny.write_inputs(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "f1")
    launcher += ("--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1")
    values = {"model__tensor_model_parallel_size": 2, "trainer__max_steps": 4}
    nodes = [_start(folder, "v", 2, *launcher, **values) for _ in range(2)]
    outs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert sum("2 tensor-parallel x 2 data-parallel rank(s)" in out for out in outs) == 1
    assert sum("tiny: finished" in out for out in outs) == 1
    assert (folder / "runs/tiny/v/result.json").exists()
