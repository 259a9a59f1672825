"""Zip files, safetensors, JSON and folders that attack their reader: one line each, no harm."""

import json
import os
import struct
import zipfile
import zlib

import pytest
import torch

from tests.checkpoint.hostile_pickles import edit_zip
from tests.checkpoint.tiny import random_model, write_megatron
from tpcore import checkpoint

LARGE = 3 * 2**30


@pytest.fixture(scope="module")
def megatron_file(tmp_path_factory):
    root = write_megatron(tmp_path_factory.mktemp("valid"), random_model(layers=1))
    return next(root.rglob("*.pt")).read_bytes()


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valid")
    write_megatron(folder / "a", random_model(layers=1))
    checkpoint.convert(folder / "a", folder / "b", to="huggingface")
    return {path.name: path.read_bytes() for path in (folder / "b").iterdir()}


def _write_folder(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_the_files_to_be_spoilt_are_valid(hostile, tmp_path, megatron_file, huggingface_folder):
    """So that a refusal below is due to what was done to them."""
    (tmp_path / "x.pt").write_bytes(megatron_file)
    assert hostile(tmp_path / "x.pt").loaded == ""
    rewritten = edit_zip(megatron_file, {})
    (tmp_path / "y.pt").write_bytes(rewritten)
    assert hostile(tmp_path / "y.pt").loaded == ""
    assert hostile(_write_folder(tmp_path / "z", huggingface_folder)).loaded == ""


# --- zip files -----------------------------------------------------------------------------------


def _compressed(raw):
    return edit_zip(raw, {}, method=zipfile.ZIP_DEFLATED)


def _bomb(raw):
    """A record that unpacks to 512 MiB of zeros, packed a thousand times smaller."""
    packer = zlib.compressobj(1, wbits=-15)
    packed = b"".join(packer.compress(bytes(2**22)) for _ in range(2**7)) + packer.flush()
    return _with_record(raw, "data/bomb", method=8, packed=packed, size=2**29)


def _with_record(raw, name, *, method=0, packed=b"", size=0):
    """Put one more record behind the others, under a name that is there."""
    end = raw.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", raw[end + 16 : end + 20])[0]
    count = struct.unpack("<H", raw[end + 10 : end + 12])[0]
    full = b"model_optim_rng/" + name.encode()
    fields = (20, 0, method, 0, 0, 0, len(packed), size, len(full), 0)
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", *fields) + full + packed
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, *fields, 0, 0, 0, 0, start) + full
    directory = raw[start:end] + entry
    count += 1
    tail = (0, 0, count, count, len(directory), start + len(local), 0)
    return raw[:start] + local + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", *tail)


def _patch(raw, at, data):
    return raw[:at] + data + raw[at + len(data) :]


def _entry_at(raw, name):
    """Where the directory's entry of a record begins."""
    start = raw.index(b"PK\x01\x02")
    at = raw.index(name.encode(), start)
    return raw.rindex(b"PK\x01\x02", start, at)


def _sizes(raw, name, packed, size):
    return _patch(raw, _entry_at(raw, name) + 20, struct.pack("<2I", packed, size))


ZIPS = {
    "compressed records": (_compressed, "compressed"),
    "a bomb": (lambda raw: _bomb(edit_zip(raw, {})), "data/bomb' is compressed"),
    "a record twice": (
        lambda raw: _with_record(edit_zip(raw, {}), "data.pkl"),
        "data.pkl' occurs twice",
    ),
    "a record twice, in capitals": (
        lambda raw: _with_record(edit_zip(raw, {}), "DATA.pkl"),
        "DATA.pkl' occurs twice",
    ),
    "a record in another folder": (
        lambda raw: _with_record(edit_zip(raw, {}), "../x").replace(
            b"model_optim_rng/../x", b"another_folder_/../x"
        ),
        "more than one folder",
    ),
    "a record larger than the file": (
        lambda raw: _sizes(edit_zip(raw, {}), "data/0", 2**31, 2**31),
        "data/0",
    ),
    "a record smaller than its tensor": (
        lambda raw: edit_zip(raw, {"data/0": lambda record: record[:-4]}),
        "claims",
    ),
    "a record that is empty": (lambda raw: edit_zip(raw, {"data/0": lambda record: b""}), "claims"),
    "a record that is missing": (
        lambda raw: edit_zip(raw, {"data/0": lambda record: None}),
        "missing",
    ),
    "no pickle": (lambda raw: edit_zip(raw, {"data.pkl": lambda record: None}), "no torch"),
    "an empty pickle": (lambda raw: edit_zip(raw, {"data.pkl": lambda record: b""}), "cut off"),
    "two records in one place": (
        lambda raw: _patch(
            edit_zip(raw, {}),
            _entry_at(edit_zip(raw, {}), "data/1") + 42,
            struct.pack("<I", 0),
        ),
        "data/1",
    ),
    "a record elsewhere": (
        lambda raw: _patch(
            edit_zip(raw, {}), _entry_at(edit_zip(raw, {}), "data/1") + 42, b"\xff\xff\xff\x7f"
        ),
        "data/1",
    ),
    "encrypted": (
        lambda raw: _patch(
            edit_zip(raw, {}), _entry_at(edit_zip(raw, {}), "data/1") + 8, b"\x01\x00"
        ),
        "data/1",
    ),
    "more entries than there are": (
        lambda raw: edit_zip(raw, {})[:-14] + b"\xff\x00" * 2 + edit_zip(raw, {})[-10:],
        "directory",
    ),
    "a directory of 4 GiB": (
        lambda raw: edit_zip(raw, {})[:-10] + b"\xfe\xff\xff\xff" + edit_zip(raw, {})[-6:],
        "directory",
    ),
    "64-bit sizes that lie": (
        lambda raw: _patch(raw, raw.rindex(b"PK\x06\x06") + 40, b"\xff" * 7 + b"\x7f"),
        "",
    ),
    "a 64-bit end elsewhere": (
        lambda raw: _patch(raw, raw.rindex(b"PK\x06\x07") + 8, bytes(8)),
        "end",
    ),
    "something before the archive": (lambda raw: raw[:4] + bytes(1000) + raw, ""),
    "a second archive behind": (lambda raw: raw + edit_zip(raw, {}), "directory"),
    "a comment": (lambda raw: edit_zip(raw, {})[:-2] + b"\x04\x00abcd", ""),
    "a torch script": (
        lambda raw: _with_record(edit_zip(raw, {}), "constants.pkl"),
        "no torch checkpoint",
    ),
    "damaged weights": (
        lambda raw: _patch(raw, raw.index(b"/data/0") + 1000, b"damaged"),
        "checksum",
    ),
}


@pytest.mark.parametrize("name", list(ZIPS))
def test_zip_files_that_lie(hostile, tmp_path, name, megatron_file):
    spoil, said = ZIPS[name]
    path = tmp_path / "x.pt"
    path.write_bytes(spoil(megatron_file))
    hostile.refuses(path, said)


def test_a_pickle_of_any_size_is_not_read(hostile, tmp_path, megatron_file):
    path = tmp_path / "x.pt"
    path.write_bytes(edit_zip(megatron_file, {"data.pkl": lambda record: bytes(40 * 2**20)}))
    hostile.refuses(path, "data.pkl has 41943040 bytes")


def test_a_large_file_of_zeros(hostile, tmp_path):
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.truncate(LARGE)
    hostile.refuses(path)


def test_a_large_file_that_begins_as_one(hostile, tmp_path, megatron_file):
    path = tmp_path / "x.pt"
    path.write_bytes(megatron_file)
    with path.open("r+b") as file:
        file.truncate(2**29)
    hostile.refuses(path, "truncated")


# --- safetensors ---------------------------------------------------------------------------------


def _safetensors(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(shape=(4,), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "nothing": b"",
    "half a length": b"\x10\x00",
    "a header of 2**63 bytes": _safetensors(b"{}", length=2**63),
    "a header beyond the file": _safetensors(b"{}", length=1000),
    "a header of 90 MB": _safetensors(b'{"a":' + b" " * 90_000_000 + b"1}"),
    "no JSON": _safetensors(b"not JSON"),
    "no UTF-8": _safetensors(b'{"\xff\xfe": 1}'),
    "a list": _safetensors([]),
    "deeply nested": _safetensors(b'{"a":' * 100_000),
    "deeply nested lists": _safetensors(b"[" * 100_000),
    "a negative size": _safetensors({"a": _entry((-4,))}, bytes(16)),
    "a size that is NaN": _safetensors(b'{"a": {"shape": [NaN]}}', bytes(16)),
    "a size beyond 64 bits": _safetensors({"a": _entry((2**70,))}, bytes(16)),
    "a shape that overflows": _safetensors({"a": _entry((2**40, 2**40))}, bytes(16)),
    "offsets outside": _safetensors({"a": _entry((4,), (2**40, 2**40 + 16))}, bytes(16)),
    "offsets in reverse": _safetensors({"a": _entry((4,), (16, 0))}, bytes(16)),
    "offsets that overlap": _safetensors({"a": _entry(), "b": _entry()}, bytes(16)),
    "more than its offsets": _safetensors({"a": _entry((400,))}, bytes(16)),
    "an unknown dtype": _safetensors({"a": _entry(dtype="__import__")}, bytes(16)),
    "an unknown parameter": _safetensors({"a\n\x1b[2J": _entry()}, bytes(16)),
    "integers": _safetensors({"embeddings.word_embeddings.weight": _entry(dtype="I32")}, bytes(16)),
    "a pickle": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.",
    "data behind": _safetensors({"a": _entry()}, bytes(64)),
    "no tensors": _safetensors({"__metadata__": {"format": "pt"}}),
    "metadata of any kind": _safetensors({"__metadata__": {"format": [1]}}),
}


@pytest.mark.parametrize("name", list(HEADERS))
def test_safetensors_that_lie(hostile, tmp_path, name, huggingface_folder):
    files = {**huggingface_folder, "model.safetensors": HEADERS[name]}
    hostile.refuses(_write_folder(tmp_path / "x", files))


def test_a_large_safetensors_file_of_zeros(hostile, tmp_path, huggingface_folder):
    folder = _write_folder(tmp_path / "x", huggingface_folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(0)
        file.truncate(LARGE)
    hostile.refuses(folder, "model.safetensors")


# --- JSON ----------------------------------------------------------------------------------------


CONFIGS = {
    "nothing": b"",
    "no UTF-8": b'{"model_type": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "a number": b"1",
    "deeply nested": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deeply nested lists": b"[" * 1_000_000,
    "an integer of 5,000 digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "an integer of 1,000,000 digits": b'{"hidden_size": ' + b"9" * 1_000_000 + b"}",
    "many small lists": b'{"a": [' + b"[]," * 2**20 + b"1]}",
    "many small objects": b'{"a": [' + b"{}," * 2**20 + b"1]}",
    "two values": b"{} {}",
    "no end": b'{"model_type": "megatron-bert"',
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_json_that_attacks(hostile, tmp_path, name, huggingface_folder):
    files = {**huggingface_folder, "config.json": CONFIGS[name]}
    hostile.refuses(_write_folder(tmp_path / "x", files), "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": float("nan")},
        {"hidden_size": float("inf")},
        {"hidden_size": 1e308},
        {"hidden_size": -16},
        {"hidden_size": [16]},
        {"hidden_size": {"_target_": "os.system", "command": "touch executed"}},
        {"num_hidden_layers": 10**18},
        {"num_attention_heads": 0},
        {"num_attention_heads": True},
        {"vocab_size": 2**62},
        {"layer_norm_eps": 0},
        {"layer_norm_eps": -1},
        {"hidden_dropout_prob": 2.0},
        {"hidden_act": "a\nb\x1b[2J" * 1000},
        {"hidden_act": {"_target_": "os.system"}},
        {"model_type": "../../etc/passwd"},
        {"quantization_config": {"_target_": "os.system"}},
        {"pruned_heads": [[[[1]]]]},
        {"is_decoder": True},
    ],
    ids=lambda change: str(change)[:50],
)
def test_settings_that_attack(hostile, tmp_path, change, huggingface_folder):
    config = json.loads(huggingface_folder["config.json"])
    files = {**huggingface_folder, "config.json": json.dumps({**config, **change}).encode()}
    said = {"layer_norm_eps": "layernorm_eps", "hidden_dropout_prob": "hidden_dropout"}
    name = next(iter(change))
    hostile.refuses(_write_folder(tmp_path / "x", files), said.get(name, name))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_large_json(hostile, tmp_path, name, huggingface_folder):
    folder = _write_folder(tmp_path / "x", huggingface_folder)
    with (folder / name).open("ab") as file:
        file.truncate(LARGE)
    hostile.refuses(folder, name, "too large")


@pytest.mark.parametrize(
    "target",
    ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".", 1, None, ["a"]],
    ids=str,
)
def test_indices_that_lead_elsewhere(hostile, tmp_path, target, huggingface_folder):
    files = dict(huggingface_folder)
    weights = files.pop("model.safetensors")
    (tmp_path / "outside.safetensors").write_bytes(weights)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": target}}).encode()
    hostile.refuses(_write_folder(tmp_path / "x", files))


@pytest.mark.parametrize(
    "target", ["model.safetensors.index.json", "config.json", "folder", "fifo", "zero", "missing"]
)
def test_indices_that_name_no_weights(hostile, tmp_path, target, huggingface_folder):
    files = dict(huggingface_folder)
    del files["model.safetensors"]
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": target}}).encode()
    folder = _write_folder(tmp_path / "x", files)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    hostile.refuses(folder, target)


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"../../etc", b"\xff\xfe", b"release\nrelease", b"9" * 1000, b"-1", b"1e3", b"\x1b[2J"],
    ids=str,
)
def test_trackers_that_lead_elsewhere(hostile, tmp_path, content):
    root = write_megatron(tmp_path / "x", random_model(layers=1))
    (root / "latest_checkpointed_iteration.txt").write_bytes(content)
    hostile.refuses(root, "latest_checkpointed_iteration.txt")


def test_a_large_tracker(hostile, tmp_path):
    root = write_megatron(tmp_path / "x", random_model(layers=1))
    with (root / "latest_checkpointed_iteration.txt").open("wb") as file:
        file.truncate(LARGE)
    hostile.refuses(root, "latest_checkpointed_iteration.txt")


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "zero"])
def test_files_of_another_kind(hostile, tmp_path, kind):
    root = write_megatron(tmp_path / "x", random_model(layers=1))
    file = next(root.rglob("*.pt"))
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "zero" else file)
    hostile.refuses(root, "model_optim_rng.pt")


@pytest.mark.parametrize("name", ["mp_rank_99", "mp_rank_9999", "mp_rank_00_999"])
def test_ranks_beyond_all_measure(hostile, tmp_path, name):
    root = write_megatron(tmp_path / "x", random_model(layers=1))
    rank = next(root.rglob("mp_rank_00"))
    (rank.parent / name).symlink_to(rank)
    hostile.refuses(root)


def test_shards_of_very_different_sizes(hostile, tmp_path):
    def edit(content, rank, stage):
        if rank:
            content["model"]["lm_head"]["bias"] = torch.ones(10**6)

    hostile.refuses(write_megatron(tmp_path / "x", random_model(layers=1), tp=2, edit=edit))


def test_what_inspect_prints_steers_no_terminal(tmp_path, huggingface_folder):
    config = json.loads(huggingface_folder["config.json"])
    config["architectures"] = ["\x1b[2J\nMegatronBertForPreTraining"]
    files = {**huggingface_folder, "config.json": json.dumps(config).encode()}
    text = str(checkpoint.inspect(_write_folder(tmp_path / "x", files)))
    assert r"\x1b[2J\nMegatronBertForPreTraining" in text
    assert all(line.isprintable() for line in text.split("\n"))
    assert "gelu                          erf" in text
