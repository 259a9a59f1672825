"""A checkpoint of the 345m size: memory that a rank needs, time that a conversion takes."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.checkpoint.golden import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


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


def _assert_streamed(source, target, format, size=1):
    """What is held is one tensor."""
    report = _run("convert", source, target, format, size)
    assert report["peak_bytes"] < 1.6 * report["largest_bytes"], report
    return report


def test_three_layers_are_streamed(tmp_path):
    _run("make", tmp_path / "one", 3)
    report = _assert_streamed(tmp_path / "one", tmp_path / "out.nemo", "nemo")
    assert report["model_bytes"] > 2.2 * report["largest_bytes"]


@pytest.mark.slow
def test_memory_and_time(tmp_path):
    _run("make", tmp_path / "one")
    converted = _assert_streamed(tmp_path / "one", tmp_path / "eight", "megatron", 8)
    assert converted["seconds"] < 60, converted
    for target, format in (("hugging", "huggingface"), ("gzip.nemo", "nemo")):
        report = _assert_streamed(tmp_path / "one", tmp_path / target, format)
        assert report["model_bytes"] > 10 * report["largest_bytes"]
        assert report["peak_bytes"] < 0.25 * report["model_bytes"], report
    with gzip.open(tmp_path / "gzip.nemo") as packed, (tmp_path / "plain.nemo").open("xb") as plain:
        shutil.copyfileobj(packed, plain, 2**20)
    for source in ("one", "eight", "gzip.nemo", "plain.nemo"):
        report = _run("load", tmp_path / source, 2)
        # The bound is 1.3 times the rank's own shard and one full tensor.
        assert report["peak_bytes"] < 1.3 * report["own_bytes"] + report["largest_bytes"], report
    assert report["own_bytes"] > 600e6
