"""torch_dist folders that attack their reader: in `.metadata`, in `common.pt`, in the chunks."""

import dataclasses
import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from tests.checkpoint.hostile_pickles import (
    MARKER,
    call,
    doubled_lists,
    doubled_tuples,
    edit_zip,
    look_up,
    replace_payload,
    text,
)
from tests.checkpoint.tiny import args_of, random_model
from tpcore.checkpoint import names

LAYERS = 2
QKV = "encoder.layers.0.self_attention.linear_qkv.weight"


def write_dist(folder, *, common=True):
    """A folder as Megatron-Core writes it, with a key for each layer."""
    model = random_model(layers=LAYERS)
    keys = names.expand(names.MEGATRON_CORE, LAYERS)
    tensors = {key: model[name] for key, name in keys.items() if name in model}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    content = {"args": args_of(3, 1, num_layers=LAYERS), "checkpoint_version": 3.0, "iteration": 1}
    if common:
        torch.save(content, folder / "common.pt")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_dist(tmp_path / "dist")


def _edit_metadata(folder, change):
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def _place_of(metadata, name):
    return next(index for index in metadata.storage_data if index.fqn == name)


def _move(metadata, name, **changes):
    index = _place_of(metadata, name)
    metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **changes)


def test_the_folder_to_be_spoilt_is_valid(hostile, folder):
    outcome = hostile(folder)
    assert outcome.loaded == "", outcome


def _payloads(command):
    return {
        "reduce": (call("posix.system", command), "posix.system"),
        "inst": (b"(" + command + b"iposix\nsystem\n", "posix.system"),
        "obj": (b"(" + look_up("posix.system") + command + b"o", "posix.system"),
        "stack global": (
            b"\x80\x04" + text("posix") + text("system") + b"\x93(" + command + b"tR",
            "posix.system",
        ),
        "torch's own": (call("torch.load", command), "torch.load"),
        "a listed class": (
            call("torch.distributed.checkpoint.filesystem.FileSystemReader", command),
            "FileSystemReader",
        ),
        "a dtype": (call("torch.float32", command), ""),
        "a persistent id": (command + b"Q", ""),
        "an extension": (b"\x82\x01", "EXT1"),
        "a memo of 2**32 entries": (b"Nr\xff\xff\xff\xff", "4294967295"),
        "bytes of 2**62": (b"\x8e" + b"\xff" * 7 + b"\x3f", ""),
        "lists": (doubled_lists(60), ""),
        "tuples": (b"}" + doubled_tuples(60) + b"Ns", "nested"),
        "nothing": (b"", ""),
        "a number": (b"K\x01", "no metadata"),
    }


@pytest.mark.parametrize("kind", list(_payloads(b"")))
def test_metadata_that_attacks(hostile, folder, tmp_path, kind):
    payload, said = _payloads(text(f"touch {tmp_path}/executed"))[kind]
    (folder / ".metadata").write_bytes(payload + b".")
    hostile.refuses(folder, ".metadata", said)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("slot", ["args", "optimizer", "rng_state", "checkpoint_version"])
def test_common_pt_that_attacks(hostile, folder, tmp_path, slot):
    file = folder / "common.pt"
    torch.save({**torch.load(file, weights_only=False), slot: MARKER}, file)
    payload, said = _payloads(text(f"touch {tmp_path}/executed"))["reduce"]
    file.write_bytes(replace_payload(file.read_bytes(), payload))
    hostile.refuses(folder, "common.pt", said)
    assert not (tmp_path / "executed").exists()


def _replace_chunk(folder, name, content):
    """Put other bytes in the place of a tensor: at the end of its file."""

    def change(metadata):
        place = metadata.storage_data[_place_of(metadata, name)]
        file = folder / place.relative_path
        _move(metadata, name, offset=file.stat().st_size, length=len(content))
        file.write_bytes(file.read_bytes() + content)

    _edit_metadata(folder, change)


def _saved(path, value):
    torch.save(value, path)
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["reduce", "inst", "torch's own"])
def test_chunks_that_attack(hostile, folder, tmp_path, kind):
    payload, said = _payloads(text(f"touch {tmp_path}/executed"))[kind]
    content = replace_payload(_saved(tmp_path / "x", MARKER), payload)
    _replace_chunk(folder, QKV, content)
    hostile.refuses(folder, QKV, said)
    assert not (tmp_path / "executed").exists()


def test_objects_that_attack(hostile, tmp_path):
    """The newest writers keep args among the chunks."""
    folder = write_dist(tmp_path / "dist", common=False)
    payload, said = _payloads(text(f"touch {tmp_path}/executed"))["reduce"]
    content = replace_payload(_saved(tmp_path / "x", [{"args": MARKER}]), payload)
    name = "common_state/shard_0_1"

    def change(metadata):
        place = metadata.storage_data[_place_of(metadata, QKV)]
        file = folder / place.relative_path
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        index = dataclasses.replace(_place_of(metadata, QKV), fqn=name, offset=None, index=None)
        metadata.storage_data[index] = dataclasses.replace(
            place, offset=file.stat().st_size, length=len(content)
        )
        file.write_bytes(file.read_bytes() + content)

    _edit_metadata(folder, change)
    hostile.refuses(folder, name, said)
    assert not (tmp_path / "executed").exists()


def test_damaged_weights(hostile, folder):
    file = folder / "__0_0.distcp"
    raw = file.read_bytes()
    weights = random_model(layers=LAYERS)["blocks.1.mlp.dense_in.weight"].numpy().tobytes()
    at = raw.index(weights) + 100
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    outcome = hostile.refuses(folder, "encoder.layers.1.mlp.linear_fc1.weight", "checksum")
    assert outcome.inspected == ""


CHUNKS = {
    "another shape": lambda path: _saved(path, torch.ones(3)),
    "another dtype": lambda path: _saved(path, torch.ones(48, 16, dtype=torch.int64)),
    "no tensor": lambda path: _saved(path, {"a": 1}),
    "sparse": lambda path: _saved(path, torch.ones(48, 16).to_sparse()),
    "compressed": lambda path: edit_zip(_saved(path, torch.ones(48, 16)), {}, method=8),
    "no torch file": lambda path: b"x" * 1000,
    "nothing": lambda path: b"",
    "cut off": lambda path: _saved(path, torch.ones(48, 16))[:-100],
}


@pytest.mark.parametrize("kind", list(CHUNKS))
def test_chunks_that_are_something_else(hostile, folder, tmp_path, kind):
    _replace_chunk(folder, QKV, CHUNKS[kind](tmp_path / "x"))
    hostile.refuses(folder, QKV)


@pytest.mark.parametrize(
    "change",
    [
        {"relative_path": "../common.pt"},
        {"relative_path": "/etc/passwd"},
        {"relative_path": ".."},
        {"relative_path": ""},
        {"relative_path": b"x"},
        {"relative_path": "missing"},
        {"relative_path": "fifo"},
        {"relative_path": "zero"},
        {"relative_path": "common.pt"},
        {"offset": -1},
        {"offset": 2**62},
        {"offset": 2**80},
        {"offset": 1.5},
        {"length": 2**62},
        {"length": -1},
        {"length": 0},
        {"length": float("nan")},
    ],
    ids=str,
)
def test_places_that_lie(hostile, folder, change):
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    _edit_metadata(folder, lambda metadata: _move(metadata, QKV, **change))
    hostile.refuses(folder)


def _entry(metadata, **changes):
    entry = metadata.state_dict_metadata[QKV]
    metadata.state_dict_metadata[QKV] = dataclasses.replace(entry, **changes)


def _chunk(metadata, **changes):
    entry = metadata.state_dict_metadata[QKV]
    _entry(metadata, chunks=[dataclasses.replace(entry.chunks[0], **changes)])


SIZES = {
    "a shape that overflows": lambda m: _entry(m, size=torch.Size((2**40, 2**40))),
    "a negative size": lambda m: _entry(m, size=(-48, 16)),
    "a size that is NaN": lambda m: _entry(m, size=(float("nan"), 16)),
    "a text": lambda m: _entry(m, size="48"),
    "no shape": lambda m: _entry(m, size=None),
    "no chunks": lambda m: _entry(m, chunks=[]),
    "the same chunk twice": lambda m: _entry(m, chunks=m.state_dict_metadata[QKV].chunks * 2),
    "a chunk outside": lambda m: _chunk(m, offsets=torch.Size((1, 0))),
    "a chunk too small": lambda m: _chunk(m, sizes=torch.Size((47, 16))),
    "too many chunks": lambda m: _entry(m, chunks=m.state_dict_metadata[QKV].chunks * 20_000),
    "a known name that is no entry": lambda m: m.state_dict_metadata.update({QKV: 1}),
    "an unknown name": lambda m: m.state_dict_metadata.update(
        {"a\n\x1b[2J": m.state_dict_metadata[QKV]}
    ),
    "a name that is none": lambda m: m.state_dict_metadata.update({1: 2}),
    "no places": lambda m: m.storage_data.clear(),
    "places that are none": lambda m: setattr(m, "storage_data", [1]),
    "entries that are none": lambda m: setattr(m, "state_dict_metadata", None),
}


@pytest.mark.parametrize("kind", list(SIZES))
def test_sizes_that_lie(hostile, folder, kind):
    _edit_metadata(folder, SIZES[kind])
    hostile.refuses(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"sharded_backend": "zarr"}', b'{"a":' * 100_000, b"\xff", b"[" * 1_000_000],
    ids=lambda content: str(content[:30]),
)
def test_descriptions_that_lie(hostile, folder, content):
    (folder / "metadata.json").write_bytes(content)
    hostile.refuses(folder, "metadata.json")


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt"])
@pytest.mark.parametrize("kind", ["large", "fifo", "folder"])
def test_files_of_another_kind(hostile, folder, name, kind):
    file = folder / name
    if kind == "large":
        with file.open("r+b") as opened:
            opened.truncate(3 * 2**30)
        hostile.refuses(folder)
        return
    file.unlink()
    file.mkdir() if kind == "folder" else os.mkfifo(file)
    outcome = hostile(folder)
    # Only regular files are looked at; without common.pt or metadata.json the rest may do.
    assert outcome.loaded in ("CheckpointError", ""), outcome
