"""One gradient, however a step is cut; and number formats that do not change what is learnt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_mesh
from tests.train import tiny
from tpcore.parallel.collectives import all_gather
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.sharding import Replicated
from tpcore.train import trainer as module
from tpcore.train.batching import own_share
from tpcore.train.faults import DivergedError
from tpcore.train.launch import on_all_ranks
from tpcore.train.logging import RunLog
from tpcore.train.precision import LossScaler
from tpcore.train.prepare import build_model, prepare
from tpcore.train.read_config import load_config
from tpcore.train.run_state import choose_run
from tpcore.train.trainer import Trainer

SINGLE = (TensorParallelGroup.single(), DataParallelGroup.single())
STEPS = 20


def _trainer(
    tp: TensorParallelGroup, dp: DataParallelGroup, config: Any, cls: type[Trainer] = Trainer
) -> Trainer:
    job = on_all_ranks(lambda: prepare(config, tp.size * dp.size), tp, dp)
    return cls(
        job,
        build_model(job, tp, torch.device("cpu")),
        tp=tp,
        dp=dp,
        run=choose_run(config.exp_manager),
        log=RunLog(enabled=False),
    )


# --- 20 steps with labels as uneven as 10 : 30 --------------------------------------------------


def _write_tokens(folder: Path) -> None:
    """Sentences of 15 word pieces: by turns 5 words of 3 pieces, and 15 words of one.

    Only the first piece of a word has a label. Examples are dealt to ranks in turn, so that of two
    ranks one has 5 labels for every sentence, and the other 15.
    """
    tiny.write_vocabulary(folder / "vocab.txt")
    generator = torch.Generator().manual_seed(0)

    def draw(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    texts, labels = [], []
    for index in range(24):
        count, ending = (15, "") if index % 2 else (5, "sly")
        words = [draw(tiny.GOOD + tiny.OTHER) + ending for _ in range(count)]
        texts.append(" ".join(words))
        labels.append(" ".join("B-X" if w.startswith(tiny.GOOD) else "O" for w in words))
    (folder / "text.txt").write_text("\n".join(texts) + "\n")
    (folder / "labels.txt").write_text("\n".join(labels) + "\n")


def _token_config(folder: Path, tp_size: int, **others: Any) -> Any:
    values = {
        "task": "token_classification",
        "model__train_ds__file_path": None,
        "model__train_ds__text_file": folder / "text.txt",
        "model__train_ds__labels_file": folder / "labels.txt",
        "model__train_ds__shuffle": "false",
        "model__train_ds__batch_size": 4,
        "model__validation_ds__file_path": None,
        "model__tensor_model_parallel_size": tp_size,
        "trainer__accumulate_grad_batches": 3,
        "trainer__max_epochs": 100,
        "trainer__max_steps": STEPS,
        "model__optim__lr": 1e-4,
    }
    return load_config(None, tiny.overrides(folder, **(values | others)))


class _MeanOfMeans(Trainer):
    """The mistake: every rank divides by its own labels, and the means are averaged."""

    def _over_ranks(self, counts: Tensor) -> Tensor:
        return counts * self.dp.size


def _steps(
    tp: TensorParallelGroup,
    dp: DataParallelGroup,
    folder: Path,
    cls: type[Trainer] = Trainer,
    **values: Any,
) -> list[tuple[float, float, dict[str, Tensor]]]:
    """Loss, gradient norm and whole gradients of every step."""
    trainer = _trainer(tp, dp, _token_config(folder, tp.size, **values), cls)
    trainer.model.train()
    result = []
    epoch = 0
    while len(result) < STEPS:
        for batches in trainer.epoch_batches(epoch):
            if len(result) == STEPS:
                break
            lr = trainer.schedule.learning_rate(trainer.global_step)
            step = trainer.train_step(batches, lr)
            trainer.position.advance(0)
            whole = {}
            for name, parameter in trainer.weights.main.items():
                if parameter.grad is None:
                    continue
                sharding = trainer.shardings[name]
                gradient = trainer.weights.whole(name, parameter.grad)
                if not isinstance(sharding, Replicated):
                    gradient = all_gather(gradient.contiguous(), tp, sharding.dim)
                whole[name] = gradient.clone()
            result.append((step.loss, step.grad_norm, whole))
        epoch += 1
    return result


def _compare(ours: Any, theirs: Any) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a[0] == pytest.approx(b[0], rel=1e-5), ("loss", step)
        assert a[1] == pytest.approx(b[1], rel=1e-5), ("norm", step)
        assert a[2].keys() == b[2].keys()
        for name, expected in b[2].items():
            gradient = a[2][name][: expected.shape[0]]
            expected = expected[: gradient.shape[0]]  # padding of the vocabulary has none
            if name.endswith("qkv.bias"):
                # The true gradient of key biases is zero: they are compared absolutely.
                assert (gradient - expected).abs().max() < 1e-6, (name, step)
                continue
            error = (gradient - expected).norm() / expected.norm()
            assert error < 1e-5, (name, step, error.item())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("uneven")
    _write_tokens(folder)
    return folder, _steps(*SINGLE, folder)


def check_steps(
    tp: TensorParallelGroup, dp: DataParallelGroup, folder: Path, expected: Any, values: Any
) -> int:
    _compare(_steps(tp, dp, folder, **values), expected)
    trainer = _trainer(tp, dp, _token_config(folder, tp.size, **values))
    assert trainer.model.sequence_parallel == ("model__sequence_parallel" in values)
    granularity = values.get("model__activations_checkpoint_granularity")
    assert trainer.loss_sums.meets == ("trainer__data_parallel" in values)
    assert trainer.model.blocks[0].activation_checkpointing == granularity
    batches = next(trainer.epoch_batches(0))
    shares = [trainer.task.collate(own_share(batch, dp)) for batch in batches]
    return int(sum(trainer.task.label_counts(share)[0] for share in shares))


@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_every_step_is_that_of_one_process(tp_size: int, dp_size: int, reference: Any) -> None:
    counts = run_mesh(check_steps, tp_size, dp_size, *reference, {})
    if dp_size == 2:
        assert {counts[0], counts[-1]} == {30, 90}  # three micro-batches of 10 and 30


@pytest.mark.slow
def test_every_step_of_eight_ranks_is_that_of_one_process(reference: Any, tmp_path: Path) -> None:
    folder, expected = reference
    torch.save(expected, tmp_path / "reference.pt")
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    script = ["-m", "tests.train.eight_ranks", folder, tmp_path / "reference.pt", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, [*command, *script])],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = [(tmp_path / f"{dp}-{tp}").read_text() for dp in range(2) for tp in range(4)]
    assert sorted(counts) == ["30"] * 4 + ["90"] * 4


SEQUENCE_PARALLEL = {"model__sequence_parallel": "true"}
FULL = {"model__activations_checkpoint_granularity": "full"}
SELECTIVE = {"model__activations_checkpoint_granularity": "selective"}


DDP = {"trainer__data_parallel": "ddp"}
FSDP = {"trainer__data_parallel": "fsdp2"}


@pytest.mark.parametrize(
    ("mesh", "values"),
    [
        ((2, 2), DDP),
        ((1, 2), DDP | FULL),
        ((2, 2), FSDP),
        ((1, 2), FSDP | FULL),
        ((2, 1), SEQUENCE_PARALLEL),
        ((2, 2), SEQUENCE_PARALLEL | FULL),
        ((2, 1), SEQUENCE_PARALLEL | SELECTIVE),
        ((1, 2), FULL),
        ((2, 1), SELECTIVE),
    ],
)
def test_what_saves_memory_or_time_changes_no_step(
    mesh: tuple[int, int], values: dict[str, str], reference: Any
) -> None:
    run_mesh(check_steps, *mesh, *reference, values)


def _check_mutant(
    tp: TensorParallelGroup, dp: DataParallelGroup, folder: Path, expected: Any
) -> None:
    with pytest.raises(AssertionError, match="loss"):
        _compare(_steps(tp, dp, folder, _MeanOfMeans), expected)


def test_an_average_of_means_is_noticed(reference: Any) -> None:
    run_mesh(_check_mutant, 1, 2, *reference)


# --- precision ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_inputs(tmp_path)


def test_bf16_keeps_small_updates_in_main_weights(folder: Path) -> None:
    config = tiny.config(folder, trainer__precision="bf16", model__optim__weight_decay=0.0)
    trainer = _trainer(*SINGLE, config)
    before = {name: p.clone() for name, p in trainer.weights.main.items()}
    examples = trainer.job.train.examples
    for _ in range(4):
        trainer.train_step([examples[:4], examples[4:8]], lr=1e-6)
        trainer.position.advance(0)
    name = "blocks.0.mlp.dense_in.weight"
    own = dict(trainer.model.named_parameters())[name]
    main = trainer.weights.main[name]
    assert own.dtype == torch.bfloat16
    assert main.dtype == torch.float32
    moved = (main - before[name]).abs().max().item()
    assert 2e-6 < moved < 5e-6  # four steps of Adam; bfloat16 alone would lose each of them
    assert torch.equal(own, main.bfloat16())
    assert all(p.dtype == torch.float32 for p in trainer.weights.state_dict().values())
    # fp32 accumulation: the gradient of the step is not a sum of bfloat16 numbers.
    gradient = main.grad
    assert gradient is not None
    assert not torch.equal(gradient, gradient.bfloat16().float())


def _check_overflow(
    tp: TensorParallelGroup, dp: DataParallelGroup, folder: Path, where: int, kind: str
) -> None:
    """An infinity on one rank alone, after the sum over ranks."""
    config = tiny.config(
        folder,
        trainer__precision="16-mixed",
        trainer__loss_scale=1024,
        trainer__data_parallel=kind,
        model__tensor_model_parallel_size=tp.size,
    )
    trainer = _trainer(tp, dp, config)
    own = dp.rank * tp.size + tp.rank
    original = module.scale_gradients

    def inject(parameters: Any, factor: float) -> None:
        original(parameters, factor)
        if own == where and trainer.global_step == 1:
            # Replicated, and not of the rank whose norm of it counts: only a flag can tell.
            trainer.weights.main["final_norm.bias"].grad[0] = torch.inf

    module.scale_gradients = inject
    try:
        skipped, states = [], []
        for _ in range(3):
            result = trainer.train_step([trainer.job.train.examples[:8]], lr=1e-3)
            trainer.position.advance(0)
            skipped.append(result.skipped)
            whole = trainer.weights.whole
            states.append(
                {n: whole(n, p.detach()).clone() for n, p in trainer.weights.main.items()}
            )
    finally:
        module.scale_gradients = original
    assert skipped == [False, True, False]
    assert trainer.scaler.scale == 512
    name = "blocks.0.mlp.dense_in.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[1][name], states[2][name])
    for name, parameter in states[-1].items():
        copies = all_gather(parameter.unsqueeze(0).contiguous(), dp)
        assert (copies == copies[0]).all(), name


@pytest.mark.parametrize(
    ("mesh", "where", "kind"),
    [((2, 2), 3, "sum"), ((2, 1), 1, "sum"), ((1, 2), 1, "sum"), ((2, 2), 3, "fsdp2")],
)
def test_overflow_on_one_rank_is_skipped_by_all(
    mesh: tuple[int, int], where: int, kind: str, folder: Path
) -> None:
    run_mesh(_check_overflow, *mesh, folder, where, kind)


def test_scale_halves_and_doubles() -> None:
    scaler = LossScaler(8.0, growth_interval=2, enabled=True)
    scales = []
    for overflow in (False, False, True, False, True, False, False, False, False):
        scaler.update(overflow=overflow)
        scales.append(scaler.scale)
    assert scales == [8, 16, 8, 8, 4, 4, 8, 8, 16]
    for _ in range(20):
        scaler.update(overflow=True)
    assert scaler.is_exhausted
    off = LossScaler(8.0, growth_interval=2, enabled=False)
    off.update(overflow=True)
    assert off.scale == 1.0
    assert not off.is_exhausted


def test_diverging_run_names_examples_and_checkpoint(folder: Path) -> None:
    config = tiny.config(folder, model__optim__lr=1e30, trainer__gradient_clip_val=None)
    trainer = _trainer(*SINGLE, config)
    with pytest.raises(DivergedError, match=r"step 2;.*examples are \d+, .*train\.tsv.*no checkp"):
        trainer.fit()
    assert '"step": 2' in (trainer.run_path / "diverged.json").read_text()
