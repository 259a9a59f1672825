"""What the backward of a linear layer does, in which order, and where the weight gradient goes."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.device import DEVICE, on_the_cpu
from tests.helpers.ranks import run_ranks
from tests.kernels.harness import require
from tpcore.layers import linear_function
from tpcore.layers.attention import PackedSequences
from tpcore.layers.block import TransformerBlock
from tpcore.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpcore.layers.linear_function import column_parallel_linear
from tpcore.parallel import shared_memory
from tpcore.parallel.collectives import all_gather, all_reduce, reduce_scatter
from tpcore.parallel.group import TensorParallelGroup

IN, OUT, T = 24, 40, 8
COLLECTIVES = {
    "all_reduce": "start all_reduce",
    "all_gather_into_tensor": "start all_gather",
    "reduce_scatter_tensor": "start reduce_scatter",
    "wait_tensor": "wait",
    "shm_complete": "wait",
    "shm_exchange": "not overlapped",
}
SHARED = {0: "start all_reduce", 2: "start reduce_scatter", 3: "start all_gather"}
SEQUENCE_BACKWARD = [
    "start all_gather",
    "mm",
    "wait",
    "start reduce_scatter",
    "mm",
    "wait",
]

by_transport = pytest.mark.parametrize("shared", [True, False], ids=["shared-memory", "gloo"])
by_sequence = pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])


class _Recorder(TorchDispatchMode):
    """Matrix products and collectives, in the order in which they are issued."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "matmul", "transpose16"):
            self.names.append(name)
        elif name == "shm_publish":
            self.names.append(SHARED[args[3]])
        elif name in COLLECTIVES:
            self.names.append(COLLECTIVES[name])
        return func(*args, **(kwargs or {}))


@contextmanager
def _transport(tp, shared):
    """Shared memory, or gloo for the group that has it."""
    channel = shared_memory.channel_of(tp)
    assert not shared or channel is not None
    shared_memory._CHANNELS[tp.process_group] = channel if shared else None
    try:
        yield
    finally:
        shared_memory._CHANNELS[tp.process_group] = channel


@pytest.fixture
def transposes(monkeypatch):
    """Weight gradients by way of a transpose in memory, as on processors with AMX."""
    require("cpu")
    monkeypatch.setattr(linear_function._native, "has_amx", lambda: True)
    monkeypatch.setattr(linear_function, "LEAST_TRANSPOSED", 0)


@on_the_cpu
@pytest.mark.parametrize("tokens", [1, 33, 70])
@pytest.mark.parametrize("main_grad", [False, True], ids=["grad", "main_grad"])
def test_transposing_first_changes_no_gradient(transposes, tokens, main_grad):
    draw = torch.Generator().manual_seed(tokens)
    x, weight, grad = (
        torch.randn(shape, generator=draw).bfloat16()
        for shape in ((tokens, IN), (OUT, IN), (tokens, OUT))
    )
    x.requires_grad_()
    weight.requires_grad_()
    with _Recorder() as recorder:
        y = linear_function.linear(x, weight, accumulate_main_grad=main_grad)
        y.backward(grad)
    assert recorder.names.count("transpose16") == 1
    found = weight.main_grad if main_grad else weight.grad
    expected = grad.double().t() @ x.detach().double()
    # A product of bfloat16 is summed in float32 and rounded once.
    bound = 2**-8 * expected.abs() + 2**-20 * (grad.double().abs().t() @ x.detach().double().abs())
    assert ((found.double() - expected).abs() <= bound).all()
    torch.testing.assert_close(x.grad, grad @ weight.detach())
    assert torch.equal(y, torch.nn.functional.linear(x, weight))


@on_the_cpu
def test_transposing_takes_gradients_that_are_not_contiguous(transposes):
    x = torch.randn(6, IN).bfloat16()
    weight = torch.randn(OUT, IN).bfloat16().requires_grad_()
    grad = torch.randn(OUT, 6).bfloat16().t()
    linear_function.linear(x, weight).backward(grad)
    torch.testing.assert_close(weight.grad, grad.t() @ x)


@on_the_cpu
def test_who_transposes_first(monkeypatch):
    monkeypatch.setattr(linear_function._native, "has_amx", lambda: True)
    large, small = torch.empty(512, 512), torch.empty(511, 512)
    assert linear_function._transposes(large.bfloat16())
    assert not linear_function._transposes(small.bfloat16())
    assert not linear_function._transposes(large)
    assert not linear_function._transposes(large.half())
    monkeypatch.setattr(linear_function._native, "has_amx", lambda: False)
    assert not linear_function._transposes(large.bfloat16())


def _backward(y):
    grad = torch.randn(y.shape, generator=torch.Generator(DEVICE).manual_seed(3)).to(y.dtype)
    with _Recorder() as recorder:
        y.backward(grad)
    return grad, recorder.names


def _x(rows, dtype=torch.float32, width=IN, seed=1):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()


def _column_and_input(tp, sequence, **options):
    torch.manual_seed(0)
    layer = ColumnParallelLinear(IN, OUT, tp=tp, sequence_parallel=sequence, **options)
    seed = tp.rank if sequence else 0
    return layer, _x(T // tp.size if sequence else T, layer.weight.dtype, seed=seed)


# --- overlap --------------------------------------------------------------------------------------


def _check_overlap(tp, shared, sequence):
    with _transport(tp, shared):
        layer, x = _column_and_input(tp, sequence)
        grad, names = _backward(layer(x))
        weight = layer.weight.detach()
        if sequence:
            assert names == SEQUENCE_BACKWARD
            whole, grad_x = all_gather(x.detach(), tp), reduce_scatter(grad @ weight, tp)
        else:
            assert names == ["mm", "start all_reduce", "mm", "wait"]
            whole, grad_x = x.detach(), all_reduce(grad @ weight, tp)
        # One after the other gives the same bits.
        assert torch.equal(x.grad, grad_x)
        assert torch.equal(layer.weight.grad, grad.t() @ whole)
        assert torch.equal(layer.bias.grad, grad.sum(0))


@on_the_cpu
@by_sequence
@by_transport
@pytest.mark.parametrize("size", [2, 4])
def test_collectives_run_beside_products_and_change_no_bit(size, shared, sequence):
    if shared:
        require("cpu")
    run_ranks(_check_overlap, size, shared, sequence)


def _check_trace(tp, shared, sequence):
    with _transport(tp, shared):
        layer, x = _column_and_input(tp, sequence)
        y = layer(x)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            y.backward(torch.ones_like(y))
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name.rsplit("::", 1)[-1])
        for e in trace.events()
        if e.name.startswith(("aten::mm", "_c10d_functional::", "tpcore::shm_"))
    )
    issued = [(start, end, COLLECTIVES.get(name, name)) for start, end, name in spans]
    assert all(first[1] <= second[0] for first, second in pairwise(issued))
    names = [name for _, _, name in issued]
    expected = SEQUENCE_BACKWARD if sequence else ["mm", "start all_reduce", "mm", "wait"]
    if shared:
        expected = ["shm_publish" if name.startswith("start") else name for name in expected]
    assert names == expected


@on_the_cpu
@by_sequence
@by_transport
def test_a_trace_shows_the_product_inside_the_collective(shared, sequence):
    if shared:
        require("cpu")
    run_ranks(_check_trace, 2, shared, sequence)


def _check_compiled(tp, sequence):
    tp = TensorParallelGroup(tp.process_group, tp.rank, tp.size, shared_memory=False)
    layer, x = _column_and_input(tp, sequence)
    y = layer(x)
    y.sum().backward()
    expected, x.grad, layer.weight.grad = (x.grad, layer.weight.grad), None, None
    graphs = []

    def keep(graph, _):
        graphs.append([node.target.__name__ for node in graph.graph.nodes if callable(node.target)])
        return graph

    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=keep)
    torch.compile(layer, backend=backend, fullgraph=True)(x).sum().backward()
    names = [name.split(".")[0] for name in graphs[0]]
    names = [COLLECTIVES.get(n, n) for n in names if n in COLLECTIVES or n == "mm"]
    assert names == (SEQUENCE_BACKWARD if sequence else ["mm", "start all_reduce", "mm", "wait"])
    torch.testing.assert_close((x.grad, layer.weight.grad), expected)


@on_the_cpu
@by_sequence
def test_a_compiled_backward_keeps_the_overlap(sequence):
    run_ranks(_check_compiled, 2, sequence)


def _check_input_gradient_left_to_the_caller(tp):
    layer, x = _column_and_input(tp, False)
    y = column_parallel_linear(x, layer.weight, layer.bias, tp, reduce_input_grad=False)
    grad, names = _backward(y)
    assert names == ["mm", "mm"]
    assert torch.equal(x.grad, grad @ layer.weight.detach())
    assert torch.equal(y, layer(x))


def test_the_sum_of_the_input_gradient_can_be_left_to_the_caller():
    run_ranks(_check_input_gradient_left_to_the_caller, 2)


# --- what needs no gradient -----------------------------------------------------------------------


def _check_frozen(tp):
    layer, x = _column_and_input(tp, False)
    layer.weight.requires_grad_(False)
    y = layer(x)
    assert y.grad_fn.saved_tensors[0] is None, "the input was kept for a frozen weight"
    assert _backward(y)[1] == ["mm", "start all_reduce", "wait"]
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    layer, x = _column_and_input(tp, False)
    y = layer(x.detach())
    assert y.grad_fn.saved_tensors[1] is None, "the weight was kept for an input without gradient"
    assert _backward(y)[1] == ["mm"]


def _check_frozen_sequence_parallel(tp):
    layer, x = _column_and_input(tp, True)
    layer.weight.requires_grad_(False)
    assert _backward(layer(x))[1] == ["mm", "start reduce_scatter", "wait"]
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    layer.bias.requires_grad_(False)
    layer.weight.requires_grad_(True)
    assert _backward(layer(x.detach()))[1] == ["start all_gather", "wait", "mm"]
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad
    layer.bias.requires_grad_(True)
    assert _backward(layer(x.detach()))[1] == [], "a bias alone needs no product, no collective"


@on_the_cpu
def test_what_needs_no_gradient_costs_nothing():
    run_ranks(_check_frozen, 2)
    run_ranks(_check_frozen_sequence_parallel, 2)


def _check_frozen_row(tp, accumulate):
    layer = RowParallelLinear(OUT, IN, tp=tp, accumulate_main_grad=accumulate)
    layer.weight.requires_grad_(False)
    x = _x(T, width=OUT // tp.size)
    assert _backward(layer(x))[1] == ["mm"]
    assert layer.weight.grad is None
    assert not hasattr(layer.weight, "main_grad")
    layer.requires_grad_(False)
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("accumulate", [False, True], ids=["grad", "main_grad"])
def test_a_frozen_row_parallel_weight(accumulate):
    run_ranks(_check_frozen_row, 2, accumulate)


# --- main_grad ------------------------------------------------------------------------------------


def _layer_for_main_grad(tp, kind, sequence, dtype, accumulate):
    torch.manual_seed(0)
    cls = ColumnParallelLinear if kind == "column" else RowParallelLinear
    layer = cls(
        IN,
        OUT,
        tp=tp,
        sequence_parallel=sequence,
        dtype=dtype,
        accumulate_main_grad=accumulate,
    )
    rows = T // tp.size if sequence and kind == "column" else T
    return layer, (rows, IN if kind == "column" else IN // tp.size)


def _check_main_grad(tp, kind, sequence, dtype):
    layer, (rows, width) = _layer_for_main_grad(tp, kind, sequence, dtype, True)
    plain, _ = _layer_for_main_grad(tp, kind, sequence, dtype, False)
    layer.weight.main_grad = torch.full_like(layer.weight, 0.5, dtype=torch.float32)
    expected, address = layer.weight.main_grad.clone(), layer.weight.main_grad.data_ptr()
    for step in range(3):
        x = _x(rows, dtype, width, seed=10 * step + tp.rank)
        own_x = x.detach().clone().requires_grad_()
        plain.zero_grad()
        _backward(plain(x))
        _, names = _backward(layer(own_x))
        assert torch.equal(x.grad, own_x.grad)
        assert layer.weight.grad is None
        # In float32 the product itself adds; otherwise the one addition is fused with the cast.
        assert names.count("addmm_") == (dtype == torch.float32)
        expected += plain.weight.grad
        torch.testing.assert_close(layer.weight.main_grad, expected, rtol=1e-6, atol=1e-5)
    assert layer.weight.main_grad.data_ptr() == address, "main_grad was replaced"
    assert torch.equal(layer.bias.grad.isfinite(), torch.ones_like(layer.bias).bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@by_sequence
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("size", [1, 2])
def test_main_grad_is_added_to_and_grad_stays_none(size, kind, sequence, dtype):
    run_ranks(_check_main_grad, size, kind, sequence, dtype)


def _check_main_grad_under_autocast(tp):
    layer, x = _column_and_input(tp, False, accumulate_main_grad=True)
    plain, _ = _column_and_input(tp, False)
    for module in (layer, plain):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    assert layer.weight.grad is None
    assert layer.weight.main_grad.dtype == torch.float32
    assert torch.equal(layer.weight.main_grad, plain.weight.grad)


def test_main_grad_is_made_when_it_is_missing_also_under_autocast():
    run_ranks(_check_main_grad_under_autocast, 2)


def test_main_grad_when_compiled():
    layer, x = _column_and_input(TensorParallelGroup.single(), False, accumulate_main_grad=True)
    torch.compile(layer, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, x.detach().sum(0).expand(OUT, IN))
    assert layer.weight.grad is None


def test_main_grad_of_a_computed_weight_is_refused():
    layer = ColumnParallelLinear(
        IN, OUT, tp=TensorParallelGroup.single(), accumulate_main_grad=True
    )
    torch.nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="computed from others"):
        layer(torch.ones(2, IN))


def test_main_grad_of_float64_is_float64():
    single = TensorParallelGroup.single()
    layer = ColumnParallelLinear(4, 4, tp=single, dtype=torch.float64, accumulate_main_grad=True)
    layer(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    assert layer.weight.main_grad.dtype == torch.float64


def _check_block_main_grad(tp, checkpointing):
    results = []
    for accumulate in (False, True):
        torch.manual_seed(0)
        block = TransformerBlock(
            16,
            4,
            32,
            tp=tp,
            layer_number=0,
            num_layers=1,
            accumulate_main_grad=accumulate,
            activation_checkpointing=checkpointing,
        )
        block(_x(T, width=16), PackedSequences.from_lengths([3, 5])).sum().backward()
        results.append(dict(block.named_parameters()))
    plain, ours = results
    for name, parameter in ours.items():
        if name.endswith("weight") and "norm" not in name:
            assert parameter.grad is None, name
            torch.testing.assert_close(parameter.main_grad, plain[name].grad)
        else:
            assert torch.equal(parameter.grad, plain[name].grad), name


@pytest.mark.parametrize("checkpointing", [None, "full"])
def test_main_grad_of_a_block(checkpointing):
    run_ranks(_check_block_main_grad, 2, checkpointing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_main_grad_on_cuda_is_summed_inside_the_product(dtype):
    a = torch.randn(OUT, T, device="cuda").to(dtype)
    b = torch.randn(T, IN, device="cuda").to(dtype)
    total = torch.ones(OUT, IN, device="cuda")
    with _Recorder() as recorder:
        linear_function._add_product(total, a, b)
    assert recorder.names == ["addmm"]
    torch.testing.assert_close(total, 1 + a.float() @ b.float(), rtol=1e-5, atol=1e-5)
