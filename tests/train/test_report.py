"""`tpcore report`: one page, whole in itself, right in its numbers, seen in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from tests.tasks import tiny_data
from tests.train import tiny
from tpcore.cli import main
from tpcore.tasks.review import review
from tpcore.tasks.task import Dataset
from tpcore.tasks.texts import TextRecord
from tpcore.train.finetune import finetune
from tpcore.train.read_config import load_config
from tpcore.train.report import write_report
from tpcore.train.report_page import MAX_POINTS, nice_ticks, thinned

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
VOID = {"meta", "br", "circle", "line", "polyline"}


class Page(HTMLParser):
    """Tags in order, text by the innermost tag; open tags must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], {}
        self.attributes = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}
    for task in ("text_classification", "token_classification", "question_answering"):
        folder = tmp_path_factory.mktemp(task)
        config = load_config(None, tiny_data.overrides(task, folder, trainer__max_steps=6))
        made[task] = finetune(config)
    return made


@pytest.mark.parametrize(
    "task", ["text_classification", "token_classification", "question_answering"]
)
def test_the_page(runs, task, tmp_path, capsys):
    result = runs[task]
    assert main(["report", str(result.path)]) == 0
    path = result.path / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    page = Page(text)
    for _, name, value in page.attributes:
        assert name not in ("src", "href", "onclick", "onload")
        assert value is None or "http" not in value
    assert not {"script", "link"} & set(page.tags)
    assert not re.search(r"url\(|@import", text)
    assert "finished" in page.texts["span"]
    titles = page.texts["figcaption"]
    assert {"Loss", "Learning rate", "Gradient norm"} <= set(titles)
    assert page.tags.count("svg") == len(titles)
    # The last loss of the log is the number in the legend.
    records = [json.loads(line) for line in (result.path / "metrics.jsonl").open()]
    last = [r["train_loss"] for r in records if "train_loss" in r][-1]
    assert f"{last:.4g}" in page.texts["b"]
    monitored = {"question_answering": "f1", "token_classification": "f1"}.get(task, "accuracy")
    assert f"{result.best[f'val_{monitored}']:.4g}" in {*page.texts["dd"], *page.texts["b"]}
    assert "Worst examples" in page.texts["h2"]
    assert ("Confusion" in page.texts["h2"]) == (task == "text_classification")
    assert f"task: {task}" in " ".join(page.texts["pre"])
    assert "versions torch" in page.texts["th"]


def test_confusion_and_scores_are_those_of_the_validation(runs):
    result = runs["text_classification"]
    found = json.loads((result.path / "validation.json").read_text())
    counts = found["confusion"]["counts"]
    assert sum(map(sum, counts)) == found["num_records"] == 13
    right = sum(row[place] for place, row in enumerate(counts))
    assert right / 13 == pytest.approx(result.last["val_accuracy"])
    assert found["step"] == result.global_step
    assert len(found["worst"]) == 13 - right
    errors = [mistake["error"] for mistake in found["worst"]]
    assert errors == sorted(errors, reverse=True)


def test_a_run_that_has_not_finished_or_begun(runs, tmp_path, capsys):
    source = runs["text_classification"].path
    folder = tmp_path / "run"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints", "events*"))
    for name in ("result.json", "validation.json", "environment.json"):
        (folder / name).unlink()
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(metrics + '{"step": 7, "train_lo')  # being written
    page = Page(write_report(folder, tmp_path / "page.html").read_text())
    assert "not finished" in page.texts["span"]
    (folder / "metrics.jsonl").write_text("")
    assert "svg" not in Page(write_report(folder).read_text()).tags
    (folder / "metrics.jsonl").write_text("{}\n" + metrics)
    assert main(["report", str(folder)]) == 2
    assert "metrics.jsonl:1 is damaged" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2


def test_nothing_of_the_data_becomes_markup(runs, tmp_path):
    folder = tmp_path / "run"
    source = runs["text_classification"].path
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints", "events*"))
    found = json.loads((folder / "validation.json").read_text())
    evil = "<script>alert(1)</script>\"'&"
    found["worst"] = [{"line": 1, "text": evil, "true": evil, "predicted": evil, "error": 0.5}]
    found["confusion"]["labels"] = [evil, evil]
    (folder / "validation.json").write_text(json.dumps(found))
    page = Page(write_report(folder).read_text())
    assert "script" not in page.tags
    assert evil in "".join(page.texts["p"])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1200])
def test_in_a_browser(runs, tmp_path, width):
    """The page draws: the picture is not of one colour, and has the colour of the first line."""
    page = write_report(runs["text_classification"].path, tmp_path / "page.html")
    picture = tmp_path / "page.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600"]
    subprocess.run(
        [*command, f"--screenshot={picture}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    image_module = pytest.importorskip("PIL.Image", reason="needs pillow to look at the picture")
    image = image_module.open(picture).convert("RGB")
    assert image.size == (width, 1600)
    colours = {colour for _, colour in image.getcolors(maxcolors=1 << 24)}
    assert (0x2F, 0x5F, 0xD0) in colours  # the first curve
    assert (0xFA, 0xFA, 0xF8) in colours  # the page


def test_review_by_the_form_of_predictions():
    data = Dataset("d", [TextRecord(1, "a", 2.0), TextRecord(2, "b", 1.0, "c")], [])
    found = review(data, [{"value": 2.5}, {"value": 4.0}])
    assert [m["error"] for m in found["worst"]] == [3.0, 0.5]
    assert found["worst"][0]["text"] == "b\nc"
    assert found["confusion"] is None
    labelled = Dataset("d", [TextRecord(1, "a", "x"), TextRecord(2, "b", "y")], [])
    right = {"label": "x", "probabilities": {"x": 0.9, "y": 0.1}}
    found = review(labelled, [right, right], num_worst=5)
    assert [(m["line"], m["error"]) for m in found["worst"]] == [(2, pytest.approx(0.9))]
    assert found["confusion"] == {"labels": ["x", "y"], "counts": [[1, 0], [1, 0]]}
    assert review(labelled, ["?", "?"])["worst"] == []


@pytest.mark.slow
def test_every_task_can_be_reviewed(tmp_path):
    """No form of prediction breaks it."""
    for task in sorted(set(tiny_data.WRITERS) - {"masked_lm"}):  # which has no records to be wrong
        folder = tmp_path / task
        folder.mkdir()
        config = load_config(None, tiny_data.overrides(task, folder, trainer__max_steps=1))
        result = finetune(config)
        found = json.loads((result.path / "validation.json").read_text())
        assert found["worst"], task
        assert all(m["error"] > 0 and m["true"] != m["predicted"] for m in found["worst"]), task
        Page(write_report(result.path).read_text())


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0.3, 0.3, [0.26, 0.28, 0.3, 0.32, 0.34]),
        (-3, 17, [-5, 0, 5, 10, 15, 20]),
        (0, 5e-5, [0, 2e-5, 4e-5, 6e-5]),
    ],
)
def test_ticks(low, high, expected):
    ticks = nice_ticks(low, high)
    assert ticks == pytest.approx(expected)
    assert ticks[0] <= low <= high <= ticks[-1]


def test_thinning_keeps_the_mean():
    points = [(step, float(step % 7)) for step in range(1, 4201)]
    thin = thinned(points)
    assert len(thin) <= MAX_POINTS
    assert sum(v for _, v in thin) / len(thin) == pytest.approx(3.0, abs=0.01)
    assert thinned(points[:5]) == [(float(s), v) for s, v in points[:5]]


def test_a_folder_that_cannot_take_the_review_does_not_stop_the_run(tmp_path):
    config = tiny.config(tiny.write_inputs(tmp_path), trainer__max_steps=1)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    result = finetune(config)
    (result.path / "validation.json").unlink()
    (result.path / "validation.json").mkdir()
    from tpcore.train.evaluation import Evaluation
    from tpcore.train.logging import RunLog
    from tpcore.train.review import write_review

    said = []
    log = RunLog(enabled=False)
    log.info = said.append
    data = Dataset("d", [TextRecord(1, "a", 2.0)], [])
    write_review(result.path, data, Evaluation([{"value": 1.0}], 0.0, {}), epoch=0, step=1, log=log)
    assert "validation.json is not up to date" in said[0]
