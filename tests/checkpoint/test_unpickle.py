"""Torch files are read without running anything in them; whatever is wrong is one clear error."""

import argparse
import builtins
import collections
import contextlib
import functools
import io
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcore.checkpoint import CheckpointError
from tpcore.checkpoint.untrusted.unpickle import STUBBED, InertStub, load_pickle

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def _save(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


class _Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _class_named(monkeypatch, name):
    """A class that pickles as `name`, importable only while the file is written."""
    module_name, _, class_name = name.rpartition(".")
    parts = module_name.split(".")
    for i in range(1, len(parts) + 1):
        parent = ".".join(parts[:i])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    kind = type(class_name, (), {})
    kind.__module__ = module_name
    monkeypatch.setattr(sys.modules[module_name], class_name, kind, raising=False)
    return kind


@FORMATS
def test_tensors_and_namespaces_come_back(tmp_path, zipped):
    tensor = torch.arange(6.0).reshape(2, 3)
    args = argparse.Namespace(hidden_size=64, params_dtype=torch.float16, nothing=None)
    path = _save(tmp_path / "x.pt", {"args": args, "model": {"w": tensor}}, zipped)
    loaded = load_pickle(path)
    assert torch.equal(loaded["model"]["w"], tensor)
    assert vars(loaded["args"]) == vars(args)


@FORMATS
@pytest.mark.parametrize(
    "name",
    [
        "megatron.fp16.loss_scaler.DynamicLossScaler",
        "megatron.core.enums.ModelType",
        "megatron.core.transformer.enums.AttnBackend",
    ],
)
def test_listed_objects_become_inert(tmp_path, monkeypatch, name, zipped):
    with monkeypatch.context() as written:
        kind = _class_named(written, name)
        thing = kind()
        thing.cur_scale = 4.0
        path = _save(tmp_path / "x.pt", {"scaler": thing, "model": {"w": torch.ones(1)}}, zipped)
    assert name.split(".")[0] not in sys.modules
    loaded = load_pickle(path)
    assert isinstance(loaded["scaler"], InertStub)
    assert loaded["scaler"].pickled_name == name
    assert loaded["scaler"].pickled_state == {"cur_scale": 4.0}
    assert not {"megatron", "apex"} & sys.modules.keys()


def test_numpy_random_states_do_not_become_arrays(tmp_path):
    numpy = pytest.importorskip("numpy")
    state = numpy.random.RandomState(0).get_state()
    loaded = load_pickle(_save(tmp_path / "x.pt", {"np_rng_state": state}))
    assert isinstance(loaded["np_rng_state"][1], InertStub)


@FORMATS
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {marker}",), "system"),
        (builtins.exec, ("open('{marker}', 'w')",), "exec"),
        (os.mkdir, ("{marker}",), "mkdir"),
        (torch.nn.Linear, (1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, function, arguments, named, zipped):
    marker = tmp_path / "executed"
    arguments = tuple(a.format(marker=marker) if isinstance(a, str) else a for a in arguments)
    content = {"model": {"w": torch.ones(1)}, "extra": _Calls(function, *arguments)}
    path = _save(tmp_path / "x.pt", content, zipped)
    with pytest.raises(CheckpointError, match=named) as error:
        load_pickle(path)
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_the_allow_list_ends_with_the_call(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    path = _save(tmp_path / "x.pt", {"args": argparse.Namespace(a=1)})
    load_pickle(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_no_listed_name_is_of_something_that_acts():
    """Every stub stands for a class; none of them is looked up, whatever its name."""
    harmless = {"signal.Signals", "io.BytesIO", "torch._C.Generator", "types.SimpleNamespace"}
    harmless |= {"typing.Any"}
    packages = {"megatron", "fp16", "numpy", "pathlib", "omegaconf", "pytorch_lightning", "nemo"}
    plain = {"dict", "list", "tuple", "str", "int", "float", "bool"}
    for name in STUBBED:
        package, _, rest = name.partition(".")
        assert package in packages or name in harmless or (package == "builtins" and rest in plain)
    assert len(set(STUBBED)) == len(STUBBED)


@FORMATS
def test_truncated_files(tmp_path, zipped):
    whole = _save(tmp_path / "x.pt", {"model": {"w": torch.randn(500)}}, zipped).read_bytes()
    cut = tmp_path / "cut.pt"
    for length in (0, 1, 2, 10, 100, 500, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt: .*truncated"):
            load_pickle(cut)


@pytest.mark.parametrize("content", [b"hello world" * 99, b"PK\x03\x04" + bytes(99), b"\x80\x02."])
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt: "):
        load_pickle(path)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load_pickle(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="directory"):
        load_pickle(tmp_path)


@FORMATS
def test_a_tensor_that_claims_more_than_its_storage(tmp_path, zipped):
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
    )
    rebuilt = (storage, 0, (2**60,), (1,), False, OrderedDict())
    huge = _Calls(torch._utils._rebuild_tensor_v2, *rebuilt)
    path = _save(tmp_path / "x.pt", {"model": {"w": huge}}, zipped)
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        load_pickle(path)


def test_an_archive_that_claims_to_span_disks(tmp_path):
    """zipfile raises here where it usually says no."""
    raw = _small_file(True)
    locator = raw.rindex(b"PK\x06\x07")
    path = tmp_path / "x.pt"
    path.write_bytes(raw[: locator + 16] + b"\xff" + raw[locator + 17 :])
    with pytest.raises(CheckpointError, match=r"x\.pt: .*truncated"):
        load_pickle(path)


@functools.cache
def _small_file(zipped):
    """Made once: a legacy file holds memory addresses, and hypothesis wants equal lengths."""
    content = {"args": argparse.Namespace(a=1), "model": {"w": torch.arange(8.0)}}
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), zipped=st.booleans())
def test_damaged_bytes_give_a_result_or_a_checkpoint_error(tmp_path_factory, data, zipped):
    path = tmp_path_factory.mktemp("damaged") / "x.pt"
    raw = bytearray(_small_file(zipped))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    # Any other exception, a hang or a crash fails the test.
    with contextlib.suppress(CheckpointError):
        load_pickle(path)


def test_what_lightning_keeps_beside_the_weights_is_inert(tmp_path, monkeypatch):
    """Settings are omegaconf's, kept where the model's names are; nobody needs omegaconf."""
    omegaconf = pytest.importorskip("omegaconf")
    with monkeypatch.context() as written:
        attributes = _class_named(written, "pytorch_lightning.utilities.parsing.AttributeDict")
        kind = type("AttributeDict", (dict,), {"__module__": attributes.__module__})
        written.setattr(sys.modules[kind.__module__], "AttributeDict", kind)
        callback = _class_named(written, "nemo.utils.exp_manager.NeMoModelCheckpoint")
        settings = omegaconf.OmegaConf.create({"model": {"hidden_size": 16, "names": ["a", 1.5]}})
        content = {
            "state_dict": OrderedDict(w=torch.arange(3.0)),
            "callbacks": {callback: {"best_model_score": torch.tensor(0.5)}},
            "hyper_parameters": kind(cfg=settings, lr=0.1),
            "counts": collections.defaultdict(list, {"a": [1]}),
        }
        path = _save(tmp_path / "x.ckpt", content)
    loaded = load_pickle(path)
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(3.0))
    assert type(loaded["hyper_parameters"]) is dict
    assert loaded["hyper_parameters"]["lr"] == 0.1
    assert isinstance(loaded["hyper_parameters"]["cfg"], InertStub)
    assert loaded["counts"] == {"a": [1]}
    assert type(loaded["counts"]) is dict


def test_checksums_are_read_without_memory_for_the_file(tmp_path):
    path = _save(tmp_path / "x.pt", {"w": torch.ones(2**24)})
    script = (
        "import sys; from pathlib import Path; from tpcore.checkpoint.untrusted.unpickle import *\n"
        "def rss(): return int(Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        "before = rss(); check_records(Path(sys.argv[1])); print(rss() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 2**24
