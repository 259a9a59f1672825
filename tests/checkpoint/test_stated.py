"""Configurations beside a checkpoint; the GeLU that a file's own arguments ask for."""

import json
import logging
import shutil

import pytest
import torch

from tests.checkpoint import golden, tiny
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError
from tpcore.checkpoint.untrusted.unpickle import load_pickle
from tpcore.cli import main

MODEL = tiny.random_model()


@pytest.fixture
def without_args(tmp_path):
    return tiny.write_megatron(tmp_path / "a", MODEL, args=None)


@pytest.fixture
def with_args(tmp_path):
    return tiny.write_megatron(tmp_path / "b", MODEL)


def _write(path, values):
    path.write_text(json.dumps(values))
    return path


def test_a_file_says_what_the_checkpoint_does_not(tmp_path, without_args):
    """In the names of the files that came with BioMegatron: hyphens, max-seq-length."""
    values = {
        "num-attention-heads": tiny.HEADS,
        "max-seq-length": tiny.POSITIONS,
        "hidden-size": tiny.HIDDEN,
        "num-layers": tiny.LAYERS,
        "layernorm-epsilon": 1e-12,
        "onnx-safe": True,
        "vocab-size": 7,  # NeMo drops it too
    }
    file = _write(tmp_path / "c.json", values)
    config = checkpoint.inspect(without_args, config_file=file, qkv_layout="v3").config
    assert config.num_attention_heads == tiny.HEADS
    assert config.layernorm_eps == 1e-12
    assert config.gelu == config.lm_head_gelu == "erf_1.41421"
    assert config.vocab_size == tiny.ROWS
    with pytest.raises(CheckpointError, match="does not say how many attention heads"):
        checkpoint.inspect(without_args, qkv_layout="v3")
    # A file wins over a mapping, as in NeMo.
    both = {"config_file": file, "config": {"num_attention_heads": 2}}
    assert checkpoint.inspect(without_args, qkv_layout="v3", **both).config == config
    model = checkpoint.load(without_args, qkv_layout="v3", config={"num_attention_heads": 2})
    assert model.config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads=8 was asked for, .* written with 4"),
        ({"hidden_size": 32}, r"the file says hidden_size=16, but config says hidden_size=32"),
        ({"openai_gelu": True}, r"says gelu='none', but config says gelu='tanh'"),
        ({"layernorm_eps": 1e-12}, r"layernorm_eps=1e-05, but config says layernorm_eps=1e-12"),
        ({"hiden_size": 16}, r"unknown key 'hiden_size' in config; did you mean hidden_size"),
        ("megatron-bert-345m", "is unknown; presets are megatron-bert-345m-uncased"),
    ],
)
def test_contradictions_show_both_values(with_args, values, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.inspect(with_args, config=values)


def test_what_agrees_is_no_contradiction(with_args):
    values = {"hidden_size": tiny.HIDDEN, "num_attention_heads": tiny.HEADS, "onnx_safe": False}
    plain = checkpoint.inspect(with_args).config
    assert checkpoint.inspect(with_args, config=values).config == plain


# --- GeLU ----------------------------------------------------------------------------------------


def _outputs(path, item):
    inputs = item.inputs()
    model = checkpoint.load(path).eval()
    with torch.no_grad():
        return model(inputs["tokens"], inputs["padding_mask"], inputs["types"])


@pytest.mark.parametrize(
    ("name", "switches", "prefix"),
    [
        ("v2.5_onnxsafe_tp1", {"bias_gelu_fusion": True}, "tanh_gelu."),
        ("v2.5_L2postln_tp1", {"bias_gelu_fusion": True}, "tanh_gelu."),
        ("v2.5_onnxsafe_tp1", {}, ""),
    ],
)
def test_the_arguments_of_a_file_choose_the_recorded_variant(tmp_path, name, switches, prefix):
    item = golden.Golden(golden.COMMITTED / name)
    path = _with_args(item, tmp_path, switches)
    golden.assert_reproduced(item, _outputs(path, item), prefix)


def test_the_other_switches_of_gelu(tmp_path):
    """openai_gelu is tanh everywhere; without onnx_safe it is the exact erf."""
    item = golden.Golden(golden.COMMITTED / "v2.5_onnxsafe_tp1")
    output = _outputs(_with_args(item, tmp_path / "a", {"openai_gelu": True}), item)
    errors = golden.errors_against(item, output, "tanh_gelu.")
    assert errors["hidden"] <= 1e-5
    assert errors["lm_logits"] > 2e-5  # the fused tanh never reached the LM head, this one does
    config = checkpoint.inspect(_with_args(item, tmp_path / "b", {"onnx_safe": False})).config
    assert (config.gelu, config.lm_head_gelu) == ("none", "none")


def _with_args(item, folder, switches):
    """A copy of a recorded checkpoint whose file was written by a run with these switches."""
    shutil.copytree(item.checkpoint, folder / "ckpt")
    (file,) = (folder / "ckpt").rglob("*.pt")
    content = load_pickle(file)
    for name, value in switches.items():
        setattr(content["args"], name, value)
    kept = ("args", "checkpoint_version", "iteration", "model")
    torch.save({key: content[key] for key in kept if key in content}, folder / "copy")
    (folder / "copy").replace(file)
    return folder / "ckpt"


# --- remarks -------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers_are_remarked_on(tmp_path, caplog):
    model = {name: tensor.clone() for name, tensor in MODEL.items()}
    model["blocks.1.mlp.dense_in.bias"][3] = float("nan")
    root = tiny.write_megatron(tmp_path / "a", model)
    with caplog.at_level(logging.WARNING):
        checkpoint.convert(root, tmp_path / "b", to="megatron", tensor_parallel_size=2)
    (record,) = [r for r in caplog.records if "finite" in r.getMessage()]
    assert "blocks.1.mlp.dense_in.bias" in record.getMessage()


def test_inspect_says_what_is_padding_and_what_is_missing(with_args):
    info = checkpoint.inspect(with_args, vocab_size=tiny.ROWS - 6)
    padded = {entry.name for entry in info.parameters if entry.padding == 6}
    assert padded == {"embeddings.word_embeddings.weight", "head.lm.bias"}
    assert info.missing == ()
    assert "the last 6 padding" in str(info)
    classifier = golden.COMMITTED / "nemo_tp2_v3" / "model.nemo"
    assert checkpoint.inspect(classifier).to_dict()["missing"] == [
        "pooler",
        "masked-LM head",
        "binary head",
    ]


def test_the_command_line_takes_the_oldest_names(tmp_path, without_args, capsys):
    file = _write(tmp_path / "c.json", {"num-attention-heads": 2})
    arguments = ["--bert_config", str(file), "--qkv-layout", "v3", "--gelu", "tanh"]
    assert main(["inspect", str(without_args), "--json", *arguments]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["num_attention_heads"], config["gelu"]) == (2, "tanh")
    target = tmp_path / "m.nemo"
    assert main(["convert", str(without_args), str(target), "--to", "nemo", *arguments]) == 0
    assert checkpoint.inspect(target).config.num_attention_heads == 2
