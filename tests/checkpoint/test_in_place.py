"""What a rank reads of a file, and what the ranks of a machine do once for all of them."""

import gc
import io
import os
import tarfile
import tempfile

import pytest
import torch

from tests.checkpoint import golden, test_nemo, tiny
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError, stored
from tpcore.checkpoint import io as verbs
from tpcore.checkpoint.io import _checked, _read
from tpcore.checkpoint.untrusted import archive

RANKS = [test_nemo.encoder(rank, 2) for rank in range(2)]


def _write(path, packed, **options):
    options = {"config": {}, "encoder_config": test_nemo.ENCODER, "packed": packed, **options}
    return test_nemo.write_nemo(path, RANKS, **options)


def _files(folder):
    return {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_a_plain_nemo_file_is_read_where_it_is(tmp_path, temporary):
    path = _write(tmp_path / "m.nemo", packed=False)
    state = _read(path, None, {})
    assert _files(temporary) == {}
    assert {part[0] for part in state.source.parts} == {path}
    test_nemo.assert_encoder(state)
    checkpoint.load(path)
    assert _files(temporary) == {}


def test_of_a_gzip_one_only_what_is_needed_is_unpacked(tmp_path, temporary, monkeypatch):
    monkeypatch.setattr(archive, "MAX_SMALL_BYTES", 100_000)
    artifacts = {"large.bin": "x" * 200_000, "small.txt": "y" * 20_000}
    path = _write(tmp_path / "m.nemo", packed=True, artifacts=artifacts)
    state = _read(path, None, {})
    test_nemo.assert_encoder(state)
    unpacked = _files(temporary)
    assert "large.bin" not in unpacked
    assert {"model_weights.ckpt", "model_config.yaml", "small.txt"} <= unpacked.keys()
    del state
    gc.collect()
    assert _files(temporary) == {}


def test_a_second_process_does_not_unpack_again(tmp_path, temporary, monkeypatch):
    path = _write(tmp_path / "m.nemo", packed=True)
    first = _read(path, None, {})

    def fail(*_):
        raise AssertionError("unpacked twice")

    monkeypatch.setattr(archive, "scan", fail)
    test_nemo.assert_encoder(_read(path, None, {}))
    del first


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_member_that_is_named_and_too_large_is_an_error(tmp_path, temporary, monkeypatch, packed):
    monkeypatch.setattr(archive, "MAX_SMALL_BYTES", 100_000)
    monkeypatch.setattr(archive.Archive.read, "__defaults__", (100_000,))
    config = {"class_labels": {"class_labels_file": "labels.csv"}}
    artifacts = {"labels.csv": "x" * 200_000}
    path = _write(tmp_path / "m.nemo", packed=packed, artifacts=artifacts, config=config)
    with pytest.raises(CheckpointError, match=r"m\.nemo: labels\.csv has 200000 bytes; at most"):
        checkpoint.inspect(path)


def test_weights_of_before_torch_1_6_in_a_plain_archive(tmp_path, temporary):
    members = {}
    with tarfile.open(_write(tmp_path / "new.nemo", packed=False)) as old:
        for entry in old.getmembers():
            members[entry.name] = old.extractfile(entry).read()
    with tarfile.open(tmp_path / "old.nemo", "w") as new:
        for name, data in members.items():
            if name.endswith(".ckpt"):
                buffer = io.BytesIO()
                content = torch.load(io.BytesIO(data), weights_only=True)
                torch.save(content, buffer, _use_new_zipfile_serialization=False)
                data = buffer.getvalue()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
    test_nemo.assert_encoder(_read(tmp_path / "old.nemo", None, {}))


def _bytes_read(monkeypatch, path, size):
    """By the last rank of a group, of tensors; and what it holds then."""
    counted = []
    original = stored.FilePiece._span

    def span(self, start, count):
        counted.append(count * self.dtype.itemsize)
        return original(self, start, count)

    monkeypatch.setattr(stored.FilePiece, "_span", span)
    state = _read(path, None, {})
    rows = state.vocab_rows
    own = sum(state.shard(n, size - 1, size, rows).nbytes for n in state.tensors)
    return sum(counted), own


@pytest.mark.parametrize("kind", ["nemo plain", "nemo gzip", "megatron", "dist", "huggingface"])
@pytest.mark.parametrize("size", [1, 4])
def test_a_rank_reads_little_but_its_own_part(tmp_path, monkeypatch, kind, size):
    if kind.startswith("nemo"):
        path = _write(tmp_path / "m.nemo", packed=kind.endswith("gzip"))
    elif kind == "dist":
        path = golden.COMMITTED / "mcore0.16.1_dist_tp2" / "ckpt"
    else:
        path = tiny.write_megatron(tmp_path / "a", tiny.random_model(), tp=2)
        if kind == "huggingface":
            checkpoint.convert(path, tmp_path / "b", to="huggingface")
            path = tmp_path / "b"
    read, own = _bytes_read(monkeypatch, path, size)
    whole, _ = _bytes_read(monkeypatch, path, 1)
    # Columns are cut out of rows that are read whole, and copies on other ranks are compared.
    assert own <= read <= whole
    if size == 4:
        assert read < 0.75 * whole


def test_inspect_reads_no_tensor(tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(stored.FilePiece, "_span", fail)
    monkeypatch.setattr(verbs, "check_records", fail)
    monkeypatch.setattr(verbs, "check_embedded", fail)
    names = ("v2.0_tp2", "mcore0.16.1_dist_tp2", "hf_bert_pretraining", "nemo_tp2_v3")
    for name in names:
        assert checkpoint.inspect(golden.Golden(golden.COMMITTED / name).checkpoint).parameters
    assert checkpoint.inspect(_write(tmp_path / "m.nemo", packed=False)).parameters


@pytest.mark.parametrize("kind", ["nemo", "megatron", "dist"])
def test_checksums_are_compared_once_while_somebody_loads(tmp_path, temporary, monkeypatch, kind):
    path = {
        "nemo": lambda: _write(tmp_path / "m.nemo", packed=False),
        "megatron": lambda: tiny.write_megatron(tmp_path / "a", tiny.random_model(), tp=2),
        "dist": lambda: golden.COMMITTED / "mcore0.16.1_dist_tp2" / "ckpt",
    }[kind]()
    calls = []
    for name in ("check_records", "check_embedded"):
        original = getattr(verbs, name)

        def counted(*args, original=original):
            calls.append(args)
            original(*args)

        monkeypatch.setattr(verbs, name, counted)
    state = _read(path, None, {})
    held = _checked(state, 0)
    once = len(calls)
    assert once >= 2
    also = _checked(state, 1)
    assert len(calls) == once
    assert [note.folder for note in also] != [note.folder for note in held] or len(held) == 1
    del held, also
    gc.collect()
    assert _files(temporary) == {}
    _checked(state)
    assert len(calls) == 2 * once


def test_damage_is_found_by_every_process(tmp_path, temporary):
    path = _write(tmp_path / "m.nemo", packed=False)
    state = _read(path, None, {})
    raw = bytearray(path.read_bytes())
    tensor = next(iter(RANKS[0].values())).numpy().tobytes()
    raw[raw.index(tensor[:64])] ^= 1
    path.write_bytes(raw)
    del state
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"m\.nemo: mp_rank_00/.*differs from its check"):
            checkpoint.load(path)


def test_without_a_place_for_notes_checksums_are_compared_all_the_same(tmp_path, monkeypatch):
    path = tiny.write_megatron(tmp_path / "a", tiny.random_model())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    checkpoint.load(path)
    (file,) = path.rglob("*.pt")
    raw = bytearray(file.read_bytes())
    raw[raw.index(tiny.random_model()["final_norm.weight"].numpy().tobytes())] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        checkpoint.load(path)
    packed = _write(tmp_path / "m.nemo", packed=True)
    with pytest.raises(CheckpointError, match="TMPDIR chooses another"):
        checkpoint.load(packed)
    assert os.listdir(tmp_path) == ["a", "m.nemo"] or len(os.listdir(tmp_path)) == 2
