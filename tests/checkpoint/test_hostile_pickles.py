"""Pickles that attack their reader: nothing runs, nothing hangs, each is refused in one line."""

import struct
from collections import OrderedDict

import pytest
import torch

from tests.checkpoint.hostile_pickles import (
    MARKER,
    SLOTS,
    call,
    doubled_dicts,
    doubled_lists,
    doubled_tuples,
    get,
    integer,
    look_up,
    put,
    replace_payload,
    text,
    write_with,
)
from tests.checkpoint.tiny import random_model, write_megatron
from tpcore import checkpoint

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
PRIME = 2**61 - 1
"""Python's modulus of hashes: all multiples of it have the hash 0."""


def _command(tmp_path):
    return text(f"touch {tmp_path}/executed")


def _executing(command):
    """Instructions -> what the error must name."""
    run = text(b"open('executed', 'w')")
    arguments = b"(" + command + b"t"
    return {
        "reduce": (call("posix.system", command), "posix.system"),
        "reduce of Python 2": (call("__builtin__.eval", run), "eval"),
        "exec": (call("builtins.exec", run), "exec"),
        "getattr": (call("builtins.getattr", look_up("os.path"), text("x")), "getattr"),
        "partial": (call("functools.partial", look_up("posix.system")), "functools.partial"),
        "import": (call("importlib.import_module", text("os")), "importlib.import_module"),
        "inst": (b"(" + command + b"iposix\nsystem\n", "posix.system"),
        "obj": (b"(" + look_up("posix.system") + command + b"o", "posix.system"),
        "stack global": (text("posix") + text("system") + b"\x93" + arguments + b"R", "system"),
        "dotted name": (text("argparse") + text("_os.system") + b"\x93" + arguments + b"R", "_os"),
        "newobj": (look_up("subprocess.Popen") + arguments + b"\x81", "subprocess.Popen"),
        "newobj_ex": (look_up("subprocess.Popen") + arguments + b"}\x92", "subprocess.Popen"),
        "looked up only": (look_up("posix.system"), "posix.system"),
        "torch's own": (call("torch.load", command), "torch.load"),
        "torch.hub": (call("torch.hub.load", command, command), "torch.hub.load"),
        "typed tensor": (
            call("torch._tensor._rebuild_from_type_v2", look_up("posix.system")),
            "posix.system",
        ),
        "wrapped tensor": (
            call("torch._utils._rebuild_wrapper_subclass"),
            "torch._utils._rebuild_wrapper_subclass",
        ),
        "another pickle": (call("_pickle.loads", command), "_pickle.loads"),
        "extension": (b"\x82\x01", "EXT1"),
        "state": (look_up("argparse.Namespace") + b")\x81" + command + b"b", "Namespace"),
        "state of a function": (look_up("_codecs.encode") + b"}b", "state"),
        "slots": (look_up("argparse.Namespace") + b")\x81N}\x86b", "Namespace"),
        "method": (call("argparse.Namespace.__init__", command), "Namespace.__init__"),
        "persistent id": (b"(" + text("module") + command + b"tQ", "outside"),
        "persistent text": (b"Pstorage\n", "PERSID"),
        "persistent number": (b"K\x01Q", "outside"),
        "codec": (call("_codecs.encode", command, text("rot13")), "_codecs.encode"),
        "allocation": (call("builtins.bytearray", integer(2**40)), "bytearray"),
        "storage": (call("torch.FloatStorage", integer(2**36)), "torch.FloatStorage"),
        "tensor": (call("torch.FloatTensor", integer(2**36)), "torch.FloatTensor"),
    }


KINDS = list(_executing(b""))


@pytest.mark.parametrize("kind", KINDS)
@FORMATS
def test_nothing_runs(hostile, tmp_path, kind, zipped):
    payload, named = _executing(_command(tmp_path))[kind]
    hostile.refuses(write_with(tmp_path / "a", payload, zipped=zipped), named)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("slot", SLOTS)
@FORMATS
def test_every_slot(hostile, tmp_path, slot, zipped):
    payload, named = _executing(_command(tmp_path))["reduce"]
    hostile.refuses(write_with(tmp_path / "a", payload, slot, zipped=zipped), named)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["reduce", "stack global", "inst", "state"])
def test_hugging_face_pickles(hostile, tmp_path, kind):
    payload, named = _executing(_command(tmp_path))[kind]
    write_megatron(tmp_path / "a", random_model(layers=1))
    folder = tmp_path / "b"
    checkpoint.convert(tmp_path / "a", folder, to="huggingface")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({"x": torch.ones(1), "y": MARKER}, file)
    file.write_bytes(replace_payload(file.read_bytes(), payload))
    outcome = hostile.refuses(folder, named, file.name)
    assert outcome.inspected == "CheckpointError"
    assert not (tmp_path / "executed").exists()


GROWING = {
    "tuples as a key": ("top-level key", doubled_tuples(60), "nested"),
    "tuples as a value": ("checkpoint_version", doubled_tuples(60), "nested"),
    "deep tuples as a key": ("top-level key", b")" + b"\x85" * 200_000, "nested"),
    "lists as the version": ("checkpoint_version", doubled_lists(60), "checkpoint_version"),
    "dicts as the iteration": ("iteration", doubled_dicts(60), "iteration"),
    "dicts as the model": ("model value", doubled_dicts(60), "nested more than"),
    "lists as args": ("args", doubled_lists(60), None),
    "deep lists": ("optimizer", b"]" * 100_000 + b"a" * 99_999, None),
    "a dict that is its own values": (
        "model value",
        b"}" + put(0) + b"(" + b"".join(text(f"k{i}") + get(0) for i in range(64)) + b"u",
        "contains itself",
    ),
    "a list that contains itself": ("iteration", b"]" + put(0) + get(0) + b"a", "iteration"),
    "keys of one hash": (
        "optimizer",
        b"}(" + b"".join(integer(PRIME * i) + b"N" for i in range(1, 200_000)) + b"u",
        "large integers",
    ),
    "tuples as keys": (
        "optimizer",
        b"}(" + b"".join(b"(K\x00" + integer(i) + b"tN" for i in range(60_000)) + b"u",
        "tuples as keys",
    ),
    "a set of tuples": ("args", call("builtins.set", b"]K\x01K\x02\x86a"), "builtins.set"),
    "too many instructions": ("optimizer", b"](" + b"]" * 600_000 + b"e", "instructions"),
}


@pytest.mark.parametrize("name", list(GROWING))
def test_objects_that_grow_when_they_are_walked_through(hostile, tmp_path, name):
    slot, payload, said = GROWING[name]
    file = write_with(tmp_path, payload, slot)
    if said is None:
        # Never walked through: such a value is read, and ignored.
        outcome = hostile(file)
        assert (outcome.loaded, outcome.peak_mib < 512) == ("", True), outcome
    else:
        hostile.refuses(file, said)


BROKEN = {
    "a text beyond the file": b"X\xff\xff\xff\xff" + b"a",
    "bytes beyond the file": b"B\xff\xff\xff\xff" + b"a",
    "bytes of 2**62": b"\x8e" + struct.pack("<Q", 2**62),
    "an integer of 2**31 bytes": b"\x8b\xff\xff\xff\x7f",
    "a memo that was never set": b"j\xff\xff\xff\xff",
    "a memo of 2**32 entries": b"Nr\xff\xff\xff\xff",
    "no mark": b"t",
    "an empty stack": b"RRRRR",
    "a mark as a value": b"(a",
    "a call of a number": b"K\x01)R",
    "an instance of a number": b"K\x01)\x81",
    "a state of a number": b"K\x01}b",
    "an item of a number": b"K\x01K\x01K\x01s",
    "half a pair": b"}(K\x01u",
    "a text that is no UTF-8": text(b"\xff\xfe"),
    "a name of many lines": b"ca\x1b[2J\nb\n",
    "a name that is no UTF-8": b"c\xff\nb\n",
    "a name without end": b"c" + b"a" * 1000,
    "another pickle's end": b".",
    "an unknown instruction": b"\xf0",
    "protocol 0": b"I12\n",
    "protocol 5": b"\x96" + bytes(8),
    "lists as keys": b"}]Ns",
}


@pytest.mark.parametrize("name", list(BROKEN))
@FORMATS
def test_pickles_that_make_no_sense(hostile, tmp_path, name, zipped):
    hostile.refuses(write_with(tmp_path, BROKEN[name], "optimizer", zipped=zipped))


class _Tensor:
    """Pickles as a tensor that says what it likes of itself."""

    def __init__(self, *claims, numel=4, dtype=torch.float32, rebuild=None):
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.ones(numel, dtype=dtype).untyped_storage(),
            dtype=dtype,
            _internal=True,
        )
        self.parts = (storage, *claims, False, OrderedDict())
        self.rebuild = rebuild or torch._utils._rebuild_tensor_v2

    def __reduce__(self):
        return self.rebuild, self.parts


TENSORS = {
    "more than its storage": _Tensor(0, (5,), (1,)),
    "far more than its storage": _Tensor(0, (2**40,), (1,)),
    "a shape that overflows": _Tensor(0, (2**40, 2**40), (1, 1)),
    "a shape that wraps around": _Tensor(0, (2**32, 2**32), (0, 0)),
    "a shape of nothing that overflows": _Tensor(0, (0, 2**61), (1, 1)),
    "strides far outside": _Tensor(0, (2, 2), (2**50, 1)),
    "strides that overflow": _Tensor(0, (2, 2), (2**63 - 1, 1)),
    "negative strides": _Tensor(3, (2, 2), (-1, -2)),
    "an offset outside": _Tensor(4, (1,), (1,)),
    "an offset that overflows": _Tensor(2**63 - 1, (1,), (1,)),
    "a negative offset": _Tensor(-1, (2,), (1,)),
    "a negative size": _Tensor(0, (-1,), (1,)),
    "a size that is NaN": _Tensor(0, (float("nan"),), (1,)),
    "a size that is infinite": _Tensor(0, (float("inf"),), (1,)),
    "a size that is a text": _Tensor(0, ("4",), (1,)),
    "a size that is true": _Tensor(0, (True,), (1,)),
    "sizes that are no tuple": _Tensor(0, [4], [1]),
    "more sizes than strides": _Tensor(0, (2, 2), (1,)),
    "a thousand dimensions": _Tensor(0, (1,) * 1000, (1,) * 1000),
    "one number seen very often": _Tensor(0, (2**20, 2**20), (0, 0)),
    "integers": torch.ones(256, dtype=torch.int64),
    "booleans": torch.ones(256, dtype=torch.bool),
    "complex numbers": torch.ones(256, dtype=torch.complex64),
    "a scalar": torch.ones(()),
    "no numbers": torch.ones(0),
    "many dimensions": torch.ones((256, *[1] * 40)),
    "sparse": torch.ones(256).to_sparse(),
    "quantized": torch.quantize_per_tensor(torch.ones(256), 0.1, 0, torch.qint8),
    "on the meta device": torch.ones(256, device="meta"),
    "a parameter of nothing": _Tensor(rebuild=torch._utils._rebuild_parameter),
}


@pytest.mark.parametrize("name", list(TENSORS))
@FORMATS
def test_tensors_that_lie(hostile, tmp_path, name, zipped):
    def edit(content, rank, stage):
        content["model"]["lm_head"]["bias"] = TENSORS[name]

    write_megatron(tmp_path, random_model(layers=1), edit=edit, zipped=zipped)
    hostile.refuses(next(tmp_path.rglob("*.pt")))


SAID = {
    "tensor_model_parallel_size": "1099511627776 tensor-parallel ranks",
    "tpcore_lm_head_gelu": "lm_head_gelu",
}


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**30},
        {"hidden_size": float("nan")},
        {"hidden_size": -16},
        {"num_attention_heads": 0},
        {"num_attention_heads": float("inf")},
        {"layernorm_epsilon": float("nan")},
        {"layernorm_epsilon": "1e-5"},
        {"hidden_dropout": float("inf")},
        {"padded_vocab_size": 2**64},
        {"tensor_model_parallel_size": 2**40},
        {"openai_gelu": "__import__('os').system('touch executed')"},
        {"tpcore_lm_head_gelu": "a\nb\x1b[2J" * 1000},
        {"position_embedding_type": {"_target_": "os.system"}},
        {"num_layers": torch.ones(1)},
    ],
    ids=str,
)
def test_args_that_lie(hostile, tmp_path, change):
    def edit(content, rank, stage):
        vars(content["args"]).update(change)

    write_megatron(tmp_path, random_model(layers=1), edit=edit)
    hostile.refuses(next(tmp_path.rglob("*.pt")), SAID.get(next(iter(change)), next(iter(change))))


def test_keys_that_write_to_the_terminal(hostile, tmp_path):
    def edit(content, rank, stage):
        content["model"]["a\nb\x1b[2J\u202e" + "c" * 10**6] = torch.ones(1)

    write_megatron(tmp_path, random_model(layers=1), edit=edit)
    hostile.refuses(next(tmp_path.rglob("*.pt")), r"a\nb\x1b[2J\u202e")


def test_a_storage_of_two_types(hostile, tmp_path):
    def edit(content, rank, stage):
        content["optimizer"] = [_Tensor(0, (4,), (1,)), MARKER]

    write_megatron(tmp_path, random_model(layers=1), edit=edit)
    file = next(tmp_path.rglob("*.pt"))
    identity = [text("storage"), look_up("torch.DoubleStorage"), text("0"), text("cpu"), b"K\x01"]
    file.write_bytes(replace_payload(file.read_bytes(), b"(" + b"".join(identity) + b"tQ"))
    hostile.refuses(file, "two sizes or two types")
