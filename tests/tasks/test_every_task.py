"""What holds for all tasks: a run from files to predictions, equal at every size."""

from __future__ import annotations

import io
import json
import math

import pytest

from tests.helpers.ranks import run_mesh
from tests.tasks import tiny_data
from tests.train import tiny
from tpcore import load_run
from tpcore.cli import main
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.train.finetune import finetune
from tpcore.train.launch import on_all_ranks
from tpcore.train.logging import RunLog
from tpcore.train.prepare import build_model, prepare
from tpcore.train.read_config import load_config
from tpcore.train.run_state import RunChoice, run_path
from tpcore.train.trainer import Trainer

TASKS = list(tiny_data.WRITERS)


@pytest.mark.parametrize("task", TASKS)
def test_from_files_to_predictions(task, tmp_path):
    config = load_config(None, tiny_data.overrides(task, tmp_path, trainer__max_epochs=1))
    result = finetune(config)
    assert all(math.isfinite(value) for value in result.last.values())
    run = load_run(result.path)
    monitored = f"val_{run.task.monitor.metric}"
    assert monitored in result.best
    dataset = run.load()
    evaluation = run.evaluate_dataset(dataset)
    assert evaluation.metrics[monitored.removeprefix("val_")] == pytest.approx(
        result.best[monitored], abs=1e-6
    )
    unlabelled = run.task.load(config.model.source("validation_ds"), labelled=False)
    assert all(example.labels is None for example in unlabelled.examples)
    assert run.evaluate_dataset(unlabelled).predictions == evaluation.predictions
    for name in ("predictions.txt", "predictions.jsonl"):
        run.task.write_predictions(tmp_path / name, dataset, evaluation.predictions)
        assert (tmp_path / name).read_text().strip()
    for prediction in evaluation.predictions:
        json.dumps(prediction)
    assert isinstance(run.task.report(dataset, evaluation.predictions), str)


LINES = {
    "question_answering": ['{"question": "the book", "context": "the good day", "id": "x"}'],
    "glue": ["the day was good\tgood", "the day\tbad"],
    "text_regression": ["the good day\tgood", "the day\tbad"],
}
"""What `predict` reads from standard input; other tasks: texts."""


@pytest.mark.parametrize("task", TASKS)
def test_predict_from_standard_input_and_from_python(task, tmp_path, capsys, monkeypatch):
    config = load_config(None, tiny_data.overrides(task, tmp_path, trainer__max_steps=1))
    path = str(finetune(config).path)
    lines = LINES.get(task, ["the good day << a >> was [[ b ]]", "bad food"])
    stdin = io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    capsys.readouterr()
    assert main(["predict", path]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    run = load_run(path)
    inputs = [run.task.parse_line(line, "here") for line in lines]
    assert printed == json.loads(json.dumps(run.predict(inputs)))
    assert len(printed) == len(lines)
    source = config.model.source("validation_ds")
    assert main(["predict", path, source, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert capsys.readouterr().out == ""
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(written) == len(run.task.load(source).records)
    if task in LINES:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a text\n")))
        assert main(["predict", path]) == 2
        assert "standard input, line 1" in capsys.readouterr().err


def _metrics(tp: TensorParallelGroup, dp: DataParallelGroup, config) -> dict[str, float]:
    job = on_all_ranks(lambda: prepare(config, tp.size * dp.size), tp, dp)
    model = on_all_ranks(lambda: build_model(job, tp, "cpu"), tp, dp)
    log = RunLog(enabled=False)
    run = RunChoice(run_path(config.exp_manager), resumes=False)
    trainer = Trainer(job, model, tp=tp, dp=dp, run=run, log=log)
    return trainer.fit().last


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_metrics_are_the_same_at_every_size(task, tmp_path):
    found = {}
    for tp_size, dp_size in ((1, 1), (2, 1), (1, 2)):
        config = load_config(
            None,
            tiny_data.overrides(
                task,
                tmp_path,
                model__tensor_model_parallel_size=tp_size,
                exp_manager__version=f"{tp_size}-{dp_size}",
                trainer__enable_progress_bar=False,
            ),
        )
        found[tp_size, dp_size] = run_mesh(_metrics, tp_size, dp_size, config)[0]
    for size, metrics in found.items():
        assert {k: round(v, 4) for k, v in metrics.items()} == {
            k: round(v, 4) for k, v in found[1, 1].items()
        }, size


def test_the_command_of_the_nemo_page(tmp_path, capsys):
    """Its key names, and what it says of the key that the page has in the wrong place."""
    tiny_data.overrides("question_answering", tmp_path)
    encoder = tiny.write_checkpoint(tmp_path / "megatron", tensor_parallel_size=1)
    arguments = [
        "finetune",
        "task=question_answering",
        f"model.train_ds.file={tmp_path / 'train.json'}",
        f"model.validation_ds.file={tmp_path / 'validation.json'}",
        f"model.language_model.pretrained_model_name={encoder}",
    ]
    tiny_sizes = [
        "model.dataset.version_2_with_negative=true",
        "model.dataset.max_seq_length=32",
        "model.dataset.max_query_length=8",
        "model.dataset.num_workers=2",
        "trainer.max_steps=1",
        f"exp_manager.exp_dir={tmp_path / 'runs'}",
    ]
    assert main([*arguments, *tiny_sizes]) == 0
    captured = capsys.readouterr()
    assert "tpcore: note: model.dataset.num_workers=2 (command line) changes" in captured.err
    assert "val_exact_match" in captured.out
    arguments[3] = f"model.validation_ds={tmp_path / 'validation.json'}"
    assert main([*arguments, *tiny_sizes]) == 2
    assert "holds keys: " in (error := capsys.readouterr().err)
    assert "model.validation_ds.file" in error
