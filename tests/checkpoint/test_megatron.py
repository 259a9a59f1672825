"""Megatron-LM directories: every combination that can exist is read, every fault is refused."""

import argparse
import itertools
import re
import shutil

import pytest
import torch

from tests.checkpoint import golden, tiny
from tpcore.checkpoint import CheckpointError, convert, megatron
from tpcore.checkpoint.unpickle import load_pickle

MODEL = tiny.random_model()


def _assert_reads_as(path, model=MODEL, **kwargs):
    state = megatron.read(path, **kwargs)
    assert set(state.tensors) == set(model)
    for name, tensor in model.items():
        full = state.full(name)
        assert full.shape == state.tensors[name].shape, name
        assert torch.equal(full, tensor), name
    return state


def _edit_models(change):
    """An `edit` for tiny.write_megatron that changes the flat or nested model of every file."""

    def edit(content, rank, stage):
        change(content["model"])

    return edit


# --- what is read --------------------------------------------------------------------------------


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
        source = _assert_reads_as(root).source
        assert (source.tensor_parallel_size, source.pipeline_parallel_size) == (tp, pp)
        assert source.qkv_layout == f"v{version}"
        assert source.iteration == 10


@pytest.mark.parametrize(("pp", "chunks"), [(1, 2), (2, 2)])
def test_interleaved_pipeline_stages(tmp_path, pp, chunks):
    _assert_reads_as(tiny.write_megatron(tmp_path, MODEL, pp=pp, chunks=chunks, tp=2))


def test_the_root_an_iteration_a_rank_and_a_file_are_the_same(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL, iteration=None)
    rank = root / "release" / "mp_rank_00"
    for path in (root, root / "release", rank, rank / "model_optim_rng.pt"):
        assert _assert_reads_as(path).source.iteration is None
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(rank / "model_optim_rng.pt", single / "MegatronBERT.pt")
    _assert_reads_as(single)
    _assert_reads_as(single / "MegatronBERT.pt")


def test_side_files_of_the_distributed_optimizer_are_ignored(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL, tp=2)
    for rank in range(2):
        folder = root / "iter_0000010" / f"mp_rank_0{rank}"
        (folder / "distrib_optim.pt").write_bytes(b"not read")
        (folder / "model_optim_rng.pt").rename(folder / "model_rng.pt")
        optimizer = root / "iter_0000010" / f"mp_rank_0{rank}_000"
        optimizer.mkdir()
        (optimizer / "optim.pt").write_bytes(b"not read")
    _assert_reads_as(root)


def test_the_oldest_flat_language_model(tmp_path):
    """Embeddings straight below language_model, as files of 2019 have them."""

    def flatten(model):
        for key in list(model):
            if ".embedding." in key:
                model[key.replace(".embedding.", ".")] = model.pop(key)

    edit = _edit_models(flatten)
    root = tiny.write_megatron(
        tmp_path, MODEL, version=0, spelling="old", nested=False, zipped=False, edit=edit
    )
    _assert_reads_as(root)


def test_wrapped_modules(tmp_path):
    def wrap(model):
        for key in list(model):
            model[f"module.{key}"] = model.pop(key)

    _assert_reads_as(tiny.write_megatron(tmp_path, MODEL, nested=False, edit=_edit_models(wrap)))


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

    edit = _edit_models(rename)
    root = tiny.write_megatron(tmp_path, MODEL, nested=False, tp=2, pp=2, edit=edit)
    assert _assert_reads_as(root).source.format == "Megatron-Core (torch)"


def test_heads_of_finetuned_files(tmp_path):
    def classify(model):
        for key in [key for key in model if key.startswith(("lm_head", "binary_head"))]:
            del model[key]
        model["classification_head.weight"] = torch.ones(3, tiny.HIDDEN)
        model["classification_head.bias"] = torch.ones(3)

    edit = _edit_models(classify)
    state = megatron.read(tiny.write_megatron(tmp_path, MODEL, nested=False, edit=edit))
    assert (state.head, state.head_kwargs) == ("sequence_classification", {"num_labels": 3})


def test_a_trimmed_file_without_args(tmp_path):
    root = tiny.write_megatron(tmp_path / "a", MODEL, args=None)
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        megatron.read(root)
    state = _assert_reads_as(root, overrides={"num_attention_heads": tiny.HEADS})
    assert state.config.layernorm_eps == 1e-5
    assert (state.config.gelu, state.config.lm_head_gelu) == ("none", "none")
    # Some of them carry a `config` with hyphens in its names.
    config = {"num-attention-heads": tiny.HEADS, "hidden-size": tiny.HIDDEN, "num-layers": 4}

    def add(content, rank, stage):
        content["config"] = config

    _assert_reads_as(tiny.write_megatron(tmp_path / "b", MODEL, args=None, edit=add))


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
        edit = _edit_models(strip)
        return tiny.write_megatron(tmp_path / name, MODEL, nested=False, args=args, edit=edit)

    root = write("a", tiny.args_of(3, 1, bert_binary_head=False))
    assert _assert_reads_as(root, model).config.num_token_types == 0
    convert(root, tmp_path / "b", to="megatron", tensor_parallel_size=2)
    _assert_reads_as(tmp_path / "b", model)
    for args in (tiny.args_of(3, 1), tiny.args_of(3, 1, bert_binary_head=True)):
        with pytest.raises(CheckpointError, match=r"had 2 token types.*has 0 rows"):
            megatron.read(write("c", args))
    _assert_reads_as(write("d", tiny.args_of(3, 1)), model, overrides={"num_token_types": 0})


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

    state = _assert_reads_as(tiny.write_megatron(tmp_path, MODEL, edit=edit), model)
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
    _assert_reads_as(root, qkv_layout="v3")


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


# --- accounting ----------------------------------------------------------------------------------

KEYS = sorted(
    tiny.rank_model(
        tiny.random_model(layers=1),
        version=3,
        spelling="new",
        rank=0,
        tp=1,
        layers=range(1),
        first=True,
        last=True,
    )
)


@pytest.mark.parametrize("key", KEYS)
def test_a_deleted_and_a_renamed_key_always_fail(tmp_path, key):
    model = tiny.random_model(layers=1)

    def write(name, change):
        return tiny.write_megatron(tmp_path / name, model, nested=False, edit=_edit_models(change))

    with pytest.raises(CheckpointError, match="missing parameters"):
        megatron.read(write("deleted", lambda flat: flat.pop(key)))

    def rename(flat):
        flat[f"{key}_"] = flat.pop(key)

    with pytest.raises(CheckpointError, match=re.escape(f"{key}_")):
        megatron.read(write("renamed", rename))


@pytest.mark.parametrize("key", ["extra", "lm_head.extra.weight", "language_model.encoder.x"])
def test_an_extra_key_always_fails(tmp_path, key):
    edit = _edit_models(lambda flat: flat.update({key: torch.zeros(1)}))
    root = tiny.write_megatron(tmp_path, MODEL, nested=False, edit=edit)
    with pytest.raises(CheckpointError, match=f"unknown parameters: {re.escape(key)}"):
        megatron.read(root)


def test_a_layer_that_is_missing_in_the_middle(tmp_path):
    def drop(flat):
        for key in [key for key in flat if ".layers.2." in key]:
            del flat[key]

    root = tiny.write_megatron(tmp_path, MODEL, nested=False, edit=_edit_models(drop))
    with pytest.raises(CheckpointError, match=r"missing parameters: blocks\.2\.input_norm"):
        megatron.read(root)


def test_ranks_that_do_not_belong_together(tmp_path):
    other = tiny.random_model(seed=1)
    root = tiny.write_megatron(tmp_path / "a", MODEL, tp=2)
    foreign = tiny.write_megatron(tmp_path / "b", other, tp=2)
    place = "iter_0000010/mp_rank_01/model_optim_rng.pt"
    shutil.copy(foreign / place, root / place)
    state = megatron.read(root)
    with pytest.raises(CheckpointError, match=r"final_norm\.bias should be the same on every rank"):
        state.full("final_norm.bias")

    def drop(content, rank, stage):
        if rank == 1:
            del content["model"]["binary_head"]

    with pytest.raises(CheckpointError, match=r"head\.binary"):
        megatron.read(tiny.write_megatron(tmp_path / "c", MODEL, tp=2, edit=drop))

    def widen(content, rank, stage):
        if rank == 1:
            head = content["model"]["lm_head"]
            head["bias"] = head["bias"].repeat(2)

    with pytest.raises(CheckpointError, match=r"head\.lm\.bias is \[128\].*\[256\].*on rank 1"):
        megatron.read(tiny.write_megatron(tmp_path / "d", MODEL, tp=2, edit=widen))


def test_an_untied_decoder_is_refused_with_its_head(tmp_path):
    def edit(content, rank, stage):
        if stage == 1:
            content["model"]["word_embeddings_for_head"]["weight"] += 1

    state = megatron.read(tiny.write_megatron(tmp_path, MODEL, pp=2, tp=2, edit=edit))
    with pytest.raises(CheckpointError, match="tied"):
        state.full("embeddings.word_embeddings.weight")


# --- files that are missing or not what they should be -------------------------------------------


def test_a_missing_rank_is_named(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL, tp=4)
    folder = root / "iter_0000010"
    shutil.rmtree(folder / "mp_rank_02")
    with pytest.raises(CheckpointError, match=r"missing: .*mp_rank_02/model_optim_rng\.pt$"):
        megatron.read(root)
    shutil.rmtree(folder / "mp_rank_03")
    with pytest.raises(CheckpointError, match=r"written by 4 tensor-parallel ranks, but 2 .* are"):
        megatron.read(root)
    with pytest.raises(CheckpointError, match="written by 4 tensor-parallel ranks, but 1"):
        megatron.read(folder / "mp_rank_00")


def test_a_missing_stage_is_named(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL, tp=2, pp=2)
    (root / "iter_0000010" / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match=r"missing: .*mp_rank_01_000/model_optim_rng\.pt$"):
        megatron.read(root)


@pytest.mark.parametrize("word", ["", "ten", "-1", "iter_0000010", "1" * 40])
def test_a_tracker_that_says_nothing(tmp_path, word):
    root = tiny.write_megatron(tmp_path, MODEL)
    (root / "latest_checkpointed_iteration.txt").write_text(word)
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt: .*neither"):
        megatron.read(root)


def test_a_tracker_that_names_what_is_not_there(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL)
    (root / "latest_checkpointed_iteration.txt").write_text("20\n")
    with pytest.raises(CheckpointError, match=r"names iteration 20, but .*iter_0000020 is missing"):
        megatron.read(root)


def test_a_missing_tracker_is_an_error_that_offers_what_is_there(tmp_path):
    root = tiny.write_megatron(tmp_path, MODEL)
    (root / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match=r"pass .*iter_0000010"):
        megatron.read(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"state_dict": {}}, "no 'model' in it; it holds: state_dict"),
        ({}, "it holds: nothing"),
        ({"model": [1]}, "model is a list"),
        ({"model": {"lm_head": {"bias": 3}}, "args": 7}, "args is a int"),
        ({"model": {"lm_head": {"bias": 3}}}, r"lm_head\.bias is a int, not a tensor"),
        ({"model": {1: torch.ones(1)}}, "no string"),
        ({"model": {"lm_head": {"bias": torch.ones(3)}}}, "no transformer layers"),
        ({"model": {}}, "no transformer layers"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    file = tmp_path / "MegatronBERT.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=message) as error:
        megatron.read(file)
    assert str(file) in str(error.value)


def test_models_that_contain_themselves(tmp_path):
    tree: dict = {"a": torch.ones(1)}
    tree["again"] = tree
    torch.save({"model": tree}, tmp_path / "MegatronBERT.pt")
    with pytest.raises(CheckpointError, match="nested more than"):
        megatron.read(tmp_path)


def test_tensors_that_are_not_dense(tmp_path):
    flat = {"lm_head.bias": torch.ones(4).to_sparse()}
    torch.save({"model": flat}, tmp_path / "MegatronBERT.pt")
    with pytest.raises(CheckpointError, match=r"lm_head\.bias"):
        megatron.read(tmp_path)


def test_shapes_beyond_the_file(tmp_path):
    flat = {"lm_head.bias": torch.ones(1).expand(2**40)}
    torch.save({"model": flat}, tmp_path / "MegatronBERT.pt")
    with pytest.raises(CheckpointError, match="claims shape"):
        megatron.read(tmp_path)


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_written_directory_is_what_the_description_says(tmp_path, tp):
    """Against the keys, shapes, nesting and args of tiny.py, which knows nothing of the tables."""
    source = tiny.write_megatron(tmp_path / "source", MODEL, version=1, spelling="old", tp=2)
    convert(source, tmp_path / "out", to="megatron", tensor_parallel_size=tp)
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "10"
    rows = -(-tiny.ROWS // (128 * tp)) * 128 * tp
    model = dict(MODEL)
    for name in ("embeddings.word_embeddings.weight", "head.lm.bias"):
        last = model[name][-1:]
        model[name] = torch.cat([model[name], *[last] * (rows - tiny.ROWS)])
    for rank in range(tp):
        file = tmp_path / f"out/iter_0000010/mp_rank_{rank:02d}/model_optim_rng.pt"
        content = load_pickle(file)
        assert content["checkpoint_version"] == 3.0
        assert content["iteration"] == 10
        expected = tiny.nest(
            tiny.rank_model(
                model,
                version=3,
                spelling="new",
                rank=rank,
                tp=tp,
                layers=range(tiny.LAYERS),
                first=True,
                last=True,
            )
        )
        _assert_same_tree(content["model"], expected)
        args = vars(content["args"])
        for name, value in vars(tiny.args_of(3, tp, padded_vocab_size=rows)).items():
            assert args[name] == value or (args[name] in (None, False) and not value), name
        # What Megatron-LM compares on load when a vocabulary file is given.
        for name in ("make_vocab_size_divisible_by", "padded_vocab_size", "tokenizer_type"):
            assert name in args
        # No shard drags the full tensor's memory into its file.
        assert file.stat().st_size < 2 * sum(t.numel() * 4 for t in model.values()) / tp + 2**15


def _assert_same_tree(tree, expected):
    assert tree.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            _assert_same_tree(tree[key], value)
        else:
            assert torch.equal(tree[key], value), key


def test_round_trips_between_sizes_are_bit_equal(tmp_path):
    """1 -> 2 -> 4 -> 1, with a vocabulary whose padding differs at each of them."""
    model = tiny.random_model(rows=1152)
    args = tiny.args_of(3, 1, padded_vocab_size=1152)
    path = tiny.write_megatron(tmp_path / "start", model, args=args)
    first = megatron.read(path)
    rows = []
    for step, tp in enumerate((2, 4, 1)):
        info = convert(path, tmp_path / str(step), to="megatron", tensor_parallel_size=tp)
        rows.append(info.vocab_rows)
        path = tmp_path / str(step)
    assert rows == [1280, 1536, 1152]
    last = _assert_reads_as(path, model)
    assert last.config == first.config


@pytest.mark.parametrize("name", [item.name for item in golden.committed()])
def test_real_files_survive_round_trips(tmp_path, name):
    from tpcore.checkpoint.io import _read

    path = golden.Golden(golden.COMMITTED / name).checkpoint
    first = _read(path, None, {})
    for step, tp in enumerate((1, 2, 4, 1)):
        convert(path, tmp_path / str(step), to="megatron", tensor_parallel_size=tp)
        path = tmp_path / str(step)
    last = _read(path, None, {})
    rows = first.config.vocab_size
    assert last.config.replace(padded_vocab_size=None) == first.config.replace(
        padded_vocab_size=None
    )
    assert (last.head, dict(last.head_kwargs)) == (first.head, dict(first.head_kwargs))
    assert last.labels == first.labels
    for tensor in first.tensors:
        assert torch.equal(last.full(tensor, rows), first.full(tensor, rows)), tensor


def test_sizes_that_do_not_divide_write_nothing(tmp_path):
    root = tiny.write_megatron(tmp_path / "a", MODEL)
    with pytest.raises(CheckpointError, match=r"num_attention_heads=4 .* use 1, 2 or 4"):
        convert(root, tmp_path / "b", to="megatron", tensor_parallel_size=3)
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("gelu", "lm_head_gelu"),
    list(itertools.product(("none", "tanh", "erf_1.41421"), repeat=2)),
)
def test_every_pair_of_gelus_is_written_and_read_back(tmp_path, gelu, lm_head_gelu):
    root = tiny.write_megatron(tmp_path / "a", MODEL)
    overrides = {"gelu": gelu, "lm_head_gelu": lm_head_gelu}
    info = convert(root, tmp_path / "b", to="megatron", **overrides)
    assert (info.config.gelu, info.config.lm_head_gelu) == (gelu, lm_head_gelu)


def test_a_head_that_has_no_name_in_tpcore_is_rewritten_but_not_converted(tmp_path):
    def choose(model):
        for key in [key for key in model if key.startswith(("lm_head", "binary_head"))]:
            del model[key]
        model["multichoice_head.weight"] = torch.ones(1, tiny.HIDDEN)
        model["multichoice_head.bias"] = torch.ones(1)

    edit = _edit_models(choose)
    root = tiny.write_megatron(tmp_path / "a", MODEL, nested=False, edit=edit)
    assert convert(root, tmp_path / "b", to="megatron").head == "multichoice"
    with pytest.raises(CheckpointError, match=r"head \(multichoice\) cannot be written"):
        convert(root, tmp_path / "c", to="huggingface")
