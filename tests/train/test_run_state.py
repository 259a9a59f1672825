"""Run folders: what is kept, what comes back, and that nothing is ever half there."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_mesh, run_ranks
from tests.train import tiny
from tpcore import checkpoint
from tpcore.checkpoint.errors import CheckpointError
from tpcore.models.bert import BertModel
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.train.checkpoint_files import (
    Progress,
    find_checkpoint,
    find_file,
    rank_folder,
    read_all_ranks,
    read_manifest,
    write_checkpoint,
)
from tpcore.train.config import ConfigError
from tpcore.train.finetune import finetune
from tpcore.train.keeper import CheckpointKeeper
from tpcore.train.launch import RankError
from tpcore.train.run import describe_run, export_run, load_run
from tpcore.train.run_state import check_writable, find_run
from tpcore.train.training_state import sharded_dims

TEXTS = ["the film was good", "a nasty day", "lovely food and a very fine house", "it is poor"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_inputs(tmp_path_factory.mktemp("run"))
    config = tiny.config(folder, trainer__max_epochs=5, model__optim__lr=3e-3)
    return finetune(config).path


# --- which checkpoints are kept -----------------------------------------------------------------


def _keep(scores: list[float], **settings: Any) -> tuple[list[str], list[str]]:
    """(the order of writes and removals, what is left)"""
    settings = {"monitor": ("val_f1/a", "max"), "save_top_k": 1, "save_last": False} | settings
    keeper = CheckpointKeeper(name="run", **settings)
    events: list[str] = []
    files: set[str] = set()

    def write(name: str) -> None:
        events.append(f"+{name}")
        files.add(name)

    def remove(name: str) -> None:
        events.append(f"-{name}")
        files.remove(name)

    for epoch, score in enumerate(scores):
        keeper.update(Progress(epoch, 10 * epoch, {settings["monitor"][0]: score}), write, remove)
    return events, sorted(files)


def test_best_replaces_the_one_before_after_it_is_written() -> None:
    events, files = _keep([0.5, 0.75, 0.75, 0.6])
    assert events == [
        "+run--val_f1_a=0.50-epoch=0.ckpt",
        "+run--val_f1_a=0.75-epoch=1.ckpt",
        "-run--val_f1_a=0.50-epoch=0.ckpt",
    ]
    assert files == ["run--val_f1_a=0.75-epoch=1.ckpt"]


def test_lower_is_better_and_not_a_number_is_never_kept() -> None:
    loss = {"monitor": ("val_loss", "min")}
    _, files = _keep([float("nan"), 0.5, 0.25, 0.75], **loss)
    assert files == ["run--val_loss=0.25-epoch=2.ckpt"]
    _, files = _keep([0.5, 0.25, 0.75, 0.4], **loss, save_top_k=2, name_steps=True)
    assert files == [
        "run--val_loss=0.25-epoch=1-step=10.ckpt",
        "run--val_loss=0.40-epoch=3-step=30.ckpt",
    ]


def test_last_is_kept_beside_the_best() -> None:
    assert _keep([0.5], save_last=True)[1] == ["run--val_f1_a=0.50-epoch=0.ckpt", "run-last.ckpt"]
    assert _keep([0.5], save_top_k=0, save_last=True)[1] == ["run-last.ckpt"]


# --- what a run holds and gives back ------------------------------------------------------------


def test_folder_is_complete(run: Path) -> None:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    best = find_checkpoint(run)
    assert names == {
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "environment.json",
        "model_config.json",
        "result.json",
        "validation.json",
        "checkpoints/tiny.nemo",
        "task.json",
        "tokenizer/vocab.txt",
        "tokenizer/tokenizer_config.json",
        f"checkpoints/mp_rank_00/{best}",
        f"checkpoints/{best}.json",
        "checkpoints/mp_rank_00/tiny-last.ckpt",
        "checkpoints/tiny-last.ckpt.json",
    }
    assert (run / "tokenizer/vocab.txt").read_text().split() == list(tiny.VOCABULARY)
    assert json.loads((run / "task.json").read_text())["labels"] == ["neg", "pos"]
    content = torch.load(rank_folder(run, 0) / best, weights_only=True)
    assert f"val_accuracy={content['metrics']['val_accuracy']:.2f}" in best
    assert content["state_dict"]["head.classifier.weight"].shape == (2, 32)


def test_reloaded_run_evaluates_as_the_trainer_did(run: Path) -> None:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    validations = [line for line in lines if "val_loss" in line]
    last = load_run(run, which="last")
    assert last.checkpoint == "tiny-last.ckpt"
    evaluation = last.evaluate()
    assert evaluation.loss == validations[-1]["val_loss"]
    assert evaluation.metrics["accuracy"] == validations[-1]["val_accuracy"]
    best = load_run(run).evaluate()
    assert best.metrics["accuracy"] == max(line["val_accuracy"] for line in validations)


def test_predictions_do_not_depend_on_the_batch(run: Path) -> None:
    loaded = load_run(run)
    together = loaded.predict(TEXTS)
    assert [prediction["label"] for prediction in together] == ["pos", "neg", "pos", "neg"]
    for text, prediction in zip(TEXTS, together, strict=True):
        alone = loaded.predict([text], batch_size=1)[0]["probabilities"]
        assert alone == pytest.approx(prediction["probabilities"], abs=1e-6)
    assert loaded.predict([]) == []
    with pytest.raises(TypeError, match=r"one str; expected several, as \[text\]"):
        loaded.predict("good")


def _predict(tp: TensorParallelGroup, path: Path) -> list[dict[str, float]]:
    return [prediction["probabilities"] for prediction in load_run(path, tp=tp).predict(TEXTS)]


@pytest.mark.parametrize("size", [2, 4])
def test_run_loads_at_another_size(size: int, run: Path) -> None:
    expected = [prediction["probabilities"] for prediction in load_run(run).predict(TEXTS)]
    for got in run_ranks(_predict, size, run):
        for ours, theirs in zip(got, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def _nemo(tp: TensorParallelGroup, path: Path) -> list[dict[str, float]]:
    loaded = load_run(path, tp=tp)
    assert loaded.evaluate().metrics["accuracy"] > 0
    return [prediction["probabilities"] for prediction in loaded.predict(TEXTS)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_nemo_file_is_the_best_checkpoint_at_any_size(size: int, run: Path) -> None:
    expected = [prediction["probabilities"] for prediction in load_run(run).predict(TEXTS)]
    for got in run_ranks(_nemo, size, run / "checkpoints/tiny.nemo"):
        for ours, theirs in zip(got, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def _write(tp: TensorParallelGroup, dp: DataParallelGroup, run: Path, step: int) -> None:
    torch.manual_seed(0)
    progress = Progress(0, step, {"val_loss": 1.0})
    state = BertModel(tiny.CONFIG, tp=tp)
    content = {
        "state_dict": state.state_dict(),
        "sharded_dim": sharded_dims(state.sharding_table(), list(state.state_dict())),
    }
    write_checkpoint(run, "x.ckpt", content, progress, ("val_loss", "min"), tp=tp, dp=dp)


def test_shards_of_all_ranks_join_to_the_model(tmp_path: Path, run: Path) -> None:
    run_mesh(_write, 2, 2, tmp_path, 7)
    files = [torch.load(rank_folder(tmp_path, rank) / "x.ckpt") for rank in range(2)]
    assert [content["tensor_model_parallel_rank"] for content in files] == [0, 1]
    assert not list(tmp_path.rglob("*.tmp"))
    torch.manual_seed(0)
    for name, full in BertModel(tiny.CONFIG).state_dict().items():
        shards, dim = [c["state_dict"][name] for c in files], files[0]["sharded_dim"][name]
        joined = shards[0] if dim is None else torch.cat(shards, dim)
        rows = min(len(joined), len(full))  # the vocabulary is padded more for two ranks
        assert torch.equal(joined[:rows], full[:rows]), name


def test_newest_run_below_a_folder(run: Path, tmp_path: Path) -> None:
    assert find_run(run) == run
    assert find_run(run.parent.parent) == run
    with pytest.raises(CheckpointError, match="holds no finished run"):
        find_run(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_run(tmp_path / "nowhere")


def test_facts_without_weights(run: Path) -> None:
    facts = describe_run(run)
    assert facts["task"] == "text_classification"
    assert facts["best checkpoint"] in facts["checkpoints"]
    assert facts["config"]["hidden_size"] == 32
    json.dumps(facts)


@pytest.mark.parametrize(("form", "size"), [("megatron", 2), ("huggingface", 1)])
def test_export_is_a_checkpoint_with_the_head(
    run: Path, tmp_path: Path, form: Any, size: int
) -> None:
    loaded = load_run(run)
    destination = tmp_path / "exported"
    info = export_run(run, destination, format=form, tensor_parallel_size=size)
    assert info.head == "sequence_classification"
    assert info.labels == ("neg", "pos")
    assert (destination / "vocab.txt").is_file()
    model = checkpoint.load(destination, vocab_size=len(tiny.VOCABULARY)).eval()
    batch = loaded.task.collate(loaded.task.from_inputs(TEXTS).examples)
    with torch.no_grad():
        ours = loaded.model.forward_packed(batch.packed).logits
        assert torch.equal(model.forward_packed(batch.packed).logits, ours)


def test_export_into_the_run_or_over_it_is_refused(run: Path) -> None:
    before = sorted(run.rglob("*"))
    for destination in (run / "checkpoints", run / "new", run, run.parent):
        with pytest.raises(CheckpointError, match="source"):
            export_run(run, destination, format="megatron", overwrite=True)
    assert sorted(run.rglob("*")) == before


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture
def two_rank_run(run: Path, tmp_path: Path) -> Path:
    """The folder of a run whose only checkpoint has two ranks."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "task.json", "model_config.json", "tokenizer"):
        os.symlink(run / name, folder / name)
    content = torch.load(find_path(run), weights_only=True)
    for rank in range(2):
        rank_folder(folder, rank).mkdir(parents=True)
        shards = {
            name: tensor
            if content["sharded_dim"][name] is None
            else tensor.chunk(2, content["sharded_dim"][name])[rank].clone()
            for name, tensor in content["state_dict"].items()
        }
        part = content | {"state_dict": shards, "tensor_model_parallel_size": 2}
        torch.save(part, rank_folder(folder, rank) / "tiny-last.ckpt")
    _write_manifest(folder)
    return folder


def _write_manifest(folder: Path) -> None:
    """Of `tiny-last.ckpt` as it is now."""
    files = [rank_folder(folder, rank) / "tiny-last.ckpt" for rank in range(2)]
    tiny.write_manifest(folder, "tiny-last.ckpt", files)


def find_path(run: Path) -> Path:
    return rank_folder(run, 0) / find_checkpoint(run)


def test_run_of_two_ranks_loads_in_one_process(run: Path, two_rank_run: Path) -> None:
    assert load_run(two_rank_run).predict(TEXTS) == load_run(run).predict(TEXTS)


def test_missing_rank_is_named(two_rank_run: Path) -> None:
    (rank_folder(two_rank_run, 1) / "tiny-last.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_01/tiny-last.ckpt is missing"):
        load_run(two_rank_run)


@pytest.mark.parametrize("keep", [0, 100, 0.5, -10])
def test_truncated_file_is_named(two_rank_run: Path, keep: float) -> None:
    path = rank_folder(two_rank_run, 1) / "tiny-last.ckpt"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(
        CheckpointError, match=r"mp_rank_01/tiny-last.ckpt: .*(damaged|trunc)"
    ) as caught:
        load_run(two_rank_run)
    assert "\n" not in " ".join(str(caught.value).split())


def _copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy"))


def test_evil_checkpoint_is_refused_in_our_words(two_rank_run: Path) -> None:
    path = rank_folder(two_rank_run, 1) / "tiny-last.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"x": subprocess.Popen}, path)
    _write_manifest(two_rank_run)
    with pytest.raises(CheckpointError, match=r"refused .*Popen") as caught:
        load_run(two_rank_run)
    assert "weights_only" not in str(caught.value)


def test_damaged_tensor_of_a_run_is_noticed(two_rank_run: Path) -> None:
    path = rank_folder(two_rank_run, 1) / "tiny-last.ckpt"
    content = bytearray(path.read_bytes())
    start = content.find(torch.load(path)["state_dict"]["pooler.dense.weight"].numpy().tobytes())
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: .*/data/.* differs from its checksum"):
        load_run(two_rank_run)


@pytest.mark.parametrize("existing", [False, True])
def test_run_that_cannot_be_made_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    folder = tiny.write_inputs(tmp_path)
    if existing:
        (folder / "runs").mkdir()
    before = sorted(folder.rglob("*"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("tpcore.train.run_state.save_config", full)
        with pytest.raises(ConfigError, match="cannot be written: No space left"):
            finetune(tiny.config(folder, trainer__max_steps=1))
    assert sorted(folder.rglob("*")) == before
    assert finetune(tiny.config(folder, trainer__max_steps=1)).global_step == 1


def test_cut_vocabulary_is_named(run: Path, tmp_path: Path) -> None:
    copy = _copy_of(run, tmp_path)
    vocabulary = copy / "tokenizer/vocab.txt"
    vocabulary.write_text("".join(vocabulary.read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(CheckpointError, match="tokenizer: its vocabulary has 20 entries"):
        load_run(copy)


def test_labels_that_are_not_those_of_the_head_are_named(run: Path, tmp_path: Path) -> None:
    copy = _copy_of(run, tmp_path)
    task = json.loads((copy / "task.json").read_text())
    (copy / "task.json").write_text(json.dumps(task | {"labels": ["neg", "pos", "x"]}))
    with pytest.raises(CheckpointError, match=r"task\.json has 3 labels, .* a head of 2"):
        load_run(copy)


def test_unknown_checkpoint_lists_those_there_are(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint 'x\.ckpt'; it holds .*tiny-last"):
        load_run(run, which="x.ckpt")


def _check_failed_write(tp: TensorParallelGroup, dp: DataParallelGroup, run: Path) -> None:
    _write(tp, dp, run, 1)
    before = (rank_folder(run, tp.rank) / "x.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if tp.rank == 1:  # its disk is full after 10 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ValueError, match=r"x\.ckpt cannot be written") as caught:
            _write(tp, dp, run, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value, CheckpointError if tp.rank == 1 else RankError)
    assert (rank_folder(run, tp.rank) / "x.ckpt").read_bytes() == before
    assert [path.name for path in rank_folder(run, tp.rank).iterdir()] == ["x.ckpt"]
    assert read_manifest(run, "x.ckpt").global_step == 1
    assert find_file(run, read_manifest(run, "x.ckpt"), tp.rank).name == "x.ckpt"


def test_write_that_fails_on_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    run_mesh(_check_failed_write, 2, 1, tmp_path)


def _write_steps(tp: TensorParallelGroup, dp: DataParallelGroup, run: Path, last: int) -> None:
    for step in range(2, last + 1):
        time.sleep(0.1)  # the steps of training between
        _write(tp, dp, run, step)


def test_reader_meets_the_files_of_one_write_while_a_run_writes_more(tmp_path: Path) -> None:
    run_mesh(_write, 2, 1, tmp_path, 1)
    writer = threading.Thread(target=run_mesh, args=(_write_steps, 2, 1, tmp_path, 25))
    writer.start()
    seen = []
    while writer.is_alive():
        first, second = (content["global_step"] for content in read_all_ranks(tmp_path, "x.ckpt"))
        assert first == second
        seen.append(first)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


def test_folders_that_cannot_be_written(tmp_path: Path, run: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/runs/v .*cannot be written.*Not a directory"):
        check_writable(tmp_path / "file" / "runs" / "v")
    with pytest.raises(ConfigError, match="already holds a run"):
        check_writable(run)
    check_writable(tmp_path / "new" / "runs")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
