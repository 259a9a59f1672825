"""The calls of NeMo's page under a real Trainer, on one rank and two."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks import tiny_data
from tpcore import checkpoint
from tpcore.cli import main

ROOT = Path(__file__).parents[2]
TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
CLASSES = {
    "text_classification": "TextClassificationModel",
    "token_classification": "TokenClassificationModel",
    "question_answering": "QAModel",
}


def _need_lightning():
    pytest.importorskip("lightning", reason="needs the extra [lightning]")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Task -> (its .nemo, of one rank; of two ranks; a labelled file)."""
    made = {}
    for task in CLASSES:
        folder = tmp_path_factory.mktemp(task)
        path, data = tiny_data.trained(task, folder)
        one = next((path / "checkpoints").glob("*.nemo"))
        two = folder / "two.nemo"
        checkpoint.convert(one, two, to="nemo", tensor_parallel_size=2)
        made[task] = (one, two, data)
    return made


def _reference(path, data, capsys):
    """What `tpcore evaluate` says in this process."""
    capsys.readouterr()
    assert main(["evaluate", str(path), str(data), "--json", "--batch-size", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    return {name: value for name, value in found.items() if name not in ("run", "file")}


def _run(tmp_path, ranks, task, path, data, **more):
    key = "file" if task == "question_answering" else "file_path"
    output = tmp_path / "result.json"
    options = {
        "model": CLASSES[task],
        "output": str(output),
        "cfg": {
            "trainer": TRAINER | {"devices": ranks},
            "model": {
                "nemo_path": str(path),
                "test_ds": {key: str(data), "batch_size": 8, "shuffle": False, "num_workers": 2},
            },
        },
    } | more
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.interop.nemo_run", json.dumps(options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.slow
def test_the_page_on_two_ranks(files, tmp_path, capsys):
    """Of one task, since no other splits in another way; of all of them in one process below."""
    _need_lightning()
    task = "token_classification"
    one, two, data = files[task]
    expected = _reference(one, data, capsys)
    saved = tmp_path / "saved.nemo"
    result = _run(tmp_path, 2, task, two, data, save_to=str(saved))
    assert result["sizes"] == [2, 1]
    found = {"loss": result["loss"], **result["metrics"]}
    assert found == pytest.approx(expected, rel=1e-5)
    logged = {name.removeprefix("test_"): value for name, value in result["logged"].items()}
    assert logged == pytest.approx(expected, rel=1e-5)
    assert checkpoint.inspect(saved).tensor_parallel_size == 2
    assert _reference(saved, data, capsys) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_file_of_one_rank_is_evaluated_by_two_in_parallel(files, tmp_path, capsys):
    """Each example counts once, and every number is that of one process."""
    _need_lightning()
    one, _, data = files["text_classification"]
    result = _run(tmp_path, 2, "text_classification", one, data)
    assert result["sizes"] == [1, 2]
    assert len(result["predictions"]) == 13
    found = {"loss": result["loss"], **result["metrics"]}
    assert found == pytest.approx(_reference(one, data, capsys), rel=1e-6)


def _trainer(**more):
    from tpcore.interop.nemo import NLPDDPPlugin, Trainer

    return Trainer(plugins=[NLPDDPPlugin()], **(TRAINER | {"devices": 1} | more))


@pytest.fixture
def no_group():
    """Lightning makes a process group of one rank and leaves it."""
    yield
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("task", CLASSES)
def test_the_page_in_one_process(task, files, tmp_path, capsys, no_group):
    _need_lightning()
    from tpcore.interop import nemo

    one, two, data = files[task]
    expected = _reference(one, data, capsys)
    trainer = _trainer()
    model = getattr(nemo, CLASSES[task]).restore_from(two, trainer=trainer)
    model.save_to(tmp_path / "before.nemo")
    assert (tmp_path / "before.nemo").read_bytes() == two.read_bytes()
    key = "file" if task == "question_answering" else "file_path"
    model.setup_test_data(test_data_config={key: str(data), "batch_size": 8})
    trainer.test(model=model, ckpt_path=None, verbose=False)
    evaluation = model.test_evaluation
    assert {"loss": evaluation.loss, **evaluation.metrics} == expected
    model.save_to(tmp_path / "after.nemo")
    assert checkpoint.inspect(tmp_path / "after.nemo").tensor_parallel_size == 1
    assert _reference(tmp_path / "after.nemo", data, capsys) == expected
    model.setup_validation_data()
    trainer.validate(model=model, verbose=False)
    assert model.validation_evaluation.metrics == evaluation.metrics


def test_without_a_trainer(files, tmp_path):
    _need_lightning()
    from tpcore.interop.nemo import TextClassificationModel

    one, two, _ = files["text_classification"]
    model = TextClassificationModel.restore_from(str(two))
    assert model.network is not None
    assert not model.training
    model.save_to(tmp_path / "again.nemo")
    again = TextClassificationModel.restore_from(tmp_path / "again.nemo")
    rows = model.task.tokenizer.vocab_size
    for name, tensor in model.state_dict().items():
        other = again.state_dict()[name]
        if "word_embeddings" in name:  # what pads them follows the size of the file
            tensor, other = tensor[:rows], other[:rows]
        assert tensor.equal(other), name
    config = TextClassificationModel.restore_from(one, return_config=True)
    assert "tokenizer.vocab_file" in config.tokenizer.vocab_file


def test_mistakes_are_named(files, tmp_path):
    _need_lightning()
    from tpcore.interop.nemo import QAModel, TextClassificationModel, Trainer

    one, _, data = files["text_classification"]
    with pytest.raises(ValueError, match="not for QAModel; use TextClassificationModel"):
        QAModel.restore_from(one)
    with pytest.raises(ValueError, match="strict=False"):
        TextClassificationModel.restore_from(one, strict=False)
    with pytest.raises(ValueError, match="override_config_path='x'"):
        TextClassificationModel.restore_from(one, "x")
    with pytest.raises(ValueError, match="pass plugins="):
        TextClassificationModel.restore_from(
            one, trainer=Trainer(**(TRAINER | {"devices": 2, "strategy": "ddp"}))
        )
    model = TextClassificationModel.restore_from(one)
    with pytest.raises(ValueError, match="did you mean file_path"):
        model.setup_test_data({"file_pth": str(data)})
    with pytest.raises(ValueError, match="test_ds names no file"):
        model.setup_test_data({"batch_size": 8})
    with pytest.raises(ValueError, match=r"test_ds\.batch_size: expected a positive"):
        model.setup_test_data({"file_path": str(data), "batch_size": 0})
    with pytest.raises(ValueError, match=r"call model\.setup_test_data"):
        model.test_dataloader()
    with pytest.raises(ValueError, match="these models evaluate"):
        model.training_step()
    with pytest.warns(UserWarning, match=r"test_ds\.num_workers=2 changes nothing"):
        model.setup_test_data({"file_path": str(data), "num_workers": 2})


def test_arguments_of_older_trainers():
    _need_lightning()
    from tpcore.interop.nemo import NLPDDPPlugin

    with pytest.warns(UserWarning, match=r"trainer\.amp_level changes nothing"):
        trainer = _trainer(
            amp_level="O2",
            gpus=0,
            checkpoint_callback=False,
            replace_sampler_ddp=False,
            progress_bar_refresh_rate=0,
            max_epochs=3,
        )
    assert isinstance(trainer.strategy, NLPDDPPlugin)
    assert trainer.max_epochs == 3
    with pytest.raises(ValueError, match="more than one strategy"):
        _trainer(strategy="ddp")


def test_without_lightning_the_extra_is_named():
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "import tpcore.interop.nemo as nemo\n"
        "try:\n    nemo.QAModel\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "needs Lightning; install tpcore with its extra [lightning]" in done.stdout, done.stderr


def test_every_snippet_of_the_page(files, tmp_path, monkeypatch, no_group):
    _need_lightning()
    from omegaconf import OmegaConf

    one, _, data = files["text_classification"]
    text = (ROOT / "docs" / "nemo.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    shutil.copyfile(one, tmp_path / "model.nemo")
    shutil.copyfile(data, tmp_path / "test.tsv")
    monkeypatch.chdir(tmp_path)
    (yaml,) = [body for language, body in blocks if language == "yaml"]
    names = {"cfg": OmegaConf.create(yaml)}
    snippets = [body for language, body in blocks if language == "python"]
    assert len(snippets) == len(blocks) - 1 == 3
    for snippet in snippets:
        exec(snippet, names)
    assert (tmp_path / "copy.nemo").exists()
    assert names["model"].test_evaluation.metrics["accuracy"] >= 0
    assert names["alone"].network is not None
    assert names["config"].target.endswith("TextClassificationModel")
