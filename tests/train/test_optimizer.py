"""Parameter groups, gradient norm and clipping over shards, sums over data-parallel ranks."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.ranks import run_mesh, run_ranks
from tpcore.parallel.group import DataParallelGroup, TensorParallelGroup
from tpcore.parallel.sharding import Sharded, Sharding, shard, sharding_table
from tpcore.train.config import ConfigError, OptimConfig
from tpcore.train.gradients import BUCKET_BYTES, clip_gradients, gradient_norm, sum_gradients
from tpcore.train.optimizer import build_optimizer, freeze, parameter_groups, set_learning_rate

TABLE: dict[str, Sharding] = {"rows": Sharded(0), "columns": Sharded(1), "row_bias": Sharded(0)}


class _Module(nn.Module):
    """Shards of 8 x 4 matrices beside replicated parameters; its gradients are set by hand."""

    def __init__(self, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.tp = tp
        for name, full in _full_tensors(seed=0).items():
            self.register_parameter(name, nn.Parameter(self.part(name, full)))

    def part(self, name: str, full: Tensor) -> Tensor:
        sharding = TABLE.get(name)
        if sharding is None:
            return full.clone()
        return shard(full, sharding, self.tp.rank, self.tp.size).clone()

    def own_sharding(self) -> dict[str, Sharding]:
        return TABLE


def _full_tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"rows": (8, 4), "columns": (8, 4), "row_bias": (8,), "norm": (4,), "table": (3, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _norm(module: nn.Module, tp: TensorParallelGroup) -> Tensor:
    return gradient_norm(dict(module.named_parameters()), sharding_table(module), tp)[0]


def _check_norm_and_clip(tp: TensorParallelGroup) -> None:
    module = _Module(tp)
    gradients = _full_tensors(seed=1)
    for name, parameter in module.named_parameters():
        parameter.grad = module.part(name, gradients[name])
    expected = torch.cat([g.double().reshape(-1) for g in gradients.values()]).norm().item()

    norm = _norm(module, tp)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(expected, rel=1e-6)

    clip_gradients(module.parameters(), norm, max_norm=0.5)
    assert _norm(module, tp).item() == pytest.approx(0.5, rel=1e-5)
    factor = 0.5 / (expected + 1e-6)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, module.part(name, gradients[name]) * factor)

    clip_gradients(module.parameters(), torch.tensor(0.1), max_norm=0.5)  # small: left alone
    assert _norm(module, tp).item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_norm_counts_replicated_parameters_once(size: int) -> None:
    run_ranks(_check_norm_and_clip, size)


def test_norm_of_missing_and_zero_gradients() -> None:
    module = _Module(TensorParallelGroup.single())
    assert _norm(module, module.tp).item() == 0.0
    module.norm.grad = torch.zeros(4)
    clip_gradients(module.parameters(), _norm(module, module.tp), max_norm=1.0)
    assert module.norm.grad.tolist() == [0.0] * 4


def _check_sum(tp: TensorParallelGroup, dp: DataParallelGroup) -> None:
    module = _Module(tp)
    module.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    # More than one bucket, with a tensor that is larger than a bucket.
    module.large = nn.Parameter(torch.zeros(BUCKET_BYTES // 4 + 3))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (dp.rank == 0 or name != "norm"):
            parameter.grad = torch.full_like(parameter, 1.0 + dp.rank)
    sum_gradients(module.parameters(), dp)
    total = sum(range(1, dp.size + 1))
    for name, parameter in module.named_parameters():
        if name == "frozen":
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert (parameter.grad == (1 if name == "norm" else total)).all(), name


@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 1), (1, 2), (2, 2)])
def test_gradients_are_summed_over_data_parallel_ranks(tp_size: int, dp_size: int) -> None:
    run_mesh(_check_sum, tp_size, dp_size)


def test_norms_and_biases_do_not_decay() -> None:
    module = _Module(TensorParallelGroup.single())
    module.table.requires_grad_(False)
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decay, no_decay = parameter_groups(trainable, 0.1)
    assert [id(p) for p in decay["params"]] == [id(module.rows), id(module.columns)]
    assert [id(p) for p in no_decay["params"]] == [id(module.row_bias), id(module.norm)]
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_step_is_that_of_the_formula(name: str) -> None:
    module = _Module(TensorParallelGroup.single())
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    gradients = _full_tensors(seed=2)
    for key, parameter in module.named_parameters():
        parameter.grad = gradients[key].clone()
    config = OptimConfig(name=name, lr=1.0, weight_decay=0.1, eps=1e-8)
    optimizer = build_optimizer(dict(module.named_parameters()), config)
    assert optimizer.defaults["fused"]
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    for key, parameter in module.named_parameters():
        gradient, start = gradients[key], before[key]
        decay = 0.1 if gradient.ndim > 1 else 0.0
        if name == "adamw":
            start = start * (1 - 0.01 * decay)
        else:
            gradient = gradient + decay * start
        # After one step both bias-corrected moments are g and g^2.
        expected = start - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_patterns_freeze_parameters_and_one_that_matches_nothing_is_named() -> None:
    module = _Module(TensorParallelGroup.single())
    assert freeze(module, ["row*", "norm"]) == 3
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trainable == ["columns", "table"]
    with pytest.raises(ConfigError, match=r"'row_z\*' matches none .* rows"):
        freeze(module, ["row_z*"])
    with pytest.raises(ConfigError, match="leave some to be trained"):
        freeze(module, ["*"])


def test_each_block_learns_slower_than_the_one_above_it() -> None:
    names = (
        "embeddings.word_embeddings.weight",
        "blocks.0.input_norm.weight",
        "blocks.1.input_norm.weight",
        "head.classifier.weight",
    )
    parameters = {name: nn.Parameter(torch.ones(1)) for name in names}
    groups = parameter_groups(parameters, 0.1, lr_decay=0.5)
    optimizer = torch.optim.SGD(groups)
    set_learning_rate(optimizer, 0.8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in parameters.values()] == pytest.approx([0.1, 0.2, 0.4, 0.8])


def test_apex_is_used_where_it_is_and_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimConfig(name="fused_adam", lr=0.1)
    parameters = {"a": nn.Parameter(torch.ones(2, 2))}
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(ConfigError, match=r"fused_adam needs NVIDIA apex .*model.optim.name=adamw"):
        build_optimizer(parameters, config)

    class FusedAdam(torch.optim.SGD):
        def __init__(self, groups: object, **options: object) -> None:
            self.options = options
            super().__init__(groups)  # type: ignore[arg-type]

    apex = types.ModuleType("apex")
    apex.optimizers = types.ModuleType("apex.optimizers")  # type: ignore[attr-defined]
    apex.optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex.optimizers)
    optimizer = build_optimizer(parameters, config)
    assert isinstance(optimizer, FusedAdam)
    assert optimizer.options["adam_w_mode"] is True
    assert optimizer.options["betas"] == (0.9, 0.999)
