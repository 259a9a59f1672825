"""The layers by Megatron's names: results, gradients, attributes, spellings."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.interop.ranks import run_megatron
from tpcore.checkpoint import load_sharded, save_sharded
from tpcore.interop.megatron import ModelParallelConfig, parallel_state, tensor_parallel
from tpcore.parallel.collectives import all_gather
from tpcore.parallel.sharding import Sharded, ShardedParts, shard, sharding_table

INIT = partial(nn.init.normal_, std=0.3)
SPELLINGS = {
    "apex": {"params_dtype": torch.float64, "use_cpu_initialization": True},
    "core": {"config": ModelParallelConfig(params_dtype=torch.float64)},
}


def _full(shape, seed=3):
    """The weight that a layer draws after torch.manual_seed(seed), whole."""
    torch.manual_seed(seed)
    return INIT(torch.empty(shape)).double()


def _grads(output, *inputs):
    generator = torch.Generator().manual_seed(8)
    grad = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return torch.autograd.grad(output, inputs, grad), grad


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def _x(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def _check_column(tp, spelling, stride, sequence):
    rank, size = tp.rank, tp.size
    keywords = dict(SPELLINGS[spelling])
    if spelling == "apex":
        keywords["sequence_parallel_enabled"] = sequence
    elif sequence:
        keywords["config"] = ModelParallelConfig(params_dtype=torch.float64, sequence_parallel=True)
    torch.manual_seed(3)
    layer = tensor_parallel.ColumnParallelLinear(
        8,
        24,
        init_method=INIT,
        stride=stride,
        gather_output=False,
        keep_master_weight_for_test=True,
        **keywords,
    )
    full = _full((24, 8))
    sharding = Sharded(0) if stride == 1 else ShardedParts(0, stride)
    assert torch.equal(layer.weight, shard(full, sharding, rank, size))
    assert torch.equal(layer.master_weight.double(), full)
    assert sharding_table(layer) == {"weight": sharding, "bias": sharding}
    assert torch.equal(layer.bias, torch.zeros(24 // size).double())
    for parameter in (layer.weight, layer.bias):
        assert parameter.tensor_model_parallel
        assert (parameter.partition_dim, parameter.partition_stride) == (0, stride)
        assert tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)
    assert layer.output_size_per_partition == 24 // size
    full_bias = _x(24)
    with torch.no_grad():
        layer.bias.copy_(shard(full_bias, sharding, rank, size))

    x = _x(4, 3, 8)
    twin_x, twin_w, twin_b = (t.clone().requires_grad_() for t in (x, full, full_bias))
    twin = F.linear(twin_x, twin_w, twin_b)
    (dx, dw, db), grad = _grads(twin, twin_x, twin_w, twin_b)
    own_x = (shard(x, Sharded(0), rank, size) if sequence else x).clone().requires_grad_()
    output, bias = layer(own_x)
    assert bias is None
    _close(
        output, shard(twin, Sharded(-1) if stride == 1 else ShardedParts(-1, stride), rank, size)
    )
    own_grad = shard(grad, Sharded(-1) if stride == 1 else ShardedParts(-1, stride), rank, size)
    got = torch.autograd.grad(output, (own_x, layer.weight, layer.bias), own_grad)
    _close(got[0], shard(dx, Sharded(0), rank, size) if sequence else dx)
    _close(got[1], shard(dw, sharding, rank, size))
    _close(got[2], shard(db, sharding, rank, size))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("spelling", "stride", "sequence"),
    [("apex", 1, False), ("core", 3, False), ("core", 2, True), ("apex", 1, True)],
)
def test_column_parallel_linear(size, spelling, stride, sequence):
    run_megatron(_check_column, size, spelling, stride, sequence)


def _check_row(tp, spelling, parallel_input, sequence):
    rank, size = tp.rank, tp.size
    keywords = dict(SPELLINGS[spelling])
    if sequence:
        keywords["config"] = ModelParallelConfig(params_dtype=torch.float64, sequence_parallel=True)
    torch.manual_seed(3)
    layer = tensor_parallel.RowParallelLinear(
        8, 6, init_method=INIT, input_is_parallel=parallel_input, **keywords
    )
    full = _full((6, 8))
    assert torch.equal(layer.weight, shard(full, Sharded(1), rank, size))
    assert layer.weight.tensor_model_parallel
    assert (layer.weight.partition_dim, layer.weight.partition_stride) == (1, 1)
    assert not getattr(layer.bias, "tensor_model_parallel", False)
    assert tensor_parallel.param_is_not_tensor_parallel_duplicate(layer.bias) == (rank == 0)
    assert layer.input_size_per_partition == 8 // size
    with torch.no_grad():
        layer.bias.copy_(_x(6))
    x = _x(4, 3, 8)
    twin_x, twin_w, twin_b = (t.clone().requires_grad_() for t in (x, full, _x(6)))
    twin = F.linear(twin_x, twin_w, twin_b)
    (dx, dw, db), grad = _grads(twin, twin_x, twin_w, twin_b)
    own_x = (shard(x, Sharded(-1), rank, size) if parallel_input else x).clone().requires_grad_()
    output, bias = layer(own_x)
    assert bias is None
    _close(output, shard(twin, Sharded(0), rank, size) if sequence else twin)
    own_grad = shard(grad, Sharded(0), rank, size) if sequence else grad
    got = torch.autograd.grad(output, (own_x, layer.weight, layer.bias), own_grad)
    _close(got[0], shard(dx, Sharded(-1), rank, size) if parallel_input else dx)
    _close(got[1], shard(dw, Sharded(1), rank, size))
    _close(got[2], db)  # whole on every rank, sequence-parallel or not
    assert not layer.bias.sequence_parallel


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("spelling", "parallel_input", "sequence"),
    [("apex", False, False), ("core", True, False), ("core", True, True)],
)
def test_row_parallel_linear(size, spelling, parallel_input, sequence):
    run_megatron(_check_row, size, spelling, parallel_input, sequence)


def _check_embedding(tp, scatters):
    torch.manual_seed(3)
    layer = tensor_parallel.VocabParallelEmbedding(
        24,
        6,
        init_method=INIT,
        config=ModelParallelConfig(params_dtype=torch.float64),
        reduce_scatter_embeddings=scatters,
    )
    full = _full((24, 6))
    assert torch.equal(layer.weight, shard(full, Sharded(0), tp.rank, tp.size))
    assert (layer.weight.tensor_model_parallel, layer.weight.partition_dim) == (True, 0)
    first, last = tensor_parallel.VocabUtility.vocab_range_from_global_vocab_size(
        24, tp.rank, tp.size
    )
    assert (layer.vocab_start_index, layer.vocab_end_index) == (first, last)
    ids = torch.arange(24).roll(5).view(3, 8)[:, :4]  # [b, s]
    twin_w = full.clone().requires_grad_()
    twin = F.embedding(ids, twin_w)
    if scatters:
        twin = twin.transpose(0, 1)
    (dw,), grad = _grads(twin, twin_w)
    output = layer(ids)
    own = (lambda t: shard(t, Sharded(0), tp.rank, tp.size)) if scatters else (lambda t: t)
    assert torch.equal(output, own(twin))
    (got,) = torch.autograd.grad(output, layer.weight, own(grad))
    _close(got, shard(dw, Sharded(0), tp.rank, tp.size))


@pytest.mark.parametrize("scatters", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocab_parallel_embedding(size, scatters):
    run_megatron(_check_embedding, size, scatters)


def _refuse(full):
    raise RuntimeError("was drawn")


def _check_results(tp):
    x = _x(5, 8).float()
    column = tensor_parallel.ColumnParallelLinear
    output, bias = column(8, 12)(x)  # apex and Megatron-LM: gathered
    assert output.shape == (5, 12)
    assert bias is None
    config = ModelParallelConfig()
    output, bias = column(8, 12, config=config, init_method=INIT, skip_bias_add=True)(x)
    assert output.shape == (5, 12 // tp.size)
    assert bias.shape == (12 // tp.size,)
    layer = column(8, 12, config=config, init_method=INIT)
    assert layer(x, runtime_gather_output=True)[0].shape == (5, 12)
    other = torch.randn(12 // tp.size, 8, requires_grad=True)
    assert torch.equal(layer(x, weight=other)[0], F.linear(x, other, layer.bias))
    tied = column(8, 12, config=config, init_method=INIT, skip_weight_param_allocation=True)
    assert tied.weight is None
    assert [name for name, _ in tied.named_parameters()] == ["bias"]
    assert tied(x, weight=other)[0].shape == (5, 12 // tp.size)
    with pytest.raises(ValueError, match="has no weight of its own"):
        tied(x)
    output, bias = tensor_parallel.RowParallelLinear(8, 12, skip_bias_add=True)(x)
    assert output.shape == (5, 12)
    assert torch.equal(bias, torch.zeros(12))
    assert tensor_parallel.RowParallelLinear(8, 12, bias=False)(x)[1] is None
    with pytest.raises(RuntimeError, match="was drawn"):
        column(8, 12, init_method=_refuse)
    column(8, 12, init_method=_refuse, perform_initialization=False)
    # A group that is passed counts instead of the process's own.
    group = parallel_state.get_data_parallel_group()
    assert column(8, 12, bias=False, tp_group=group).weight.shape == (12 // (4 // tp.size), 8)


def test_what_the_layers_return():
    run_megatron(_check_results, 2)


def _check_main_grad(tp):
    config = ModelParallelConfig(gradient_accumulation_fusion=True, params_dtype=torch.float64)
    layer = tensor_parallel.ColumnParallelLinear(8, 12, config=config, init_method=INIT)
    layer.weight.main_grad = torch.ones_like(layer.weight)
    x = _x(5, 8)
    layer(x)[0].sum().backward()
    assert layer.weight.grad is None
    _close(layer.weight.main_grad, 1 + x.sum(0).expand(12 // tp.size, 8))


def test_gradient_accumulation_fusion_adds_to_main_grad():
    run_megatron(_check_main_grad, 2)


def _check_function(tp):
    function = tensor_parallel.linear_with_grad_accumulation_and_async_allreduce
    full, bias, x = _x(12, 8), _x(12), _x(4, 8)
    weight, own_bias = (shard(t, Sharded(0), tp.rank, tp.size) for t in (full, bias))
    weight = weight.clone().requires_grad_()
    whole_dx = torch.ones(4, 12).double() @ full
    part_dx = torch.ones(4, 12 // tp.size).double() @ weight
    own = shard(x, Sharded(0), tp.rank, tp.size)
    cases = [
        ({"async_grad_allreduce": True, "sequence_parallel_enabled": False}, x, whole_dx),
        ({"allreduce_dgrad": True, "sequence_parallel": False}, x, whole_dx),
        ({"allreduce_dgrad": False, "sequence_parallel": False}, x, part_dx),
        (
            {"allreduce_dgrad": False, "sequence_parallel": True},
            own,
            shard(whole_dx, Sharded(0), tp.rank, tp.size),
        ),
    ]
    for keywords, given, expected in cases:
        leaf = given.clone().requires_grad_()
        output = function(leaf, weight, own_bias, gradient_accumulation_fusion=False, **keywords)
        _close(output, F.linear(x, weight, own_bias))
        dx, dw = torch.autograd.grad(output.sum(), (leaf, weight))
        _close(dx, expected)
        _close(dw, x.sum(0).expand_as(weight))
    with pytest.raises(ValueError, match="exclude each other"):
        function(x, weight, own_bias, False, True, True)


@pytest.mark.parametrize("size", [2, 4])
def test_the_function_behind_the_layers(size):
    run_megatron(_check_function, size)


def _check_saved(tp, folder, write):
    if tp.rank != parallel_state.get_tensor_model_parallel_rank() or (
        parallel_state.get_data_parallel_rank() > 0
    ):
        return
    torch.manual_seed(4 if write else 5)
    layer = tensor_parallel.ColumnParallelLinear(8, 24, stride=2, init_method=INIT)
    if write:
        save_sharded(layer, folder, tp=tp)
        return
    load_sharded(layer, folder, tp=tp)
    assert torch.equal(
        layer.weight.double(), shard(_full((24, 8), 4), ShardedParts(0, 2), tp.rank, tp.size)
    )


def test_blocks_are_saved_and_loaded_at_any_size(tmp_path):
    run_megatron(_check_saved, 4, tmp_path / "x", True)
    run_megatron(_check_saved, 2, tmp_path / "x", False)


def _check_refusals(tp):
    column, row = tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear
    with pytest.raises(ValueError, match="out_features=13 cannot be split"):
        column(8, 13)
    with pytest.raises(ValueError, match="cannot be 4 equal blocks"):
        column(8, 14, stride=4)
    with pytest.raises(ValueError, match="needs input_is_parallel=True"):
        row(8, 12, sequence_parallel_enabled=True)
    with pytest.raises(ValueError, match="is_expert is not supported"):
        column(8, 12, is_expert=True)
    with pytest.raises(TypeError, match="no argument 'params_type'"):
        column(8, 12, params_type=torch.float32)
    with pytest.raises(ValueError, match="expected input_size=8"):
        column(8, 12)(torch.zeros(3, 9))


def test_refusals():
    run_megatron(_check_refusals, 2)


def _check_attributes(tp):
    tensor = torch.zeros(2)
    tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(tensor)
    assert (tensor.tensor_model_parallel, tensor.partition_dim, tensor.partition_stride) == (
        False,
        -1,
        1,
    )
    tensor_parallel.set_tensor_model_parallel_attributes(tensor, True, 1, 3)
    tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(tensor)
    copy = torch.zeros(2)
    tensor_parallel.copy_tensor_model_parallel_attributes(copy, tensor)
    assert (copy.tensor_model_parallel, copy.partition_dim, copy.partition_stride) == (True, 1, 3)
    # A norm over all ranks counts each number once.
    layer = nn.ModuleList(
        [tensor_parallel.ColumnParallelLinear(8, 12), tensor_parallel.RowParallelLinear(8, 12)]
    )
    with torch.no_grad():
        layer[1].bias.fill_(2.0)
    counted = sum(
        p.numel()
        for p in layer.parameters()
        if tensor_parallel.param_is_not_tensor_parallel_duplicate(p)
    )
    everywhere = all_gather(torch.tensor([counted]), tp).sum().item()
    assert everywhere == 8 * 12 + 12 + 8 * 12 + 12


def test_parameter_attributes():
    run_megatron(_check_attributes, 2)
