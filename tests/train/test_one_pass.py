"""The optimizer's step in one pass, on gradients as the backward has left them: what it saves."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.harness import require
from tests.train import tiny
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.train import precision as precision_module
from tpcore.train.config import OptimConfig
from tpcore.train.launch import on_all_ranks
from tpcore.train.logging import RunLog
from tpcore.train.optimizer import OnePassAdamW, build_optimizer, step_weights
from tpcore.train.prepare import build_model, prepare
from tpcore.train.run_state import choose_run
from tpcore.train.trainer import Trainer

SINGLE = (TensorParallelGroup.single(), DataParallelGroup.single())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_inputs(tmp_path)


@pytest.fixture(autouse=True)
def _native() -> None:
    require("cpu")


def _trainer(folder: Path, **values: Any) -> Trainer:
    config = tiny.config(folder, **values)
    job = on_all_ranks(lambda: prepare(config, 1), *SINGLE)
    tp, dp = SINGLE
    model = build_model(job, tp, torch.device("cpu"))
    run, log = choose_run(config.exp_manager), RunLog(enabled=False)
    return Trainer(job, model, tp=tp, dp=dp, run=run, log=log)


def _batches(trainer: Trainer, count: int) -> list[Any]:
    examples = trainer.job.train.examples
    return [examples[4 * i : 4 * i + 4] for i in range(count)]


def _curve(folder: Path, count: int, **values: Any) -> tuple[Any, ...]:
    """Losses, norms, and all that is left after a few steps of `count` micro-batches."""
    trainer = _trainer(folder, **values)
    steps = []
    for _ in range(3):
        steps.append(trainer.train_step(_batches(trainer, count), lr=1e-2))
        trainer.position.advance(0)
    state = trainer.optimizer.state
    moments = {n: dict(state[p]) for n, p in trainer.weights.main.items() if p in state}
    own = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return type(trainer.optimizer), steps, trainer.weights.state_dict(), own, moments


def _widen_at_once(parameter: Tensor) -> None:
    """Every gradient in float32, from the first on."""
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    total = getattr(parameter, "main_grad", None)
    parameter.main_grad = gradient.float() if total is None else total.add_(gradient)  # type: ignore[attr-defined]


def _check_equal(a: Any, b: Any) -> None:
    """In every bit, but with AVX-512, of which torch's own step uses half."""
    exact = torch.backends.cpu.get_cpu_capability() != "AVX512"
    bound = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(a, b, **bound)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_steps_are_those_of_float32_gradients_and_torch(
    precision: str, count: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"trainer__precision": precision, "trainer__gradient_clip_val": 0.3}
    ours = _curve(folder, count, **values)
    assert ours[0] is OnePassAdamW
    assert all(step.grad_norm > 0.3 for step in ours[1])  # clipped
    monkeypatch.setattr(OnePassAdamW, "takes", staticmethod(lambda parameters: False))
    fallback = _curve(folder, count, **values)
    monkeypatch.setattr(precision_module, "_add_to_main_grad", _widen_at_once)
    plain = _curve(folder, count, **values)
    for other in (fallback, plain):
        assert other[0] is torch.optim.AdamW
        for theirs, step in zip(other[1], ours[1], strict=True):
            _check_equal([theirs.loss, theirs.grad_norm], [step.loss, step.grad_norm])
            assert theirs[2:] == step[2:]
        for a, b in zip(other[2:], ours[2:], strict=True):
            _check_equal(a, b)


def _alive_bytes() -> int:
    """Of all storages that a tensor in Python is over."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                # Other tests may have left sparse tensors and those of a trace, without memory.
                with contextlib.suppress(RuntimeError):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(("count", "gradient_bytes"), [(1, 2), (2, 4)])
def test_bytes_of_a_parameter_in_bf16(count: int, gradient_bytes: int, folder: Path) -> None:
    """4 main weight, 2 weight, 8 moments; 2 gradient, or 4 of a sum of micro-batches."""
    before = _alive_bytes()
    trainer = _trainer(folder, trainer__precision="bf16")
    trainer.train_step(_batches(trainer, count), lr=1e-3)
    main = trainer.weights.main.values()
    numbers = sum(p.numel() for p in main)
    assert numbers > 15_000
    assert sum(p.grad.nbytes for p in main if p.grad is not None) == gradient_bytes * numbers
    alive = _alive_bytes() - before
    assert alive >= (14 + gradient_bytes) * numbers
    # Step counters, labels and whatever else is small.
    assert alive < (14.5 + gradient_bytes) * numbers
    trainer.weights.zero_gradients()
    assert abs(alive - (_alive_bytes() - before) - gradient_bytes * numbers) < 0.1 * numbers


class _Conversions(TorchDispatchMode):
    """Conversions between formats of as many numbers as a weight has."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if "_to_copy" in name or "copy_" in name:
            source = args[-1] if "foreach" in name or "copy_.default" in name else args[0]
            tensors = source if isinstance(source, list) else [source]
            self.found += [name for t in tensors if t.numel() in self.sizes]
        return result


def test_a_step_converts_no_weight_and_no_gradient(folder: Path) -> None:
    trainer = _trainer(folder, trainer__precision="bf16")
    trainer.train_step(_batches(trainer, 1), lr=1e-3)
    matrices = {p.numel() for n, p in trainer.weights.main.items() if n.endswith("dense_in.weight")}
    weights, optimizer = trainer.weights, trainer.optimizer
    for takes, expected in ((True, 0), (False, 4)):  # of two matrices
        weights.zero_gradients()
        batch = trainer.task.collate(trainer.job.train.examples[:4], trainer.device)
        if not takes:  # the mistake is noticed: to float32, and back to bfloat16
            optimizer = build_optimizer(weights.main, OptimConfig(name="adam"))
        with _Conversions(matrices) as recorded:
            trainer.loss_sums(batch, torch.tensor([1])).sum().backward()
            weights.collect_gradients()
            step_weights(optimizer, weights)
        per_weight = len(recorded.found) / len(trainer.model.blocks)
        assert per_weight == expected, recorded.found


def test_a_backward_that_waits_for_old_weights_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = build_optimizer({"weight": weight}, OptimConfig())
    assert isinstance(optimizer, OnePassAdamW)
    loss = (weight @ torch.ones(3, 3, requires_grad=True)).sum()
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_that_the_kernel_does_not_take_are_stepped_by_torch() -> None:
    for weight in (torch.ones(3, 4).t(), torch.ones(3, 3, dtype=torch.float64)):
        optimizer = build_optimizer({"weight": nn.Parameter(weight)}, OptimConfig())
        assert type(optimizer) is torch.optim.AdamW


def test_state_passes_between_torch_and_one_pass() -> None:
    """As a run does that another installation goes on with."""

    def stepped(first: bool, second: bool) -> Tensor:
        torch.manual_seed(0)
        weight, state = nn.Parameter(torch.randn(5, 7)), None
        for one_pass in (first, second):
            cls: Any = OnePassAdamW if one_pass else torch.optim.AdamW
            options = {} if one_pass else {"fused": True}
            optimizer = cls([{"params": [weight]}], lr=0.1, **options)
            if state is not None:
                optimizer.load_state_dict(state)
            weight.grad = torch.randn(5, 7)
            optimizer.step()
            state = optimizer.state_dict()
        return weight.detach()

    expected = stepped(False, False)
    for by in ((True, False), (False, True)):
        _check_equal(stepped(*by), expected)
