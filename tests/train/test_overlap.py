"""Gradients summed during the backward, by DDP or FSDP2: the same steps, resumed ones too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_mesh
from tests.train import tiny
from tests.train.test_resume import _check_same_run, _curve, _fit, _run
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.train.config import ConfigError
from tpcore.train.launch import on_all_ranks
from tpcore.train.logging import RunLog
from tpcore.train.prepare import build_model, prepare
from tpcore.train.run import load_run
from tpcore.train.run_state import choose_run
from tpcore.train.trainer import Trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_inputs(tmp_path)


def _trainer(
    tp: TensorParallelGroup, dp: DataParallelGroup, folder: Path, kind: str, precision: str
) -> Trainer:
    config = tiny.config(
        folder,
        trainer__data_parallel=kind,
        trainer__precision=precision,
        model__tensor_model_parallel_size=tp.size,
    )
    job = on_all_ranks(lambda: prepare(config, tp.size * dp.size), tp, dp)
    return Trainer(
        job,
        build_model(job, tp, torch.device("cpu")),
        tp=tp,
        dp=dp,
        run=choose_run(config.exp_manager),
        log=RunLog(enabled=False),
    )


def _check_idle_ranks(
    tp: TensorParallelGroup, dp: DataParallelGroup, folder: Path, other: str, precision: str
) -> None:
    """A rank without examples in the whole step, and one without any in the last batch."""
    found: dict[str, list[tuple[Any, dict[str, Tensor]]]] = {}
    for kind in ("sum", other):
        trainer = _trainer(tp, dp, folder, kind, precision)
        assert trainer.loss_sums.meets == (kind != "sum")
        assert trainer.weights.is_wrapped == (kind == "fsdp2" or (kind, precision) == _CASTS)
        examples = trainer.job.train.examples
        steps = []
        for batches in ([examples[:1]], [examples[1:4], examples[4:5]], [examples[5:9]]):
            result = trainer.train_step(batches, lr=1e-3)
            trainer.position.advance(0)
            gradients = {
                name: trainer.weights.whole(name, p.grad).clone()
                for name, p in trainer.weights.main.items()
                if p.grad is not None
            }
            for name, parameter in trainer.weights.main.items():
                rows = trainer.weights.templates()[name].shape[0]
                assert (parameter.shape[0] < rows) == (kind == "fsdp2" and rows > 1), name
            steps.append((result, gradients))
        evaluation = trainer.evaluate(trainer.job.train, trainer.config.model.validation_ds)
        found[kind] = [*steps, (evaluation.loss, trainer.weights.state_dict())]
    # Two numbers have one sum, whoever adds them: the steps are equal in every bit. Only a norm
    # that is summed over rows of parameters may have another last digit, and clips with it.
    *steps, (loss, weights) = found[other]
    *expected, (expected_loss, expected_weights) = found["sum"]
    exact = other == "ddp"
    for (ours, gradients), (theirs, others) in zip(steps, expected, strict=True):
        if exact:
            assert ours == theirs
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-6)
        assert ours[2:] == theirs[2:]
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            close = torch.equal(gradient, others[name])
            if not exact:
                close = bool((gradient - others[name]).norm() <= 2e-6 * others[name].norm())
            # Key biases have none but for rounding.
            assert close or name.endswith("qkv.bias"), name
    # A weight with another last digit may round to the neighbour in half precision.
    near = 1e-5 if precision == "32" else 2e-4
    assert loss == pytest.approx(expected_loss, rel=0 if exact else near)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        close = torch.allclose(tensor, expected_weights[name], rtol=0, atol=1e-5)
        equal = torch.equal(tensor, expected_weights[name])
        assert equal or (not exact and (close or name.endswith("qkv.bias"))), name


_CASTS = ("ddp", "bf16")


@pytest.mark.parametrize(
    ("tp_size", "kind", "precision"),
    [
        (2, "ddp", "32"),
        (2, "ddp", "bf16"),
        (2, "fsdp2", "32"),
        (1, "fsdp2", "bf16"),
        (2, "fsdp2", "16-mixed"),
    ],
)
def test_steps_with_idle_ranks_are_those_of_one_sum(
    tp_size: int, kind: str, precision: str, folder: Path
) -> None:
    run_mesh(_check_idle_ranks, tp_size, 2, folder, kind, precision)


# --- resumed runs -------------------------------------------------------------------------------


def _fit_by(
    tp: TensorParallelGroup,
    dp: DataParallelGroup,
    folder: Path,
    version: str,
    stop_at: int,
    kind: str,
    precision: str = "32",
) -> None:
    values = {"trainer__data_parallel": kind, "trainer__precision": precision}
    _fit(tp, dp, folder, version, stop_at=stop_at, **values)


@pytest.mark.parametrize(
    ("mesh", "kind", "precision"),
    [
        ((1, 2), "ddp", "32"),
        ((2, 2), "fsdp2", "32"),
        ((1, 2), "fsdp2", "bf16"),
    ],
)
def test_a_resumed_run_is_equal_in_every_bit(
    mesh: tuple[int, int], kind: str, precision: str, folder: Path
) -> None:
    run_mesh(_fit_by, *mesh, folder, "whole", -1, kind, precision)
    run_mesh(_fit_by, *mesh, folder, "cut", 5, kind, precision)
    run_mesh(_fit_by, *mesh, folder, "cut", -1, kind, precision)
    _check_same_run(_run(folder, "whole"), _run(folder, "cut"))


def test_a_run_goes_on_by_other_means_and_at_other_sizes(folder: Path) -> None:
    """Checkpoints are the same whoever has split what they are of."""
    run_mesh(_fit_by, 1, 1, folder, "whole", -1, "sum")
    expected = _curve(_run(folder, "whole"))
    parts = [((1, 2), 3, "fsdp2"), ((2, 1), 5, "sum"), ((2, 2), 7, "fsdp2"), ((1, 4), 9, "fsdp2")]
    for mesh, stop_at, kind in [*parts, ((1, 2), -1, "ddp")]:
        run_mesh(_fit_by, *mesh, folder, "cut", stop_at, kind)
    assert _curve(_run(folder, "cut")) == pytest.approx(expected, rel=2e-5)
    assert len(expected) == 12


def test_the_finished_model_is_that_of_one_process(folder: Path) -> None:
    """The .nemo file, the best weights of which two ranks have halves, and its evaluation."""
    evaluations = []
    for mesh, kind in (((1, 1), "sum"), ((2, 2), "fsdp2")):
        version = f"{kind}-nemo"
        run_mesh(_fit_by, *mesh, folder, version, -1, kind, "bf16")
        run = load_run(_run(folder, version) / "checkpoints/tiny.nemo")
        evaluations.append(run.evaluate(folder / "validation.tsv").loss)
        result = json.loads((_run(folder, version) / "result.json").read_text())
        best = load_run(_run(folder, version)).evaluate(folder / "validation.tsv")
        assert best.loss == pytest.approx(result["best"]["val_loss"], rel=0.01)
    assert evaluations[0] == pytest.approx(evaluations[1], rel=0.02)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"trainer__data_parallel": "dpp"}, "did you mean ddp"),
        ({"trainer__data_parallel": "fsdp"}, "did you mean fsdp2"),
        (
            {"trainer__data_parallel": "fsdp2", "trainer__compile": "true"},
            "expected false with trainer.data_parallel=fsdp2",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    values: dict[str, str], expected: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        tiny.config(folder, **values)
    assert "\n" not in str(caught.value)
