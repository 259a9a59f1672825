"""Files in the layout of NeMo itself, which say nothing of tpcore's: the page's calls on them."""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from pathlib import Path

import pytest
import torch
import yaml

from tests.interop.test_nemo import CLASSES, _need_lightning, _reference, _trainer, no_group
from tests.tasks import tiny_data
from tpcore import checkpoint
from tpcore.checkpoint.errors import CheckpointError
from tpcore.cli import main
from tpcore.models.packing import pack_sequences
from tpcore.train.finetune import finetune
from tpcore.train.nemo_file import describe_nemo, load_nemo
from tpcore.train.read_config import load_config

__all__ = ["no_group"]  # a fixture

GOLDEN = Path(__file__).parents[1] / "golden/nemo_tp2_v3/model.nemo"
# What NeMo's own configurations have beside what tpcore reads.
OTHERS = {
    "optim": {"name": "adam", "lr": 2e-5, "args": {"name": "auto", "params": {"betas": [0.9, 1]}}},
    "infer_samples": ["by the end"],
    "train_ds": {"file_path": None, "batch_size": 64, "shuffle": True, "drop_last": False},
    "nemo_version": "1.4.0",
}


def as_nemo(source: Path, to: Path, dataset: dict, **nodes) -> Path:
    """A file of tpcore's without anything of it: ids before the names, and NeMo's other keys."""
    with tarfile.open(source) as archive:
        members = {
            member.name.removeprefix("./"): archive.extractfile(member).read()
            for member in archive
            if member.isfile()
        }
    del members["tpcore_model.json"]
    config = yaml.safe_load(members.pop("model_config.yaml"))
    del config["tpcore"]
    config |= {**OTHERS, "dataset": dataset, **nodes}
    text = yaml.safe_dump(config)
    renamed = {}
    for name, content in members.items():
        if name.endswith("model_weights.ckpt"):
            renamed[name] = content
            continue
        stored = f"{uuid.uuid4().hex}_{name}"
        text = text.replace(f": {name}\n", f": nemo:{stored}\n")
        renamed[stored] = content
    renamed["model_config.yaml"] = text.encode()
    with tarfile.open(to, "w:gz") as archive:
        for name, content in renamed.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return to


DATASETS = {
    "text_classification": {"num_classes": 2, "max_seq_length": 32, "do_lower_case": False},
    "token_classification": {
        "data_dir": "???",
        "max_seq_length": 32,
        "pad_label": "O",
        "ignore_extra_tokens": True,
        "ignore_start_end": True,
        "num_workers": 2,
    },
    "question_answering": {
        "version_2_with_negative": True,
        "max_seq_length": 32,
        "max_query_length": 8,
        "doc_stride": 8,
        "do_lower_case": True,
    },
}


@pytest.fixture(scope="module", params=list(CLASSES))
def written(request, tmp_path_factory):
    """The task, tpcore's own file, the same as NeMo's, a labelled file."""
    task = request.param
    folder = tmp_path_factory.mktemp(task)
    values = {}
    if task == "question_answering":
        values = {f"model__dataset__{k}": v for k, v in DATASETS[task].items() if "lower" not in k}
    config = load_config(None, tiny_data.overrides(task, folder, trainer__max_steps=4, **values))
    result = finetune(config)
    own = next((result.path / "checkpoints").glob("*.nemo"))
    nodes = {}
    if task == "token_classification":  # labels in the configuration alone, as NeMo has them too
        labels = describe_nemo(own)[1].labels.names
        nodes = {"label_ids": {n: i for i, n in enumerate(labels)}, "class_labels": None}
    two = folder / "two.nemo"
    checkpoint.convert(own, two, to="nemo", tensor_parallel_size=2)
    nemo = as_nemo(two, folder / "nemo.nemo", DATASETS[task], **nodes)
    return task, own, nemo, config.model.source("validation_ds")


def test_task_vocabulary_labels_and_settings_come_back(written):
    task, own, nemo, _ = written
    (_, expected), (config, found) = describe_nemo(own), describe_nemo(nemo)
    assert config.task == found.name == task
    assert found.tokenizer.vocabulary == expected.tokenizer.vocabulary
    assert found.max_seq_length == 32
    if task == "question_answering":
        assert found.to_config() == expected.to_config()
    else:
        assert found.labels.names == expected.labels.names
        assert config.model.class_labels.class_labels_file is None
    if task == "token_classification":
        assert found.scheme == expected.scheme
    assert config.model.train_ds.batch_size == 64


def test_the_page(written, tmp_path, capsys, no_group):
    _need_lightning()
    from tpcore.interop import nemo

    task, own, path, data = written
    trainer = _trainer()
    model = getattr(nemo, CLASSES[task]).restore_from(path, trainer=trainer)
    key = "file" if task == "question_answering" else "file_path"
    model.setup_test_data({key: str(data), "batch_size": 8, "shuffle": False})
    trainer.test(model=model, ckpt_path=None, verbose=False)
    found = {"loss": model.test_evaluation.loss, **model.test_evaluation.metrics}
    if task == "text_classification":
        # NeMo's classifier has no pooler before it: what follows is from the weights alone.
        plain = checkpoint.load(path).eval()
        dataset, _ = model._data["test"]
        ids = [example.input_ids for example in dataset.examples]
        with torch.inference_mode():
            logits = plain.forward_packed(pack_sequences(ids)).logits
        labels = torch.tensor([example.labels for example in dataset.examples])
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        assert found["accuracy"] == pytest.approx(accuracy)
        assert not plain.head.pooler
    else:
        assert found == _reference(own, data, capsys)
    assert found == _reference(path, data, capsys)  # the command line reads it, too
    model.save_to(tmp_path / "again.nemo")
    assert _reference(tmp_path / "again.nemo", data, capsys) == pytest.approx(found, rel=1e-6)


def test_a_file_of_two_ranks_with_a_deep_head(tmp_path, capsys):
    """Of another writer: labels beside it, gelu of NeMo 1.x, two layers of classifier."""
    _, task = describe_nemo(GOLDEN)
    assert task.labels.names == ("O", "B-DIS", "I-DIS", "B-CHEM", "I-CHEM")
    assert task.label_all_pieces
    assert task.label_start_end
    words = [[f"w{(7 * i + j) % 900}" for j in range(i + 2)] for i in range(5)]
    data = tmp_path / "data.conll"
    lines = [f"{w}\t{'B-DIS' if j == 1 else 'O'}" for s in words for j, w in enumerate([*s, ""])]
    data.write_text("\n".join("" if line.startswith("\t") else line for line in lines))
    assert main(["evaluate", str(GOLDEN), str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] > 0
    model = checkpoint.load(GOLDEN).eval()
    with torch.inference_mode():
        logits = model.forward_packed(
            pack_sequences([task.tokenizer.encode(" ".join(s)).ids for s in words])
        ).logits
    names = [task.labels.names[i] for i in logits.argmax(-1).tolist()]
    dataset = task.load(data)
    loaded = load_nemo(GOLDEN, model.tp)
    assert isinstance(loaded.model.head.hidden[0], torch.nn.Linear)
    assert main(["predict", str(GOLDEN), str(data)]) == 0
    printed = [json.loads(line)["labels"] for line in capsys.readouterr().out.splitlines()]
    at, expected = 0, []
    for record in dataset.records:
        expected.append(names[at + 1 : at + 1 + len(record.words)])
        at += len(record.words) + 2
    assert printed == expected


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"target": "nemo.x.GLUEModel"}, "is of NeMo's GLUEModel; evaluated are"),
        ({"target": None, "classifier_head": None}, "is of no task that tpcore knows"),
        ({"class_labels": {"class_labels_file": None}}, "names no labels"),
        ({"dataset": {"max_seq_length": "long"}}, "model.dataset.max_seq_length='long': "),
        ({"dataset": {"max_seq_length": 1}}, "model.dataset.max_seq_length: expected at least 3"),
        ({"dataset": {"num_classes": 5}}, "has 2 labels"),
    ],
)
def test_what_a_file_lacks_is_named(nodes, message, files_of_texts, tmp_path):
    nodes = {"dataset": {"max_seq_length": 32}} | nodes
    dataset = nodes.pop("dataset")
    path = as_nemo(files_of_texts, tmp_path / "bad.nemo", dataset, **nodes)
    with pytest.raises(CheckpointError) as caught:
        describe_nemo(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "tpcore-nemo-" not in str(caught.value)


@pytest.fixture(scope="module")
def files_of_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    overrides = tiny_data.overrides("text_classification", folder, trainer__max_steps=1)
    result = finetune(load_config(None, overrides))
    return next((result.path / "checkpoints").glob("*.nemo"))
