"""Megatron-Core's checkpoints, generated from the description of both containers."""

import argparse
import itertools
import json
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.checkpoint import tiny
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError, convert
from tpcore.checkpoint.io import _read
from tpcore.checkpoint.untrusted.unpickle import load_pickle

MODEL = tiny.random_model()

# Megatron-Core's names, by Megatron-LM's.
RENAMED = (
    ("language_model.embedding.", "embedding."),
    ("language_model.encoder.", "encoder."),
    ("language_model.pooler.", "pooler."),
    ("self_attention.query_key_value", "self_attention.linear_qkv"),
    ("self_attention.dense", "self_attention.linear_proj"),
    ("post_attention_layernorm", "pre_mlp_layernorm"),
    ("mlp.dense_h_to_4h", "mlp.linear_fc1"),
    ("mlp.dense_4h_to_h", "mlp.linear_fc2"),
    ("lm_head.layernorm", "lm_head.layer_norm"),
    ("lm_head.bias", "output_layer.bias"),
    ("word_embeddings_for_head.weight", "output_layer.weight"),
)
FUSED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


def core_names(flat, fused):
    renamed = {}
    for key, tensor in flat.items():
        for old, new in (*RENAMED, *(FUSED if fused else ())):
            key = key.replace(old, new)
        renamed[key] = tensor
    return renamed


def write_torch(root, *, tp, pp, fused, edit=None):
    """Rank files of Megatron-Core, in the `torch` container."""

    def rename(content, rank, stage):
        model = core_names(content["model"], fused)
        model["encoder.layers.0.self_attention.core_attention._extra_state"] = None
        content["model"] = model
        if edit is not None:
            edit(model)

    return tiny.write_megatron(root, MODEL, tp=tp, pp=pp, nested=False, edit=rename)


@pytest.mark.parametrize(
    ("tp", "pp", "fused"), list(itertools.product((1, 2, 4), (1, 2), (False, True)))
)
def test_torch_container(tmp_path, tp, pp, fused):
    state = tiny.assert_reads_as(write_torch(tmp_path, tp=tp, pp=pp, fused=fused))
    assert state.source.format == "Megatron-Core (torch)"
    assert bool(state.copies) == (pp > 1)


def _delete(model):
    del model["encoder.layers.1.mlp.linear_fc1.bias"]


def _add(model):
    model["encoder.layers.1.mlp.linear_fc3.bias"] = torch.ones(tiny.HIDDEN)


def _rename(model):
    model["encoder.layers.1.mlp.linear_fcl.bias"] = model.pop(
        "encoder.layers.1.mlp.linear_fc1.bias"
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_delete, r"missing parameters: blocks\.1\.mlp\.dense_in\.bias"),
        (_add, r"unknown parameters: encoder\.layers\.1\.mlp\.linear_fc3\.bias"),
        (_rename, r"unknown parameters: encoder\.layers\.1\.mlp\.linear_fcl\.bias"),
    ],
)
def test_a_key_too_few_too_many_or_renamed_is_an_error(tmp_path, edit, message):
    with pytest.raises(CheckpointError, match=message):
        tiny.assert_reads_as(write_torch(tmp_path / "a", tp=1, pp=1, fused=False, edit=edit))
    with pytest.raises(CheckpointError, match=message):
        _read(write_dist(tmp_path / "b", edit=edit), None, {})


# --- torch_dist ----------------------------------------------------------------------------------


def _pieces(name, tensor, tp):
    """(offsets, part) of each rank; one for what is replicated."""
    plain = name.replace("encoder.layers.", "").lstrip("0123456789.")
    rows = ("embedding.word_embeddings.weight", "output_layer.bias")
    linear = plain.startswith(("self_attention.linear_qkv", "mlp.linear_fc1"))
    if name in rows or (linear and "layer_norm" not in plain):
        dim = 0
    elif plain in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        dim = 1
    else:
        return [((0,) * tensor.dim(), tensor)]
    step = tensor.shape[dim] // tp
    offsets = [[0] * tensor.dim() for _ in range(tp)]
    for rank in range(tp):
        offsets[rank][dim] = rank * step
    return list(zip(map(tuple, offsets), tensor.chunk(tp, dim), strict=True))


class _Folder:
    """A folder of torch.distributed.checkpoint, with torch's own classes in its metadata."""

    def __init__(self, path):
        path.mkdir(parents=True)
        self.path, self.entries, self.places = path, {}, {}

    def _append(self, content, file):
        with (self.path / file).open("ab") as stream:
            start = stream.tell()
            torch.save(content, stream)
            return _StorageInfo(file, start, stream.tell() - start)

    def add_tensor(self, name, shape, dtype, chunks):
        stored = []
        for number, (offsets, part) in enumerate(chunks):
            offsets = torch.Size(offsets)
            sizes = torch.Size(part.shape)
            if len(offsets) > part.dim():
                sizes = torch.Size((1, *part.shape))  # a layer of a stack
            stored.append(ChunkStorageMetadata(offsets, sizes))
            info = self._append(part.clone(), f"__{number % 2}_0.distcp")
            self.places[MetadataIndex(name, offsets, number)] = info
        properties = TensorProperties(dtype=dtype)
        self.entries[name] = TensorStorageMetadata(properties, torch.Size(shape), stored)

    def add_object(self, name, value):
        self.entries[name] = BytesStorageMetadata()
        self.places[MetadataIndex(name)] = self._append(value, "__0_0.distcp")

    def finish(self):
        metadata = Metadata(self.entries, None, self.places)
        (self.path / ".metadata").write_bytes(pickle.dumps(metadata))


def write_dist(path, *, tp=2, stacked=False, common="file", prefix="", edit=None):
    """A torch_dist folder; `common`: where args are, "file", "object" or None."""
    flat = tiny.rank_model(
        MODEL,
        version=3,
        spelling="new",
        rank=0,
        tp=1,
        layers=range(tiny.LAYERS),
        first=True,
        last=True,
    )
    flat = core_names(flat, fused=True)
    if edit is not None:
        edit(flat)
    folder = _Folder(path)
    stacks = {}
    for name, tensor in flat.items():
        before, found, rest = name.partition("encoder.layers.")
        if stacked and found:
            number, _, rest = rest.partition(".")
            stacks.setdefault(before + found + rest, {})[int(number)] = (name, tensor)
            continue
        folder.add_tensor(prefix + name, tensor.shape, tensor.dtype, _pieces(name, tensor, tp))
    for name, layers in stacks.items():
        chunks = [
            ((number, *offsets), part)
            for number, (key, tensor) in layers.items()
            for offsets, part in _pieces(key, tensor, tp)
        ]
        shape = (len(layers), *layers[0][1].shape)
        folder.add_tensor(prefix + name, shape, torch.float32, chunks)
    state = {f"optimizer.state.exp_avg.{name}": tensor for name, tensor in flat.items()}
    for name, tensor in list(state.items())[:3]:
        folder.add_tensor(name, tensor.shape, tensor.dtype, [((0,) * tensor.dim(), tensor)])
    folder.add_object("rng_state/shard_0.0_1.1", [b"state"])
    layer = "encoder.layers.self_attention.linear_qkv" if stacked else "encoder.layers.0.mlp"
    folder.add_object(f"{prefix}{layer}._extra_state/shard_0_4", [b"bytes"])
    facts = {"args": tiny.args_of(3, tp), "checkpoint_version": 3.0, "iteration": 7}
    if common == "file":
        torch.save(facts, path / "common.pt")
    elif common == "object":
        folder.add_object("common_state/shard_0_1", [facts])
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "new": 1}))
    folder.finish()
    return path


def assert_is_model(state):
    assert set(state.tensors) == set(MODEL)
    for name, tensor in MODEL.items():
        assert torch.equal(state.full(name), tensor), name
        assert torch.equal(
            torch.cat([state.full(name)] * 2), torch.cat([tensor] * 2)
        )  # reading twice gives the same
    return state


@pytest.mark.parametrize(
    ("tp", "stacked", "common", "prefix"),
    [
        *itertools.product((1, 2, 4), (False, True), ("file", "object"), ("",)),
        (2, True, "file", "model."),
        (2, False, "object", "model."),
    ],
)
def test_dist_container(tmp_path, tp, stacked, common, prefix):
    path = write_dist(tmp_path / "a", tp=tp, stacked=stacked, common=common, prefix=prefix)
    source = assert_is_model(_read(path, None, {})).source
    assert source.tensor_parallel_size == tp
    assert source.iteration == 7
    assert f"layers: {'stacked' if stacked else 'one by one'}" in source.notes
    state = _read(path, None, {})
    for rank in range(4):
        piece = state.shard("blocks.2.mlp.dense_out.weight", rank, 4, tiny.ROWS)
        assert torch.equal(piece, MODEL["blocks.2.mlp.dense_out.weight"].chunk(4, 1)[rank])


def test_without_args_the_heads_must_be_said(tmp_path):
    path = write_dist(tmp_path / "a", common=None)
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        checkpoint.inspect(path)
    assert_is_model(_read(path, None, {"num_attention_heads": tiny.HEADS}))


def test_the_tracker_above_an_iteration(tmp_path):
    write_dist(tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert_is_model(_read(tmp_path, None, {}))


def test_damaged_folders(tmp_path):
    def copy(name):
        return shutil.copytree(source, tmp_path / name)

    source = write_dist(tmp_path / "a")
    missing = copy("missing")
    (missing / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"missing: .*__1_0\.distcp"):
        checkpoint.load(missing)
    short = copy("short")
    data = (short / "__1_0.distcp").read_bytes()
    (short / "__1_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        checkpoint.load(short)
    backend = copy("backend")
    (backend / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="sharded_backend='zarr' is not supported"):
        checkpoint.load(backend)
    holes = copy("holes")
    metadata = pickle.loads((holes / ".metadata").read_bytes())
    metadata.state_dict_metadata["output_layer.bias"].chunks.pop()
    (holes / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"chunks of output_layer\.bias"):
        checkpoint.load(holes)
    hostile = copy("hostile")
    (hostile / ".metadata").write_bytes(pickle.dumps(argparse.Namespace(a=shutil.rmtree)))
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace|shutil"):
        checkpoint.load(hostile)


# --- written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_written_directory_is_what_the_description_says(tmp_path, tp):
    source = tiny.write_megatron(tmp_path / "a", MODEL, version=1, spelling="old", tp=2)
    info = convert(source, tmp_path / "b", to="megatron-core", tensor_parallel_size=tp)
    assert info.format == "Megatron-Core (torch)"
    rows = -(-tiny.ROWS // (128 * tp)) * 128 * tp
    model = dict(MODEL)
    for name in ("embeddings.word_embeddings.weight", "head.lm.bias"):
        model[name] = torch.cat([model[name], *[model[name][-1:]] * (rows - tiny.ROWS)])
    for rank in range(tp):
        file = tmp_path / f"b/iter_0000010/mp_rank_{rank:02d}/model_optim_rng.pt"
        expected = core_names(
            tiny.rank_model(
                model,
                version=3,
                spelling="new",
                rank=rank,
                tp=tp,
                layers=range(tiny.LAYERS),
                first=True,
                last=True,
            ),
            fused=False,
        )
        written = load_pickle(file)["model"]
        assert written.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(written[key], tensor), key
