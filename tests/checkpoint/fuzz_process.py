"""Damages small valid checkpoints for some seconds, and reads what comes out.

`python -m tests.checkpoint.fuzz_process SECONDS CONTAINER...`: ends with status 0 if nothing but
CheckpointError came out. Otherwise it shows the exception, or was killed; the folder that it
prints first holds the file that did it.
"""

from __future__ import annotations

import faulthandler
import io
import json
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.checkpoint import test_core, test_nemo
from tests.checkpoint.hostile_pickles import edit_zip
from tests.checkpoint.test_hostile_dist import write_dist
from tests.checkpoint.tiny import random_model, write_megatron
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError, load_sharded, save_sharded
from tpcore.checkpoint.untrusted.archive import Archive, unpack
from tpcore.layers import ColumnParallelLinear
from tpcore.parallel.group import TensorParallelGroup

SECONDS_EACH = 20
FEWEST = 5
"""Files of each container, however slow the machine is."""
EXTRA_BYTES = 2 * 2**30
INTERESTING = (
    b"\xff\xff\xff\xff",
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\x00" * 8,
    b"\x80\x00\x00\x00",
    b"..",
    b"-1",
    b"cposix\nsystem\n",
    b"R",
    b"NaN",
    b"1e999",
    b'"',
    b"{",
    b"[",
)


def mutations() -> st.SearchStrategy[list[tuple]]:
    place, length = st.floats(0, 1, exclude_max=True), st.integers(1, 64)
    return st.lists(
        st.one_of(
            st.tuples(st.just("flip"), place, st.integers(0, 7)),
            st.tuples(st.just("set"), place, st.integers(0, 255)),
            st.tuples(st.just("put"), place, st.sampled_from(INTERESTING)),
            st.tuples(st.just("insert"), place, st.sampled_from(INTERESTING)),
            st.tuples(st.just("splice"), place, place, length),
            st.tuples(st.just("delete"), place, length),
            st.tuples(st.just("cut"), place),
        ),
        min_size=1,
        max_size=5,
    )


def mutate(raw: bytes, steps: list[tuple]) -> bytes:
    data = bytearray(raw)
    for kind, place, *rest in steps:
        at = int(place * len(data))
        if not data:
            break
        if kind == "flip":
            data[at] ^= 1 << rest[0]
        elif kind == "set":
            data[at] = rest[0]
        elif kind == "put":
            data[at : at + len(rest[0])] = rest[0]
        elif kind == "insert":
            data[at:at] = rest[0]
        elif kind == "splice":
            start = int(rest[0] * len(data))
            data[at : at + rest[1]] = data[start : start + rest[1]]
        elif kind == "delete":
            del data[at : at + rest[0]]
        else:
            del data[at:]
    return bytes(data)


# --- containers: a valid checkpoint, and how its bytes are damaged -------------------------------


def _megatron(folder: Path, zipped: bool) -> Path:
    write_megatron(folder, random_model(layers=1), zipped=zipped)
    return next(folder.rglob("*.pt"))


def _huggingface(folder: Path) -> Path:
    source = folder / "source"
    write_megatron(source, random_model(layers=1))
    checkpoint.convert(source, folder / "out", to="huggingface")
    shutil.rmtree(source)
    return folder / "out"


def _read(path: Path) -> None:
    """All that a user would do with a checkpoint."""
    checkpoint.inspect(path)
    checkpoint.load(path)


def _unpack(path: Path) -> None:
    with Archive(path) as archive, tempfile.TemporaryDirectory() as folder:
        for name, file in unpack(path, Path(folder)).items():
            with archive.open(name) as member:
                assert member.read() == file.read_bytes()


class Container:
    """A valid checkpoint, which of its files is damaged, and how it is read."""

    def __init__(
        self,
        make: Callable[[Path], Path],
        damaged: str | None = None,
        read: Callable[[Path], None] = _read,
    ) -> None:
        self.make, self.damaged, self.read = make, damaged, read

    def damage(self, raw: bytes, steps: list[tuple]) -> bytes:
        return mutate(raw, steps)


class _PickleInZip(Container):
    def damage(self, raw: bytes, steps: list[tuple]) -> bytes:
        return edit_zip(raw, {"data.pkl": lambda pickle: mutate(pickle, steps)})


class _MemberOfTar(Container):
    def damage(self, raw: bytes, steps: list[tuple]) -> bytes:
        """Damage model_config.yaml, and leave the archive whole."""
        out = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(raw)) as old,
            tarfile.open(fileobj=out, mode="w") as new,
        ):
            for entry in old.getmembers():
                file = old.extractfile(entry)
                content = file.read() if file else b""
                if entry.name.endswith(".yaml"):
                    content = mutate(content, steps)
                    entry.size = len(content)
                new.addfile(entry, io.BytesIO(content))
        return out.getvalue()


def _nemo(folder: Path, packed: bool) -> Path:
    source = folder / "source"
    write_megatron(source, random_model(layers=1))
    model = checkpoint.load(source, head="sequence_classification", num_labels=2)
    checkpoint.save(model, folder / "plain.nemo", format="nemo")
    shutil.rmtree(source)
    path = folder / "model.nemo"
    with tarfile.open(folder / "plain.nemo") as old:
        files = {m.name: old.extractfile(m) for m in old.getmembers() if m.isfile()}
        with tarfile.open(path, "w:gz" if packed else "w") as tar:
            for name, file in files.items():
                assert file is not None
                content = file.read()
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def _dist(folder: Path) -> Path:
    return write_dist(folder / "dist")


def _pickled_huggingface(folder: Path) -> Path:
    out = _huggingface(folder)
    from safetensors.torch import load_file

    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    return out


def _in_parts(folder: Path) -> Path:
    """A Hugging Face folder whose weights lie in two files, with their index."""
    out = _huggingface(folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    places = {}
    for number in range(2):
        name = f"model-{number}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::2]}
        save_file(part, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def _lightning(folder: Path) -> Path:
    state = {**test_nemo.encoder(), **test_nemo.classifier()}
    node = test_nemo.NODES["token_classification"]
    hyper = {"cfg": {"language_model": {"config": test_nemo.ENCODER}, **node}}
    facts = {"state_dict": state, "hyper_parameters": hyper, "checkpoint_version": 3.0}
    torch.save(facts, folder / "a--epoch=0.ckpt")
    return folder / "a--epoch=0.ckpt"


def _core(folder: Path) -> Path:
    test_core.write_torch(folder, tp=1, pp=1, fused=True)
    return next(folder.rglob("*.pt"))


def _with_settings(folder: Path) -> Path:
    """A checkpoint, and beside it JSON that is passed as `config_file`."""
    write_megatron(folder / "a", random_model(layers=1))
    settings = test_nemo.ENCODER | {"num_layers": 1, "onnx_safe": False}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _read_settings(path: Path) -> None:
    checkpoint.inspect(path / "a", config_file=path / "config.json")


def _module(seed_value: int) -> torch.nn.Module:
    torch.manual_seed(seed_value)
    single = TensorParallelGroup.single()
    up = ColumnParallelLinear(4, 12, tp=single)
    return torch.nn.Sequential(up, torch.nn.LayerNorm(12))


def _sharded(folder: Path) -> Path:
    save_sharded(_module(0), folder / "sharded")
    return folder / "sharded"


def _read_sharded(path: Path) -> None:
    """What loads is what was saved, to the bit: all of it is read whole, so checksums say so."""
    module = _module(1)
    load_sharded(module, path)
    for name, tensor in _module(0).state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


CONTAINERS = {
    "megatron": Container(lambda folder: _megatron(folder, True)),
    "megatron-pickle": _PickleInZip(lambda folder: _megatron(folder, True)),
    "megatron-legacy": Container(lambda folder: _megatron(folder, False)),
    "megatron-tracker": Container(
        lambda folder: write_megatron(folder / "tracked", random_model(layers=1)),
        "latest_checkpointed_iteration.txt",
    ),
    "core": _PickleInZip(_core),
    "lightning": _PickleInZip(_lightning),
    "settings": Container(_with_settings, "config.json", _read_settings),
    "safetensors-index": Container(_in_parts, "model.safetensors.index.json"),
    "safetensors": Container(_huggingface, "model.safetensors"),
    "config": Container(_huggingface, "config.json"),
    "pytorch_model": _PickleInZip(_pickled_huggingface, "pytorch_model.bin"),
    "tar": Container(lambda folder: _nemo(folder, False), read=_unpack),
    "nemo": Container(lambda folder: _nemo(folder, False)),
    "nemo-gzip": Container(lambda folder: _nemo(folder, True)),
    "nemo-settings": _MemberOfTar(lambda folder: _nemo(folder, False)),
    "dist-metadata": Container(_dist, ".metadata"),
    "dist-chunks": Container(_dist, "__0_0.distcp"),
    "dist-common": _PickleInZip(_dist, "common.pt"),
    "sharded-index": Container(_sharded, "index.json", _read_sharded),
    "sharded-file": Container(_sharded, "shard_00_of_01.safetensors", _read_sharded),
}


def fuzz(name: str, seconds: float) -> None:
    container = CONTAINERS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    print(folder, flush=True)
    path = container.make(folder)
    container.read(path)
    file = path / container.damaged if container.damaged else path
    valid = file.read_bytes()
    end = time.monotonic() + seconds
    count = refused = 0

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(steps=mutations())
    def attack(steps: list[tuple]) -> None:
        nonlocal count, refused
        if count >= FEWEST and time.monotonic() > end:
            return
        file.write_bytes(container.damage(valid, steps))
        # Of processor time, and it kills: a reader that hangs in C cannot be interrupted.
        signal.setitimer(signal.ITIMER_PROF, SECONDS_EACH)
        try:
            container.read(path)
        except CheckpointError as error:
            refused += 1
            if not str(error).isprintable() or path.name not in str(error):
                raise AssertionError(f"a bad message: {error}") from error
        signal.setitimer(signal.ITIMER_PROF, 0)
        count += 1

    while count < FEWEST or time.monotonic() < end:
        seed(random.randrange(2**63))(attack)()
    print(f"{name}: {count} files, {refused} refused", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_BYTES,) * 2)
    faulthandler.enable()
    begin, names = time.monotonic(), sys.argv[2:]
    for index, container_name in enumerate(names):
        # What making and reading the valid files takes is part of the time.
        left = begin + float(sys.argv[1]) - time.monotonic()
        fuzz(container_name, left / (len(names) - index))
    print(f"{time.monotonic() - begin:.1f} seconds")
