""".nemo files that attack their reader: in the archive, in the settings, in the weights."""

import gzip
import io
import json
import tarfile

import pytest
import torch

from tests.checkpoint.hostile_pickles import MARKER, call, edit_zip, look_up, replace_payload, text
from tests.checkpoint.tiny import random_model, write_megatron
from tpcore import checkpoint

WEIGHTS = "model_weights.ckpt"
CONFIG = "model_config.yaml"
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Name -> bytes of a small file that tpcore wrote."""
    folder = tmp_path_factory.mktemp("valid")
    write_megatron(folder / "a", random_model(layers=1))
    path = folder / "b.nemo"
    model = checkpoint.load(
        folder / "a", head="sequence_classification", num_labels=2, head_kwargs={}
    )
    labels = ["no", "yes"]
    checkpoint.save(model, path, format="nemo", labels=labels)
    with tarfile.open(path) as tar:
        return {
            entry.name.removeprefix("./"): tar.extractfile(entry).read()
            for entry in tar.getmembers()
            if entry.isfile()
        }


def _write(path, members, packed=False, edit=None):
    with tarfile.open(path, "w:gz" if packed else "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            if edit is not None:
                edit(entry, tar)
            tar.addfile(entry, io.BytesIO(content))
    return path


@PACKED
def test_the_file_to_be_spoilt_is_valid(hostile, tmp_path, members, packed):
    assert {WEIGHTS, CONFIG} <= set(members)
    outcome = hostile(_write(tmp_path / "x.nemo", members, packed))
    assert outcome.loaded == "", outcome


@PACKED
@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (lambda command: call("posix.system", command), "posix.system"),
        (lambda command: b"(" + command + b"iposix\nsystem\n", "posix.system"),
        (lambda command: b"(" + look_up("posix.system") + command + b"o", "posix.system"),
        (lambda command: call("hydra.utils.instantiate", command), "hydra.utils.instantiate"),
    ],
    ids=["reduce", "inst", "obj", "hydra"],
)
def test_weights_that_attack(hostile, tmp_path, members, packed, payload, said):
    with io.BytesIO(members[WEIGHTS]) as file:
        state = torch.load(file, weights_only=True)
    with io.BytesIO() as file:
        torch.save({**state, "hostile": MARKER}, file)
        weights = file.getvalue()
    weights = replace_payload(weights, payload(text(f"touch {tmp_path}/executed")))
    path = _write(tmp_path / "x.nemo", {**members, WEIGHTS: weights}, packed)
    hostile.refuses(path, WEIGHTS, said)
    assert not (tmp_path / "executed").exists()


SPOILT = {
    "compressed": lambda raw: edit_zip(raw, {}, method=8),
    "cut off": lambda raw: raw[:-50],
    "nothing": lambda raw: b"",
    "a smaller record": lambda raw: edit_zip(raw, {"data/0": lambda record: record[:-4]}),
    "damaged": lambda raw: raw[:5000] + b"damaged" + raw[5007:],
    "another archive": lambda raw: gzip.compress(raw),
}


@pytest.mark.parametrize("kind", list(SPOILT))
def test_weights_that_are_something_else(hostile, tmp_path, members, kind):
    spoilt = {**members, WEIGHTS: SPOILT[kind](members[WEIGHTS])}
    hostile.refuses(_write(tmp_path / "x.nemo", spoilt), WEIGHTS)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
TASK = "target: a.TextClassificationModel\n"
SETTINGS = {
    "a Python object": ("a: !!python/object/apply:os.system ['touch executed']", "python/object"),
    "billion laughs": (LAUGHS, "repeats itself"),
    "merge keys": ("a: &a {b: 1}\nc: {<<: *a}", "merges mappings"),
    "deep": ("a: " + "[" * 100_000, "nested too deep"),
    "large": ("a: '" + "x" * 2**21 + "'", "at most"),
    "no UTF-8": (b"a: \xff", "valid YAML"),
    "no mapping": ("[1, 2]", "holds a list"),
    "nothing": ("", "holds a NoneType"),
    "a number as a size": (TASK + "language_model: {config: {hidden_size: .nan}}", "hidden_size"),
    "a large size": (TASK + "language_model: {config: {hidden_size: 1e999}}", "hidden_size"),
    "a negative size": (TASK + "language_model: {config: {num_layers: -1}}", "num_layers"),
    "an object as a size": (
        TASK + "language_model: {config: {num_attention_heads: {_target_: os.system}}}",
        "num_attention_heads",
    ),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_settings_that_attack(hostile, tmp_path, members, name):
    content, said = SETTINGS[name]
    content = content if isinstance(content, bytes) else content.encode()
    spoilt = {k: v for k, v in members.items() if k in (CONFIG, WEIGHTS)}
    path = _write(tmp_path / "x.nemo", {**spoilt, CONFIG: content})
    hostile.refuses(path, said)
    assert not (tmp_path / "executed").exists()


def test_nothing_is_instantiated(hostile, tmp_path, members):
    """`_target_` and `target` are data like any other; the file itself is fine."""
    attack = (
        f"\n_target_: os.system\ncommand: touch {tmp_path}/executed\n"
        f"optim: {{_target_: subprocess.run, args: [touch, {tmp_path}/executed], shell: true}}\n"
    ).encode()
    path = _write(tmp_path / "x.nemo", {**members, CONFIG: members[CONFIG] + attack})
    outcome = hostile(path)
    assert outcome.loaded == "", outcome
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["vocab_file", "class_labels_file", "config_file"])
@pytest.mark.parametrize("target", ["nemo:../../etc/passwd", "/etc/passwd", "nemo:/dev/zero"])
def test_links_lead_to_members_only(tmp_path, members, key, target):
    node = {"vocab_file": "tokenizer", "class_labels_file": "class_labels"}.get(
        key, "language_model"
    )
    config = f"{node}: {{{key}: '{target}'}}\n"
    spoilt = {**members, CONFIG: config.encode()}
    path = _write(tmp_path / "x.nemo", spoilt)
    try:
        state = checkpoint.inspect(path)
    except checkpoint.CheckpointError as error:
        assert "root:" not in str(error)  # noqa: PT017
    else:
        assert "root:" not in str(state)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"checkpoint_version": NaN}',
        b'{"checkpoint_version":' + b"9" * 5000 + b"}",
        b'{"checkpoint_version": [[[[[[1]]]]]]}',
        b'{"checkpoint_version": 99}',
    ],
    ids=lambda content: str(content[:40]),
)
def test_versions_that_attack(hostile, tmp_path, members, content):
    name = "megatron_checkpoint_version.json"
    spoilt = {**{k: v for k, v in members.items() if k != "tpcore_model.json"}, name: content}
    hostile.refuses(_write(tmp_path / "x.nemo", spoilt), "checkpoint_version")


def _link(entry, tar):
    if entry.name == f"./{CONFIG}":
        link = tarfile.TarInfo("./evil")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)


def _twice(entry, tar):
    if entry.name == f"./{CONFIG}":
        again = tarfile.TarInfo(CONFIG)
        again.size = 5
        tar.addfile(again, io.BytesIO(b"a: 1\n"))


def _outside(entry, tar):
    if entry.name == f"./{CONFIG}":
        outside = tarfile.TarInfo("../outside")
        outside.size = 5
        tar.addfile(outside, io.BytesIO(b"a: 1\n"))


@PACKED
@pytest.mark.parametrize(
    ("edit", "said"),
    [(_link, "'./evil' is a symbolic link"), (_twice, "occurs twice"), (_outside, "leads out")],
)
def test_archives_that_attack(hostile, tmp_path, members, packed, edit, said):
    hostile.refuses(_write(tmp_path / "x.nemo", members, packed, edit), said)
    assert not (tmp_path.parent / "outside").exists()


@PACKED
def test_truncated_files(hostile, tmp_path, members, packed):
    path = _write(tmp_path / "x.nemo", members, packed)
    whole = path.read_bytes().rstrip(b"\0")  # a plain archive ends with blocks of zeros
    for fraction in (0.1, 0.5, 0.8, 0.99):
        path.write_bytes(whole[: int(len(whole) * fraction)])
        hostile.refuses(path)


def test_bombs(hostile, tmp_path, members):
    path = tmp_path / "x.nemo"
    entry = tarfile.TarInfo(WEIGHTS)
    entry.size = 2**29
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(entry.tobuf())
        for _ in range(2**9):
            file.write(bytes(2**20))
        file.write(bytes(1024))
    hostile.refuses(path, "decompression bomb")


def test_members_of_each_kind_of_weights(hostile, tmp_path, members):
    both = {**members, "mp_rank_00/model_weights.ckpt": members[WEIGHTS]}
    hostile.refuses(_write(tmp_path / "a.nemo", both), WEIGHTS)
    gap = {k: v for k, v in members.items() if k != WEIGHTS}
    gap["mp_rank_01/model_weights.ckpt"] = members[WEIGHTS]
    hostile.refuses(_write(tmp_path / "b.nemo", gap), "mp_rank_00")
    none = {CONFIG: members[CONFIG]}
    hostile.refuses(_write(tmp_path / "c.nemo", none), WEIGHTS)
    hostile.refuses(_write(tmp_path / "d.nemo", {WEIGHTS: members[WEIGHTS]}), CONFIG)


def test_a_vocabulary_of_another_model(hostile, tmp_path, members):
    config = b"tokenizer: {vocab_file: 'nemo:vocab.txt'}\n" + json.dumps({}).encode()[:0]
    spoilt = {CONFIG: members[CONFIG].split(b"tokenizer:")[0] + config, WEIGHTS: members[WEIGHTS]}
    spoilt["vocab.txt"] = b"a\n" * 100_000
    hostile.refuses(_write(tmp_path / "x.nemo", spoilt))
