"""Conversions that are interrupted or killed: what was there stays, and the next one works."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.checkpoint.tiny import random_model, write_megatron
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError
from tpcore.cli import main

# Stops in the middle of the second rank's file, and says so.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from tpcore.checkpoint import torch_file
original, begun = torch_file._add, []
def add(file, name, data):
    original(file, name, data)
    begun.append(name)
    if begun.count("data.pkl") == 2 and name.startswith("data/"):
        print("now", flush=True)
        time.sleep(60)
torch_file._add = add
from tpcore.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_what_was_there_stays(tmp_path, sent):
    source = write_megatron(tmp_path / "source", random_model())
    folder = tmp_path / "disk"
    target = folder / "out"
    before = checkpoint.convert(source, target, to="megatron").to_dict()
    arguments = ["convert", str(source), str(target), "--to", "megatron"]
    arguments += ["--tensor-parallel-size", "2", "--overwrite"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    if sent == signal.SIGINT:
        assert len(said.strip().splitlines()) == 1, said
        assert os.listdir(folder) == ["out"]
    assert checkpoint.inspect(target).to_dict() == before
    assert main(arguments) == 0
    assert checkpoint.inspect(target).tensor_parallel_size == 2
    assert os.listdir(folder) == ["out"]


def test_killed_between_the_two_renamings(tmp_path):
    """The only instant at which nothing has the name; the error says where the old one is."""
    source = write_megatron(tmp_path / "source", random_model())
    target = tmp_path / "out"
    checkpoint.convert(source, target, to="megatron")
    target.rename(tmp_path / ".out.replaced")
    for verb in (
        lambda: checkpoint.load(target),
        lambda: checkpoint.convert(source, target, to="megatron", overwrite=True),
    ):
        with pytest.raises(CheckpointError, match=r"now called .*\.out\.replaced: rename it back"):
            verb()
    (tmp_path / ".out.replaced").rename(target)
    checkpoint.load(target)


def test_a_place_that_is_read_only(tmp_path, capfd):
    source = write_megatron(tmp_path / "source", random_model())
    for to in ("megatron", "nemo", "huggingface"):
        assert main(["convert", str(source), "/proc/out", "--to", to]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert "/proc/out: cannot be written (" in line


def test_remains_of_killed_processes_are_swept(tmp_path, monkeypatch):
    """What a killed reader had unpacked goes with the next file that is unpacked."""
    import tempfile

    from tpcore.checkpoint.per_host import PerHost

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"archive")
    root = tmp_path / f"tpcore-{os.getuid()}"
    kept = PerHost(tmp_path / "a", "test", lambda folder: (folder / "a").touch())
    dead = root / ("0" * 32)
    dead.mkdir()
    (dead / "weights").touch()
    dead.with_suffix(".lock").touch()
    start = time.monotonic()
    also = PerHost(tmp_path / "b", "test", lambda folder: (folder / "b").touch())
    assert time.monotonic() - start < 5
    assert not dead.exists()
    assert (kept.folder / "a").exists()
    assert (also.folder / "b").exists()
