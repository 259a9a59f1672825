"""Megatron-LM directories: every combination that can exist is read, with its configuration."""

import argparse
import itertools
import shutil

import pytest
import torch

from tests.checkpoint import golden, tiny
from tests.checkpoint.tiny import assert_reads_as, edit_models
from tpcore.checkpoint import CheckpointError, convert
from tpcore.checkpoint.formats import megatron
from tpcore.checkpoint.untrusted.unpickle import load_pickle

MODEL = tiny.random_model()


# Version 0 with newer names cannot be: see the order of q/k/v rows below.
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("version", "spelling"), [(0, "old"), *itertools.product((1, 2, 3), tiny.SPELLINGS)]
)
def test_every_version_spelling_and_split(tmp_path, version, spelling, nested):
    for tp, pp in itertools.product((1, 2, 4), (1, 2, 4)):
        root = tiny.write_megatron(
            tmp_path / f"{tp}-{pp}",
            MODEL,
            version=version,
            spelling=spelling,
            nested=nested,
            tp=tp,
            pp=pp,
        )
        source = assert_reads_as(root).source
        assert (source.tensor_parallel_size, source.pipeline_parallel_size) == (tp, pp)
        assert source.qkv_layout == f"v{version}"
        assert source.iteration == 10


@pytest.mark.parametrize(("pp", "chunks"), [(1, 2), (2, 2)])
def test_interleaved_pipeline_stages(tmp_path, pp, chunks):
    assert_reads_as(tiny.write_megatron(tmp_path, MODEL, pp=pp, chunks=chunks, tp=2))


def test_the_root_an_iteration_a_rank_and_a_file_are_the_same(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL, iteration=None)
    rank = root / "release" / "mp_rank_00"
    for path in (root, root / "release", rank, rank / "model_optim_rng.pt"):
        assert assert_reads_as(path).source.iteration is None
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(rank / "model_optim_rng.pt", single / "MegatronBERT.pt")
    assert_reads_as(single)
    assert_reads_as(single / "MegatronBERT.pt")


def test_side_files_of_the_distributed_optimizer_are_ignored(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL, tp=2)
    for rank in range(2):
        folder = root / "iter_0000010" / f"mp_rank_0{rank}"
        (folder / "distrib_optim.pt").write_bytes(b"not read")
        (folder / "model_optim_rng.pt").rename(folder / "model_rng.pt")
        optimizer = root / "iter_0000010" / f"mp_rank_0{rank}_000"
        optimizer.mkdir()
        (optimizer / "optim.pt").write_bytes(b"not read")
    assert_reads_as(root)


def test_the_oldest_flat_language_model(tmp_path):
    """Embeddings straight below language_model, as files of 2019 have them."""

    def flatten(model):
        for key in list(model):
            if ".embedding." in key:
                model[key.replace(".embedding.", ".")] = model.pop(key)

    edit = edit_models(flatten)
    root = tiny.write_megatron(
        tmp_path, MODEL, version=0, spelling="old", nested=False, zipped=False, edit=edit
    )
    assert_reads_as(root)


def test_wrapped_modules(tmp_path):
    def wrap(model):
        for key in list(model):
            model[f"module.{key}"] = model.pop(key)

    assert_reads_as(tiny.write_megatron(tmp_path, MODEL, nested=False, edit=edit_models(wrap)))


def test_transformer_engine_names_of_megatron_core(tmp_path):
    legacy_to_core = (
        ("language_model.embedding.", "embedding."),
        ("language_model.", ""),
        ("self_attention.query_key_value.", "self_attention.linear_qkv."),
        ("self_attention.dense.", "self_attention.linear_proj."),
        ("mlp.dense_h_to_4h.", "mlp.linear_fc1."),
        ("mlp.dense_4h_to_h.", "mlp.linear_fc2."),
        (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
        (".post_attention_layernorm.", ".mlp.linear_fc1.layer_norm_"),
        ("lm_head.layernorm.", "lm_head.layer_norm."),
        ("lm_head.bias", "output_layer.bias"),
        ("word_embeddings_for_head.weight", "output_layer.weight"),
    )

    def rename(model):
        for key in list(model):
            name = key
            for legacy, core in legacy_to_core:
                name = name.replace(legacy, core)
            model[name] = model.pop(key)
        model["encoder.layers.0.mlp.linear_fc1._extra_state"] = b"a pickle, never opened"

    edit = edit_models(rename)
    root = tiny.write_megatron(tmp_path, MODEL, nested=False, tp=2, pp=2, edit=edit)
    assert assert_reads_as(root).source.format == "Megatron-Core (torch)"


def test_heads_of_finetuned_files(tmp_path):
    def classify(model):
        for key in [key for key in model if key.startswith(("lm_head", "binary_head"))]:
            del model[key]
        model["classification_head.weight"] = torch.ones(3, tiny.HIDDEN)
        model["classification_head.bias"] = torch.ones(3)

    edit = edit_models(classify)
    state = megatron.read(tiny.write_megatron(tmp_path, MODEL, nested=False, edit=edit))
    assert (state.head, state.head_kwargs) == ("sequence_classification", {"num_labels": 3})


def test_a_trimmed_file_without_args(tmp_path):
    root = tiny.write_megatron(tmp_path / "a", MODEL, args=None)
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        megatron.read(root)
    state = assert_reads_as(root, overrides={"num_attention_heads": tiny.HEADS})
    assert state.config.layernorm_eps == 1e-5
    assert (state.config.gelu, state.config.lm_head_gelu) == ("none", "none")
    # Some of them carry a `config` with hyphens in its names.
    config = {"num-attention-heads": tiny.HEADS, "hidden-size": tiny.HIDDEN, "num-layers": 4}

    def add(content, rank, stage):
        content["config"] = config

    assert_reads_as(tiny.write_megatron(tmp_path / "b", MODEL, args=None, edit=add))


def test_a_run_without_token_types(tmp_path):
    """Megatron makes that table together with the binary head, and so says whether it should be."""
    model = {
        name: tensor
        for name, tensor in MODEL.items()
        if not name.startswith(("pooler", "head.binary", "embeddings.token_type"))
    }

    def strip(flat):
        for key in list(flat):
            if "pooler" in key or "binary" in key or "tokentype" in key:
                del flat[key]

    def write(name, args):
        edit = edit_models(strip)
        return tiny.write_megatron(tmp_path / name, MODEL, nested=False, args=args, edit=edit)

    root = write("a", tiny.args_of(3, 1, bert_binary_head=False))
    assert assert_reads_as(root, model).config.num_token_types == 0
    convert(root, tmp_path / "b", to="megatron", tensor_parallel_size=2)
    assert_reads_as(tmp_path / "b", model)
    for args in (tiny.args_of(3, 1), tiny.args_of(3, 1, bert_binary_head=True)):
        with pytest.raises(CheckpointError, match=r"had 2 token types.*has 0 rows"):
            megatron.read(write("c", args))
    assert_reads_as(write("d", tiny.args_of(3, 1)), model, overrides={"num_token_types": 0})


def test_half_precision_and_a_missing_pooler_are_kept(tmp_path):
    model = {name: tensor.half() for name, tensor in MODEL.items() if not name.startswith("pooler")}

    def edit(content, rank, stage):
        del content["model"]["language_model"]["pooler"]
        for part in ("encoder", "embedding"):
            tree = content["model"]["language_model"][part]
            for key, value in tree.items():
                tree[key] = (
                    {k: v.half() for k, v in value.items()}
                    if isinstance(value, dict)
                    else value.half()
                )
        for part in ("lm_head", "binary_head"):
            tree = content["model"][part]
            tree.update({key: value.half() for key, value in tree.items()})

    state = assert_reads_as(tiny.write_megatron(tmp_path, MODEL, edit=edit), model)
    assert not state.config.add_pooler
    assert state.tensors["final_norm.bias"].dtype == torch.float16


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "gelu", "lm_head_gelu"),
    [
        ({}, "none", "none"),
        ({"bias_gelu_fusion": True}, "tanh", "none"),
        ({"openai_gelu": True}, "tanh", "tanh"),
        ({"onnx_safe": True}, "erf_1.41421", "erf_1.41421"),
        ({"bias_gelu_fusion": True, "onnx_safe": True}, "tanh", "erf_1.41421"),
        ({"bias_gelu_fusion": True, "openai_gelu": True}, "tanh", "tanh"),
    ],
)
def test_gelu_follows_the_args(tmp_path, changes, gelu, lm_head_gelu):
    args = tiny.args_of(3, 1, **changes)
    config = megatron.read(tiny.write_megatron(tmp_path, MODEL, args=args)).config
    assert (config.gelu, config.lm_head_gelu) == (gelu, lm_head_gelu)


@pytest.mark.parametrize(
    ("flag", "prefix"), [("bias_gelu_fusion", "tanh_gelu."), ("onnx_safe", "")]
)
def test_flipped_switches_give_the_recorded_variants(tmp_path, flag, prefix):
    """The same weights with other args compute what the implementation recorded for them."""
    from tpcore import checkpoint

    item = golden.Golden(golden.COMMITTED / "v2.0_tp2")
    expected = item
    if flag == "onnx_safe":
        expected = golden.Golden(golden.COMMITTED / "v2.5_onnxsafe_tp1")
    root = tmp_path / "ckpt"
    shutil.copytree(item.checkpoint, root)
    for file in root.glob("*/*/*.pt"):
        content = load_pickle(file)
        kept = {key: content[key] for key in ("checkpoint_version", "iteration", "model")}
        values = {k: v for k, v in vars(content["args"]).items() if not hasattr(v, "pickled_name")}
        file.unlink()
        torch.save(kept | {"args": argparse.Namespace(**{**values, flag: True})}, file)
    inputs = item.inputs()
    with torch.no_grad():
        model = checkpoint.load(root).eval()
        output = model(inputs["tokens"], inputs["padding_mask"], inputs["types"])
    golden.assert_reproduced(expected, output, prefix)


def test_other_settings_follow_the_args(tmp_path):
    args = tiny.args_of(
        3,
        1,
        layernorm_epsilon=1e-7,
        hidden_dropout=0.2,
        attention_dropout=0.3,
        init_method_std=0.5,
        apply_residual_connection_post_layernorm=True,
        vocab_size=200,
    )
    config = megatron.read(tiny.write_megatron(tmp_path, MODEL, args=args)).config
    assert config.layernorm_eps == 1e-7
    assert (config.hidden_dropout, config.attention_dropout) == (0.2, 0.3)
    assert config.init_std == 0.5
    assert config.post_layernorm
    assert not config.embedding_dropout_after_norm
    assert (config.vocab_size, config.padded_vocab_size) == (200, tiny.ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"args\.hidden_size=32, .* say 16"),
        ({"num_layers": 3}, r"args\.num_layers=3, .* say 4"),
        ({"padded_vocab_size": 128}, r"args\.padded_vocab_size=128, .* say 256"),
        ({"vocab_size": 300}, r"vocab_size=300, .* only 256 rows"),
        ({"num_attention_heads": 5}, "hidden_size=16 cannot be split"),
        ({"num_attention_heads": "4"}, r"args\.num_attention_heads='4' is not"),
        ({"layernorm_epsilon": float("nan")}, r"args\.layernorm_epsilon=nan is not"),
        ({"hidden_dropout": 1.5}, r"hidden_dropout=1\.5"),
        ({"swiglu": True}, r"args\.swiglu=True makes another architecture"),
        ({"normalization": "RMSNorm"}, "RMSNorm"),
        ({"position_embedding_type": "rope"}, "rope"),
        ({"kv_channels": 8}, "kv_channels=8"),
        ({"openai_gelu": "yes"}, "openai_gelu='yes' is not"),
    ],
)
def test_args_that_contradict_the_file_or_the_encoder(tmp_path, changes, message):
    root = tiny.write_megatron(tmp_path, MODEL, args=tiny.args_of(3, 1, **changes))
    with pytest.raises(CheckpointError, match=message):
        megatron.read(root)


def test_a_caller_who_contradicts_the_number_of_heads(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL)
    with pytest.raises(CheckpointError, match=r"num_attention_heads=8 was asked for.*with 4"):
        megatron.read(root, overrides={"num_attention_heads": 8})


# --- the order of q/k/v rows ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "args"),
    [("new", "default"), ("old", tiny.args_of(3, 1)), ("new", tiny.args_of(0, 1))],
    ids=["both", "args", "names"],
)
def test_a_lost_version_is_refused_until_the_order_is_given(tmp_path, spelling, args):
    def forget(content, rank, stage):
        del content["checkpoint_version"]

    root = tiny.write_megatron(tmp_path, MODEL, spelling=spelling, args=args, edit=forget)
    with pytest.raises(CheckpointError, match="qkv_layout='v3'"):
        megatron.read(root)
    assert_reads_as(root, qkv_layout="v3")


def test_an_unknown_order_is_refused(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL)
    with pytest.raises(CheckpointError, match="qkv_layout='v4' is unknown; use v0, v1, v2, v3"):
        megatron.read(root, qkv_layout="v4")


@pytest.mark.parametrize("version", [4, -1, 1.5, "3", True, float("nan")])
def test_versions_that_never_were(tmp_path, version):
    def edit(content, rank, stage):
        content["checkpoint_version"] = version

    root = tiny.write_megatron(tmp_path, MODEL, edit=edit)
    with pytest.raises(CheckpointError, match="checkpoint_version="):
        megatron.read(root)
