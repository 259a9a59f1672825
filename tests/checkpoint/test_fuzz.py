"""Damaged checkpoints of every container: only CheckpointError comes out, and soon.

`TPCORE_FUZZ_SECONDS` sets the seconds for all containers together (10; 120 among the slow tests).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.fuzz_process import CONTAINERS, SECONDS_EACH


def _fuzz(seconds, *containers):
    process = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.fuzz_process", f"{seconds:g}", *containers],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120 + seconds + SECONDS_EACH,
    )
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    counts = re.findall(r"(\d+) files, (\d+) refused", process.stdout)
    assert len(counts) == len(containers)
    assert all(int(files) > 0 and int(refused) > 0 for files, refused in counts)


def _seconds(default):
    return float(os.environ.get("TPCORE_FUZZ_SECONDS", default))


def test_damaged_files():
    _fuzz(_seconds(10), *CONTAINERS)


@pytest.mark.slow
def test_damaged_files_for_two_minutes():
    _fuzz(_seconds(120), *CONTAINERS)
