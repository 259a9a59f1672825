"""Archives are unpacked once for all processes, and the last of them removes what was unpacked."""

import gc
import multiprocessing
import os
import tempfile

import pytest
import torch

from tests.checkpoint import test_nemo, tiny
from tests.helpers.ranks import run_ranks
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError
from tpcore.checkpoint.per_host import PerHost


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"archive")
    return path


def _left(folder):
    return [path for path in folder.rglob("*") if path.name != f"tpcore-{os.getuid()}"]


def _take(path, temporary, calls, ready, done):
    tempfile.tempdir = str(temporary)

    def fill(folder):
        with calls.get_lock():
            calls.value += 1
        (folder / "content").write_text("whole")

    unpacked = PerHost(path, "test", fill)
    ready.wait(60)  # all are here at once
    assert (unpacked.folder / "content").read_text() == "whole"
    done.wait(60)
    del unpacked
    gc.collect()


def test_four_processes_unpack_once(archive, temporary):
    fork = multiprocessing.get_context("fork")
    calls, ready, done = fork.Value("i", 0), fork.Barrier(4), fork.Barrier(4)
    arguments = (archive, temporary, calls, ready, done)
    processes = [fork.Process(target=_take, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0] * 4
    assert calls.value == 1
    assert _left(temporary) == []


def test_another_content_is_unpacked_anew(archive, temporary):
    first = PerHost(archive, "test", lambda folder: (folder / "a").touch())
    archive.write_bytes(b"a longer archive")
    second = PerHost(archive, "test", lambda folder: (folder / "b").touch())
    assert first.folder != second.folder
    assert (first.folder / "a").exists()
    assert (second.folder / "b").exists()
    del first
    gc.collect()
    assert (second.folder / "b").exists()
    del second
    gc.collect()
    assert _left(temporary) == []


def test_remains_of_a_killed_process_are_replaced(archive, temporary):
    unpacked = PerHost(archive, "test", lambda folder: (folder / "a").touch())
    folder = unpacked.folder
    del unpacked
    gc.collect()
    assert not folder.exists()
    folder.mkdir()
    (folder / "half").touch()
    unpacked = PerHost(archive, "test", lambda folder: (folder / "a").touch())
    assert sorted(path.name for path in unpacked.folder.iterdir()) == [".complete", "a"]


def test_an_error_leaves_nothing_that_counts_as_unpacked(archive, temporary):
    def fail(folder):
        (folder / "half").touch()
        raise CheckpointError("no room")

    with pytest.raises(CheckpointError, match="no room"):
        PerHost(archive, "test", fail)
    unpacked = PerHost(archive, "test", lambda folder: (folder / "a").touch())
    assert not (unpacked.folder / "half").exists()


@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_a_folder_of_somebody_else_is_not_used(archive, temporary, tmp_path, kind):
    root = temporary / f"tpcore-{os.getuid()}"
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        root.symlink_to(tmp_path / "elsewhere")
    else:
        root.mkdir()
        root.chmod(0o777)
    unpacked = PerHost(archive, "test", lambda folder: (folder / "a").touch())
    assert not list(root.iterdir())
    assert unpacked.folder.parent.parent == temporary


def _check_nemo(tp, path):
    model = checkpoint.load(path, tp=tp, head=None)
    rows = model.state_dict()["embeddings.word_embeddings.weight"]
    whole = test_nemo.MODEL["embeddings.word_embeddings.weight"]
    assert torch.equal(rows, whole.chunk(tp.size)[tp.rank])


def test_ranks_read_one_nemo_file(tmp_path):
    ranks = [test_nemo.encoder(rank, 2) for rank in range(2)]
    path = test_nemo.write_nemo(
        tmp_path / "m.nemo", ranks, config={}, encoder_config=test_nemo.ENCODER
    )
    assert tiny.ROWS % 4 == 0
    run_ranks(_check_nemo, 4, path)
