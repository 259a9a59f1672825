from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.device import DEVICE, on_the_cpu
from tests.helpers.ranks import run_ranks
from tests.layers.twins import check_against_twin
from tpcore.layers import linear_function
from tpcore.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import Replicated, Sharded, shard, sharding_table

SIZES = [1, 2, 4]
DTYPES = [torch.float32, torch.bfloat16]
IN, OUT = 24, 40
LAST = Sharded(-1)


def _twin(parameters, x):
    return F.linear(x, parameters["weight"], parameters.get("bias"))


def _x(dtype, *leading):
    return torch.randn(*leading, IN, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)


def _add_bias(module, x):
    y, bias = module(x)
    return y if bias is None else y + bias


def _check_column(tp, dtype, options, leading=(7,)):
    def build(group):
        return ColumnParallelLinear(IN, OUT, tp=group, dtype=dtype, **options)

    check_against_twin(
        tp,
        build,
        _twin,
        _x(dtype, *leading),
        run=_add_bias if options.get("skip_bias_add") else None,
        output_sharding=Replicated() if options.get("gather_output") else LAST,
    )


def _check_row(tp, dtype, options, leading=(7,)):
    def build(group):
        return RowParallelLinear(IN, OUT, tp=group, dtype=dtype, **options)

    check_against_twin(
        tp,
        build,
        _twin,
        _x(dtype, *leading),
        run=_add_bias if options.get("skip_bias_add") else None,
        input_sharding=LAST if options.get("input_is_parallel", True) else Replicated(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"gather_output": True},
        {"skip_bias_add": True},
        {"skip_bias_add": True, "bias": False},
        {"skip_bias_add": True, "gather_output": True},
        {"init_method": partial(nn.init.normal_, std=0.3)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_column_equals_its_twin(size, options, dtype):
    run_ranks(_check_column, size, dtype, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"input_is_parallel": False},
        {"skip_bias_add": True},
        {"init_method": partial(nn.init.normal_, std=0.3)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_row_equals_its_twin(size, options, dtype):
    run_ranks(_check_row, size, dtype, options)


@pytest.mark.parametrize("leading", [(), (0,), (3, 5), (2, 1, 3)], ids=str)
def test_any_leading_dimensions(leading):
    run_ranks(_check_column, 2, torch.float32, {}, leading)
    run_ranks(_check_row, 2, torch.float32, {}, leading)


def _check_without_the_all_reduce(tp):
    linear_function.start_all_reduce = lambda x, group: x.clone()
    try:
        with pytest.raises(AssertionError, match="gradient of the input on rank"):
            _check_column(tp, torch.float32, {})
    finally:
        linear_function.start_all_reduce = original_start_all_reduce
    _check_column(tp, torch.float32, {})


original_start_all_reduce = linear_function.start_all_reduce


def test_the_twin_notices_a_missing_all_reduce():
    run_ranks(_check_without_the_all_reduce, 2)


def _check_initial_values(tp):
    torch.manual_seed(11)
    column = ColumnParallelLinear(IN, OUT, tp=tp)
    torch.manual_seed(11)
    row = RowParallelLinear(IN, OUT, tp=tp)
    torch.manual_seed(11)
    plain = nn.Linear(IN, OUT, device="cpu").to(DEVICE)
    for name, own in column.named_parameters():
        full = plain.get_parameter(name)
        assert torch.equal(own, shard(full, sharding_table(column)[name], tp.rank, tp.size))
    assert torch.equal(row.weight, shard(plain.weight, Sharded(1), tp.rank, tp.size))
    assert torch.equal(row.bias, plain.bias)
    assert sharding_table(row) == {"weight": Sharded(1), "bias": Replicated()}
    # Built without memory, then materialised: the same numbers.
    later = ColumnParallelLinear(IN, OUT, tp=tp, device="meta").to_empty(device=DEVICE)
    torch.manual_seed(11)
    later.reset_parameters()
    assert torch.equal(later.weight, column.weight)
    # Drawn in float32, whatever the dtype.
    torch.manual_seed(11)
    low = ColumnParallelLinear(IN, OUT, tp=tp, dtype=torch.bfloat16)
    assert torch.equal(low.weight, column.weight.bfloat16())


@pytest.mark.parametrize("size", SIZES)
def test_initial_values_are_those_of_nn_linear(size):
    run_ranks(_check_initial_values, size)


class _Plain(nn.Module):
    """The two layers of the autocast test, unsharded."""

    def __init__(self, column, row):
        super().__init__()
        self.column, self.row = column, row

    def forward(self, x):
        return self.row(F.relu(self.column(x)))


def _build_pair(tp):
    torch.manual_seed(2)
    return _Plain(ColumnParallelLinear(IN, OUT, tp=tp), RowParallelLinear(OUT, IN, tp=tp))


def _check_autocast(tp):
    torch.manual_seed(2)
    plain = _Plain(nn.Linear(IN, OUT, device="cpu"), nn.Linear(OUT, IN, device="cpu")).to(DEVICE)
    ours = _build_pair(tp)
    table = sharding_table(ours)
    results = []
    for module in (ours, plain):
        x = _x(torch.float32, 7).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        y.float().pow(2).sum().backward()
        results.append((y.detach(), x.grad))
    tolerance = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(results[0][0], results[1][0], **tolerance)
    torch.testing.assert_close(results[0][1], results[1][1], **tolerance)
    for name, own in ours.named_parameters():
        full = plain.get_parameter(name).grad
        assert own.grad.dtype == torch.float32
        torch.testing.assert_close(
            own.grad, shard(full, table[name], tp.rank, tp.size), rtol=0.02, atol=0.06
        )


@pytest.mark.parametrize("size", SIZES)
def test_autocast(size):
    run_ranks(_check_autocast, size)


def _check_compiled(tp):
    module = _build_pair(tp)
    x = _x(torch.float32, 7).requires_grad_()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    (eager,) = torch.autograd.grad(module(x).sum(), x)
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(ours, eager)


@on_the_cpu
@pytest.mark.parametrize("size", [1, 2])
def test_compiles_to_one_graph(size):
    run_ranks(_check_compiled, size)


def _check_errors(tp):
    with pytest.raises(ValueError) as error:
        ColumnParallelLinear(4, 6, tp=tp)
    assert "out_features=6 cannot be split over a tensor-parallel size of 4" in str(error.value)
    with pytest.raises(ValueError, match="in_features=6 cannot be split"):
        RowParallelLinear(6, 4, tp=tp)
    with pytest.raises(ValueError, match=r"x has shape \[2, 8\]; expected 2 \(in_features / tp"):
        RowParallelLinear(8, 4, tp=tp)(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"x has shape \[2, 3\]; expected 8 \(in_features\)"):
        ColumnParallelLinear(8, 4, tp=tp)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x has shape \[\]; expected 8"):
        ColumnParallelLinear(8, 4, tp=tp)(torch.tensor(1.0))


def test_errors():
    run_ranks(_check_errors, 4)


def test_a_module_pickles():
    init = partial(nn.init.normal_, std=0.1)
    layer = ColumnParallelLinear(4, 6, tp=TensorParallelGroup.single(), init_method=init)
    clone = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 4)
    assert torch.equal(layer(x), clone(x))
