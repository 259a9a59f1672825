"""`.nemo` files and NeMo's .ckpt: written by the description, read and written by tpcore."""

import io
import json
import tarfile

import pytest
import torch

from tests.checkpoint import golden, tiny
from tpcore import checkpoint
from tpcore.checkpoint import CheckpointError, convert, nemo_contents
from tpcore.checkpoint.io import _read
from tpcore.checkpoint.untrusted.unpickle import load_pickle

MODEL = {
    name: tensor
    for name, tensor in tiny.random_model().items()
    if not name.startswith(("head.", "pooler."))
}
FULL = tiny.random_model()
ENCODER = {
    "hidden_size": tiny.HIDDEN,
    "num_layers": tiny.LAYERS,
    "num_attention_heads": tiny.HEADS,
    "max_position_embeddings": tiny.POSITIONS,
    "num_tokentypes": 2,
    "onnx_safe": True,
    "lazy_mpu_init": True,
    "vocab_file": "x",
    "tokenizer_type": "BertWordPieceLowerCase",
}
NODES = {
    "sequence_classification": {"classifier_head": {"num_output_layers": 2, "fc_dropout": 0.1}},
    "token_classification": {"head": {"num_fc_layers": 2, "fc_dropout": 0.5, "activation": "tanh"}},
    "question_answering": {"token_classifier": {"num_layers": 2, "dropout": 0.0}},
}


def classifier(labels=3):
    generator = torch.Generator().manual_seed(1)
    h = tiny.HIDDEN
    return {
        "classifier.mlp.layer0.weight": torch.randn(h, h, generator=generator),
        "classifier.mlp.layer0.bias": torch.randn(h, generator=generator),
        "classifier.mlp.layer2.weight": torch.randn(labels, h, generator=generator),
        "classifier.mlp.layer2.bias": torch.randn(labels, generator=generator),
    }


def encoder(rank=0, tp=1, *, version=3, spelling="new", prefix="bert_model.", last=False):
    flat = tiny.rank_model(
        FULL,
        version=version,
        spelling=spelling,
        rank=rank,
        tp=tp,
        layers=range(tiny.LAYERS),
        first=True,
        last=True,
    )
    kept = {k: v for k, v in flat.items() if last or ("head" not in k and "pooler" not in k)}
    return {prefix + key: tensor for key, tensor in kept.items()}


def write_nemo(
    path,
    ranks,
    *,
    config,
    encoder_config=None,
    version=3.0,
    artifacts=None,
    ids=False,
    packed=True,
    dot="./",
):
    """An archive; `ids`: artifacts have an id before their names, the configuration has links."""
    members = {}
    language_model = {"pretrained_model_name": "megatron-bert-cased", "config_file": None}
    artifacts = dict(artifacts or {})
    if encoder_config is not None:
        artifacts["enc_config.json"] = json.dumps(encoder_config)
        language_model["config_file"] = "enc_config.json"
    if version != "absent":
        artifacts["megatron_checkpoint_version.json"] = json.dumps({"checkpoint_version": version})
    config = {"language_model": language_model, **config}
    text = json.dumps(config, indent=1)  # JSON is YAML
    for number, (name, content) in enumerate(artifacts.items()):
        stored = f"{number:032x}_{name}" if ids else name
        if ids:
            text = text.replace(f'"{name}"', f'"nemo:{stored}"')
        members[stored] = content.encode()
    members["model_config.yaml"] = text.encode()
    for rank, state in enumerate(ranks):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        folder = f"mp_rank_{rank:02d}/" if len(ranks) > 1 else ""
        members[f"{folder}model_weights.ckpt"] = buffer.getvalue()
    with tarfile.open(path, "w:gz" if packed else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(dot + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def assert_encoder(state, model=MODEL):
    for name, tensor in model.items():
        assert torch.equal(state.full(name), tensor), name


@pytest.mark.parametrize("task", list(NODES))
@pytest.mark.parametrize(("packed", "ids", "dot"), [(True, False, "./"), (False, True, "")])
@pytest.mark.parametrize("tp", [1, 2])
def test_fine_tuned_models(tmp_path, task, packed, ids, dot, tp):
    labels = 2 if task == "question_answering" else 3
    names = {"labels.csv": "no\nyes\nmaybe\n", "vocab": "\n".join(map(str, range(250))) + "\n"}
    config = {
        **NODES[task],
        "class_labels": {"class_labels_file": "labels.csv"},
        "tokenizer": {"vocab_file": "vocab", "tokenizer_name": "megatron-bert-cased"},
    }
    ranks = [
        {**encoder(rank, tp), **classifier(labels), "loss.weight": torch.ones(3)}
        for rank in range(tp)
    ]
    path = write_nemo(
        tmp_path / "m.nemo",
        ranks,
        config=config,
        encoder_config=ENCODER,
        artifacts=names,
        ids=ids,
        packed=packed,
        dot=dot,
    )
    state = _read(path, None, {})
    assert_encoder(state)
    assert state.head == task
    assert state.head_kwargs["num_layers"] == 2
    assert torch.equal(
        state.full("head.hidden.0.weight"), classifier()["classifier.mlp.layer0.weight"]
    )
    assert state.config.gelu == "erf_1.41421"
    assert state.config.vocab_size == 250
    assert state.source.lowercase is False
    assert state.labels == ("no", "yes", "maybe")
    model = checkpoint.load(path).eval()
    ids_ = torch.arange(6).view(1, 6)
    with torch.no_grad():
        output = model(ids_)
        x = output.last_hidden_state
        x = x[:, 0] if task == "sequence_classification" else x
        layers = classifier(labels)
        activation = torch.tanh if task == "token_classification" else torch.relu
        hidden = activation(
            x @ layers["classifier.mlp.layer0.weight"].T + layers["classifier.mlp.layer0.bias"]
        )
        expected = (
            hidden @ layers["classifier.mlp.layer2.weight"].T + layers["classifier.mlp.layer2.bias"]
        )
    if task == "question_answering":
        got = torch.stack([output.start_logits, output.end_logits], -1)
    else:
        got = output.logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("version", "spelling"), [(0, "old"), (1, "old"), (3, "old"), (3, "new")])
def test_rows_keep_the_order_of_the_file_that_they_came_from(tmp_path, version, spelling):
    ranks = [encoder(rank, 2, version=version, spelling=spelling) for rank in range(2)]
    stored = None if version == 0 else float(version)
    path = write_nemo(tmp_path / "m.nemo", ranks, config={}, encoder_config=ENCODER, version=stored)
    assert_encoder(_read(path, None, {}))


def test_new_names_without_a_version_are_ambiguous(tmp_path):
    path = write_nemo(
        tmp_path / "m.nemo", [encoder()], config={}, encoder_config=ENCODER, version="absent"
    )
    with pytest.raises(CheckpointError, match="qkv_layout='v3'"):
        checkpoint.inspect(path)
    assert_encoder(_read(path, "v3", {}))


@pytest.mark.parametrize("prefix", ["model.", "bert_model.model."])
def test_models_of_later_releases(tmp_path, prefix):
    config = {**ENCODER, "onnx_safe": False, "bias_gelu_fusion": True}
    state = encoder(prefix=prefix, last=True)
    path = write_nemo(tmp_path / "m.nemo", [state], config=config, version="absent")
    read = _read(path, None, {})
    assert_encoder(read, FULL)
    assert (read.config.gelu, read.head) == ("tanh", "pretraining")


def test_lightning_checkpoints(tmp_path):
    file = tmp_path / "x--val_loss=0.35-epoch=0.ckpt"
    hyper = {"cfg": {"language_model": {"config": ENCODER}, **NODES["token_classification"]}}
    torch.save(
        {
            "state_dict": {**encoder(), **classifier()},
            "hyper_parameters": hyper,
            "checkpoint_version": 3.0,
            "global_step": 12,
            "epoch": 1,
        },
        file,
    )
    state = _read(file, None, {})
    assert_encoder(state)
    assert (state.head, state.source.iteration) == ("token_classification", 12)
    torch.save({**encoder(), **classifier()}, file)
    with pytest.raises(CheckpointError, match="nothing says what for"):
        checkpoint.inspect(file, num_attention_heads=tiny.HEADS, qkv_layout="v3")


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("pattern", ["mp_rank_{:02d}", "tp_rank_{:02d}_pp_rank_000"])
def test_lightning_checkpoints_of_many_ranks(tmp_path, tp, pattern):
    """NeMo puts each rank's file into a folder of its own, beside those of other steps."""
    hyper = {"cfg": {"language_model": {"config": ENCODER}, **NODES["token_classification"]}}
    for rank in range(tp):
        folder = tmp_path / pattern.format(rank)
        folder.mkdir()
        content = {"hyper_parameters": hyper, "checkpoint_version": 3.0, "global_step": 12}
        state = {**encoder(rank, tp), **classifier()}
        torch.save({**content, "state_dict": state}, folder / "a--epoch=0.ckpt")
    state = _read(tmp_path, None, {})
    assert_encoder(state)
    assert (state.source.tensor_parallel_size, state.head) == (tp, "token_classification")
    last = tmp_path / pattern.format(tp - 1)
    (last / "a--epoch=0.ckpt").rename(last / "b.ckpt")
    with pytest.raises(CheckpointError, match="different names"):
        _read(tmp_path, None, {})
    (last / "b.ckpt").rename(last / "a--epoch=0.ckpt")
    (last / "a-last.ckpt").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints; pass .*a--epoch=0\.ckpt"):
        _read(tmp_path, None, {})
    assert_encoder(_read(last / "a--epoch=0.ckpt", None, {}))
    (tmp_path / pattern.format(0) / "a--epoch=0.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"missing: .*_rank_00.*a--epoch=0\.ckpt"):
        _read(last / "a--epoch=0.ckpt", None, {})


def test_a_head_that_tpcore_does_not_have(tmp_path):
    other = {"classifier.intent_mlp.layer0.weight": torch.ones(3, tiny.HIDDEN)}
    path = write_nemo(
        tmp_path / "m.nemo", [{**encoder(), **other}], config={}, encoder_config=ENCODER
    )
    with pytest.raises(CheckpointError, match=r"its head \(intent and slot\) is none"):
        checkpoint.load(path)
    assert checkpoint.load(path, head=None).head is None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("bert_model.language_model.encoder.final_layernorm.bias"), "missing par"),
        (lambda s: s.update({"bert_model.language_model.extra": torch.ones(1)}), "unknown param"),
        (lambda s: s.update({"classifier.mlp.layer4.bias": torch.ones(1)}), "missing|shape"),
        (lambda s: s.update({"decoder.weight": torch.ones(1)}), r"unknown .*decoder\.weight"),
    ],
)
def test_every_key_is_accounted_for(tmp_path, edit, message):
    state = {**encoder(), **classifier()}
    edit(state)
    config = NODES["token_classification"]
    path = write_nemo(tmp_path / "m.nemo", [state], config=config, encoder_config=ENCODER)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


# --- written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_layout_of_what_is_written(tmp_path, tp):
    source = golden.COMMITTED / "nemo_tp2_v3" / "model.nemo"
    path = tmp_path / "m.nemo"
    convert(source, path, to="nemo", tensor_parallel_size=tp)
    with tarfile.open(path, "r:gz") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "x", filter="data")
    assert names[0] == "."
    weights = [f"./mp_rank_{rank:02d}/model_weights.ckpt" for rank in range(tp)]
    assert {name for name in names if name.endswith(".ckpt")} == set(
        weights if tp > 1 else ["./model_weights.ckpt"]
    )
    folder = tmp_path / "x"
    version = json.loads((folder / "megatron_checkpoint_version.json").read_text())
    assert version == {"checkpoint_version": 3.0}
    facts = json.loads((folder / "megatron-bert-uncased_encoder_config.json").read_text())
    assert facts["hidden_size"] == 64
    assert facts["onnx_safe"] is True
    tokens = (folder / "tokenizer.vocab_file").read_text().splitlines()
    assert json.loads((folder / "tokenizer_vocab_dict.json").read_text())[tokens[7]] == 7
    assert (folder / "label_ids.csv").read_text().splitlines()[1] == "B-DIS"
    state = load_pickle(folder / (weights[0] if tp > 1 else "model_weights.ckpt"))
    original = load_pickle_of(source, tmp_path / "y")
    assert state.keys() == original.keys()
    about = nemo_contents(path)
    assert about.config["head"]["num_fc_layers"] == 2
    assert about.vocabulary == tuple(tokens)
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, path, to="nemo")
    convert(source, path, to="nemo", overwrite=True)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["m.nemo", "x", "y"]


def load_pickle_of(path, folder):
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return load_pickle(folder / "mp_rank_00" / "model_weights.ckpt")
