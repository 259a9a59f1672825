"""Torch files written one tensor after the other: torch reads them as if it had written them."""

import argparse
import zipfile

import pytest
import torch

from tpcore.checkpoint import CheckpointError, torch_file
from tpcore.checkpoint.stored import FilePiece, StoredTensor, file_pieces
from tpcore.checkpoint.untrusted.unpickle import check_records, load_pickle
from tpcore.checkpoint.untrusted.zip_directory import read_directory

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "matrix": torch.randn(70, 50, generator=GENERATOR),
    "columns": torch.randn(40, 30, generator=GENERATOR).t(),
    "half": torch.randn(9, generator=GENERATOR).half(),
    "bfloat16": torch.randn(3, 3, generator=GENERATOR).bfloat16(),
    "double": torch.randn(2, generator=GENERATOR).double(),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
}
FACTS = {"args": argparse.Namespace(a=1, dtype=torch.float16), "iteration": 7, "version": 3.0}


def _content(order=None):
    def described(name, tensor):
        def read():
            if order is not None:
                order.append(name)
            return tensor

        return StoredTensor(tuple(tensor.shape), tensor.dtype, read)

    model = {name: described(name, tensor) for name, tensor in TENSORS.items()}
    return {**FACTS, "model": {"inner": model, "again": {"matrix": model["matrix"]}}}


def _assert_holds(loaded):
    assert {name: loaded[name] for name in FACTS} == FACTS
    for name, tensor in TENSORS.items():
        read = loaded["model"]["inner"][name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(read, tensor), name
        assert read.is_contiguous(), name
    assert torch.equal(loaded["model"]["again"]["matrix"], TENSORS["matrix"])


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_torch_reads_it(tmp_path, monkeypatch, wide):
    """Also with the fields that files of more than 2 GiB have."""
    if wide:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 2000)
        monkeypatch.setattr(torch_file, "_WIDE_FROM_BYTES", 1000)
    file, order = tmp_path / "x.pt", []
    torch_file.save(_content(order), file)
    assert order == list(TENSORS)  # each once, in the order of the object
    assert (b"PK\x06\x06" in file.read_bytes()) == wide
    for mapped in (False, True):
        with torch.serialization.safe_globals([argparse.Namespace]):
            _assert_holds(torch.load(file, weights_only=True, mmap=mapped))
    loaded = load_pickle(file)
    _assert_holds(loaded)
    pieces = file_pieces(loaded["model"]["inner"], file, "x")
    assert all(isinstance(piece, FilePiece) for piece in pieces.values())


def test_every_record_is_aligned_and_has_a_checksum(tmp_path):
    file = tmp_path / "x.pt"
    torch_file.save(_content(), file)
    raw = bytearray(file.read_bytes())
    records = read_directory(bytes(raw), "x")
    assert len(records) == len(TENSORS) + 3
    for name, record in records.items():
        assert record.offset % 64 == 0, name
        assert record.crc or not record.size, name
    check_records(file)
    raw[records["archive/data/0"].offset] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"archive/data/0 differs from its checksum"):
        check_records(file)


def test_equal_content_makes_equal_files(tmp_path):
    torch_file.save(_content(), tmp_path / "a.pt")
    torch_file.save(_content(), tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_who_only_reads_reads_the_same(tmp_path):
    order = []
    torch_file.save(_content(order), tmp_path / "x.pt", write=False)
    assert order == list(TENSORS)
    assert not list(tmp_path.iterdir())


def test_after_an_error_the_other_tensors_are_still_read(tmp_path, monkeypatch, capsys):
    """Reading may be collective: ranks that could write wait for the one that could not."""
    order = []

    def fail(tensor, described):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_file, "_memory", fail)
    with pytest.raises(OSError, match="No space left"):
        torch_file.save(_content(order), tmp_path / "x.pt")
    assert order == list(TENSORS)
    with pytest.raises(OSError, match="exists"):
        torch_file.save(_content(order), tmp_path / "x.pt")
    assert order == 2 * list(TENSORS)
    assert capsys.readouterr().err == ""
