import tempfile

import pytest

from tests.checkpoint.hostile_process import hostile_reader


@pytest.fixture(scope="session")
def hostile():
    with hostile_reader() as reader:
        yield reader


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty TMPDIR."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder
