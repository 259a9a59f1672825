"""A disk that is full: one clear line, nothing half-written, and what was there stays."""

import os
import subprocess
import sys

import pytest

from tests.checkpoint.tiny import random_model, write_megatron
from tpcore import checkpoint
from tpcore.cli import main

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from tpcore.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def source(tmp_path):
    return write_megatron(tmp_path / "source", random_model())


def _assert_untouched(folder, before):
    assert checkpoint.inspect(folder / "out").to_dict() == before
    assert sorted(path.name for path in folder.iterdir()) == ["out"]


@pytest.mark.parametrize("to", ["megatron", pytest.param("huggingface", marks=pytest.mark.slow)])
def test_a_limit_on_the_size_of_files(source, tmp_path, to):
    folder = tmp_path / "disk"
    before = checkpoint.convert(source, folder / "out", to=to).to_dict()
    arguments = ["convert", str(source), str(folder / "out"), "--to", to, "--overwrite"]
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert run.returncode == 2
    (line,) = run.stderr.strip().splitlines()
    assert f"{folder / 'out'}: cannot be written (" in line
    assert "size of files" in line or "File too large" in line
    assert "inline_container" not in line
    _assert_untouched(folder, before)


@pytest.mark.parametrize("to", ["megatron", "nemo", "huggingface"])
def test_a_full_file_system(source, tmp_path, to, capfd):
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs privileges that this process lacks")
    try:
        before = checkpoint.convert(source, folder / "out", to=to).to_dict()
        filler = folder / "filler"
        filler.write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize - 8192))
        arguments = ["convert", str(source), str(folder / "out"), "--to", to, "--overwrite"]
        assert main(arguments) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert f"{folder / 'out'}: cannot be written (No space left on device" in line
        filler.unlink()
        _assert_untouched(folder, before)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
