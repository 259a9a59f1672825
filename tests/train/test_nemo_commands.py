"""`tpcore evaluate` and `predict` of a `.nemo`: the same at every size, as the run it came from."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks import tiny_data
from tpcore import checkpoint, load_run
from tpcore.cli import main

ROOT = Path(__file__).parents[2]
TASKS = ("text_classification", "token_classification", "question_answering")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Task -> (run folder, its .nemo at sizes 1 and 2, a labelled file)."""
    made = {}
    for task in TASKS:
        folder = tmp_path_factory.mktemp(task)
        path, data = tiny_data.trained(task, folder)
        one = next((path / "checkpoints").glob("*.nemo"))
        two = folder / "two.nemo"
        checkpoint.convert(one, two, to="nemo", tensor_parallel_size=2)
        made[task] = (path, (one, two), data)
    return made


def _numbers(text):
    found = json.loads(text.strip().splitlines()[-1])
    return {name: value for name, value in found.items() if name not in ("run", "file")}


def _torchrun(*arguments):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [sys.executable, *launch, "tpcore", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("task", TASKS)
def test_in_one_process(trained, task, tmp_path, capsys, monkeypatch):
    run, files, data = trained[task]
    capsys.readouterr()
    assert main(["evaluate", str(run), str(data), "--json"]) == 0
    expected = _numbers(capsys.readouterr().out)
    labelled = load_run(run)
    predictions = labelled.evaluate(data).predictions
    for file in files:
        assert main(["evaluate", str(file), str(data), "--json"]) == 0
        assert _numbers(capsys.readouterr().out) == expected
        assert main(["predict", str(file), str(data)]) == 0
        printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert printed == json.loads(json.dumps(predictions))
    line = "the good day"
    if task == "question_answering":
        line = json.dumps({"question": "the book", "context": "the good day", "id": "x"})
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{line}\n".encode())))
    assert main(["predict", str(files[1])]) == 0
    (only,) = capsys.readouterr().out.splitlines()
    inputs = [labelled.task.parse_line(line, "here")]
    assert json.loads(only) == json.loads(json.dumps(labelled.predict(inputs)))[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_on_two_ranks(trained, size, tmp_path, capsys):
    run, files, data = trained["text_classification"]
    capsys.readouterr()
    assert main(["evaluate", str(run), str(data), "--json"]) == 0
    expected = _numbers(capsys.readouterr().out)
    found = _numbers(_torchrun("evaluate", files[size - 1], data, "--json"))
    assert found == pytest.approx(expected, rel=1e-5)
    output = tmp_path / "out.jsonl"
    _torchrun("predict", files[size - 1], data, "--output", output)
    written = [json.loads(line)["prediction"] for line in output.read_text().splitlines()]
    predictions = load_run(run).evaluate(data).predictions
    assert written == [prediction["label"] for prediction in predictions]


def test_other_files_are_refused_in_one_line(trained, tmp_path, capsys):
    encoder = tmp_path / "encoder.nemo"
    run, (one, _), data = trained["text_classification"]
    checkpoint.save(load_run(run).model, encoder, format="nemo")
    assert main(["evaluate", str(encoder), str(data)]) == 2
    assert "names no labels" in capsys.readouterr().err
    damaged = tmp_path / "damaged.nemo"
    damaged.write_bytes(one.read_bytes()[:5000])
    assert main(["evaluate", str(damaged), str(data)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
