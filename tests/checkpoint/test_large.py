"""A checkpoint of the 345m size: memory that a rank needs, time that a conversion takes."""

import json
import os
import subprocess
import sys

import pytest

from tests.checkpoint.golden import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]


def _run(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.large", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout) if result.stdout.strip() else None


def test_memory_and_time(tmp_path):
    _run("make", tmp_path / "one")
    converted = _run("convert", tmp_path / "one", tmp_path / "eight", "megatron", 8)
    assert converted["seconds"] < 60, converted
    for source in ("one", "eight"):
        report = _run("load", tmp_path / source, 2)
        # The bound is 1.3 times the rank's own shard and one full tensor.
        assert report["peak_bytes"] < 1.3 * report["own_bytes"] + report["largest_bytes"], report
    assert report["own_bytes"] > 600e6
