"""A checkpoint with a head of its own is evaluated and predicts as it is."""

from __future__ import annotations

import json

import pytest

from tests.tasks import tiny_data
from tests.train import tiny
from tpcore import checkpoint, load_run
from tpcore.checkpoint import CheckpointError
from tpcore.cli import main
from tpcore.models.bert import BertModel
from tpcore.train.run import export_run

TASKS = ("text_classification", "token_classification", "question_answering")


def _settings(task: str) -> list[str]:
    own = ("model.dataset.version_2_with_negative=true", "model.dataset.max_query_length=8")
    more = (*own, "model.dataset.doc_stride=8") if task == "question_answering" else ()
    return [f"task={task}", "model.dataset.max_seq_length=32", *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Task -> (its run, the checkpoint that was exported from it, a labelled file)."""
    made = {}
    for task in TASKS:
        folder = tmp_path_factory.mktemp(task)
        path, data = tiny_data.trained(task, folder)
        export_run(path, folder / "checkpoint", format="huggingface")
        made[task] = (load_run(path), folder / "checkpoint", data)
    return made


@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_says_what_its_run_says(trained, task, capsys, tmp_path):
    run, path, data = trained[task]
    settings = _settings(task)
    loaded = load_run(path, settings=settings)
    expected, found = run.evaluate(data), loaded.evaluate(data)
    assert found.metrics == expected.metrics
    assert found.predictions == expected.predictions
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    options = [option for setting in settings for option in ("--set", setting)]
    assert main(["evaluate", str(path), data, "--json", *options]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {k: v for k, v in printed.items() if k in found.metrics} == found.metrics
    assert main(["predict", str(path), data, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(found.predictions))


def test_what_does_not_fit_is_said(trained, tmp_path):
    _, path, _ = trained["text_classification"]
    with pytest.raises(CheckpointError, match=r"sequence_classification, and task=question_answer"):
        load_run(path, settings=_settings("question_answering"))
    labels = tmp_path / "labels.csv"
    labels.write_text("a\nb\nc\n")
    three = [*_settings("text_classification"), f"model.class_labels.class_labels_file={labels}"]
    with pytest.raises(CheckpointError, match="label"):
        load_run(path, settings=three)
    with pytest.raises(ValueError, match="did you mean"):
        load_run(path, settings=["task=text_classificaton"])
    headless = tmp_path / "encoder"
    vocabulary = tiny.write_vocabulary(tmp_path / "vocab.txt")
    checkpoint.save(BertModel(tiny.CONFIG), headless, tokenizer_files=[vocabulary])
    with pytest.raises(CheckpointError, match="has no head, and task=text_classification needs"):
        load_run(headless, settings=_settings("text_classification"))
