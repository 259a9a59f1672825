"""What is particular to the Triton kernels; test_triton.py starts these tests."""

from __future__ import annotations

import mmap

import pytest
import torch

from tests.kernels import test_cross_entropy as ce
from tests.kernels import test_layer_norm as ln
from tests.kernels import test_masked_softmax as sm
from tests.kernels.harness import DEVICE, compare, gradients, leaves, run
from tpcore._native import NATIVE_OPS, RAW_OPS
from tpcore._philox import philox_keep_mask
from tpcore.kernels import (
    add_layer_norm,
    bias_dropout_residual,
    bias_gelu,
    explain,
    layer_norm,
    masked_softmax,
    record_backends,
    use_backend,
)
from tpcore.kernels.triton import _MODULES, refusal

if refusal(DEVICE):
    pytest.skip(f"triton {refusal(DEVICE)}", allow_module_level=True)

OPS = torch.ops.tpcore_triton
INFINITY = float("inf")
SEED = torch.tensor([-0x1234_5678_9ABC_DEF])
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _row_ids(*shape):
    return (torch.arange(torch.Size(shape).numel()) * 0x1_0000_3001 - 7).reshape(shape)


# Attention on a GPU goes by matrix products and masked_softmax, dropout without stored bits, and
# products take transposes as they are.
ON_THE_CPU_ONLY = {
    "packed_attention_forward",
    "packed_attention_backward",
    "bias_dropout_residual_cpu_forward",
    "bias_dropout_residual_cpu_backward",
    "transpose16",
}


def test_every_op_is_here():
    assert set(_MODULES) == set(RAW_OPS) - {"dropout_keep_mask"} - ON_THE_CPU_ONLY


def test_who_is_chosen():
    with use_backend("triton"):
        served = {row.op: row.serves for row in explain() if row.device == DEVICE}
    assert served.pop("packed_attention") == "none"
    assert set(served.values()) == {"triton"}
    with record_backends() as calls:
        layer_norm(torch.randn(2, 8))
        layer_norm(torch.randn(2, 8, dtype=torch.float64))
    compiled = NATIVE_OPS.get(DEVICE, ())
    if DEVICE == "cuda" and not compiled:
        assert calls == [("layer_norm", "triton"), ("layer_norm", "reference")]
    elif DEVICE == "cpu":
        assert "triton" not in dict(calls).values()  # the interpreter only if it is asked for


# --- Dropout bits


@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize("column_offset", [0, 1, 2, 3, 4, 4095])
@pytest.mark.parametrize("columns", [1, 6, 1500])
def test_bits_of_rows(p, column_offset, columns):
    row_ids = _row_ids(5)
    keep = philox_keep_mask(SEED, row_ids[None], p, 77, columns, column_offset, 0, 1)[0, 0]
    x = torch.ones(5, columns, requires_grad=True)
    key = {"p": p, "seed": SEED, "stream": 77, "row_ids": row_ids, "column_offset": column_offset}
    y = run("bias_dropout_residual", "triton", bias_dropout_residual, x, **key)
    y.sum().backward()
    assert torch.equal(y != 0, keep)
    assert torch.equal(x.grad != 0, keep)


@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize("keys", [1, 37, 128, 16400])
def test_bits_of_heads(p, keys):
    row_ids = _row_ids(2, 3)
    keep = philox_keep_mask(SEED, row_ids, p, 65535, keys, 0, 40000, 2)
    scores = torch.zeros(2, 2, 3, keys, requires_grad=True)
    key = {"dropout_p": p, "seed": SEED, "stream": 65535, "row_ids": row_ids, "head_offset": 40000}
    y = run("masked_softmax", "triton", masked_softmax, scores, **key)
    assert torch.equal(y != 0, keep)
    # All probabilities are 1 / keys.
    y.backward(torch.arange(1.0, keys + 1).expand_as(y))
    share = torch.arange(1.0, keys + 1) * keep / (1 - p) / keys
    expected = (share - share.sum(-1, keepdim=True) / keys).to(torch.float32)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-3, atol=1e-4)


# --- Rows that no tile holds


@by_dtype
@pytest.mark.parametrize("columns", [8193, 16385, 33000])
def test_long_rows_of_layer_norm(dtype, columns):
    compare(
        lambda *a: run("layer_norm", "triton", layer_norm, *a),
        ln._plain,
        ln._inputs((2, columns), (dtype, torch.float32)),
    )


def test_long_rows_keep_a_small_variance():
    x = torch.randn(2, 40000) + 1e4
    exact = torch.nn.functional.layer_norm(x.double(), (40000,))
    assert (run("layer_norm", "triton", layer_norm, x) - exact).abs().max() < 1e-3
    y, total = run("add_layer_norm", "triton", add_layer_norm, x / 2, x / 2)
    assert torch.equal(total, x)
    assert (y - exact).abs().max() < 1e-3


@by_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_long_rows_of_masked_softmax(dtype, causal):
    mask = torch.rand(1, 1, 1, 35000) < 0.5
    mask[..., :17000] = True  # the first block holds nothing
    mask[..., 17000] = False
    compare(
        lambda s: run("masked_softmax", "triton", masked_softmax, s, mask, 0.5, causal),
        lambda s: sm._plain(s, mask, 0.5, causal),
        ((torch.randn(1, 2, 2, 35000) * 4).to(dtype),),
    )


def test_long_rows_without_a_key_or_without_a_finite_one():
    scores = torch.randn(1, 1, 3, 20000)
    scores[0, 0, 1] = -INFINITY
    mask = torch.zeros(1, 1, 3, 20000, dtype=torch.bool)
    mask[0, 0, 0] = True
    y = run("masked_softmax", "triton", masked_softmax, scores, mask)[0, 0]
    assert not y[0].any()
    assert y[1].isnan().all()
    torch.testing.assert_close(y[2], torch.softmax(scores[0, 0, 2], -1))


# --- Many rows: tiles that are not full, and several groups of partial sums


@pytest.mark.parametrize("shape", [(1000, 8), (37, 1100)], ids=str)
def test_column_sums(shape):
    dtype = torch.bfloat16
    x, weight, bias = leaves(*ln._inputs(shape, (dtype, torch.float32)))
    key = {"p": 0.5, "seed": SEED, "row_ids": _row_ids(shape[0])}
    for op, function in (
        ("layer_norm", lambda: layer_norm(x, weight, bias)),
        ("bias_gelu", lambda: bias_gelu(x, bias)),
        ("bias_dropout_residual", lambda: bias_dropout_residual(x, bias, **key)),
    ):
        inputs = (x, weight, bias) if op == "layer_norm" else (x, bias)
        grad = torch.randn(shape).to(dtype)
        first, again, plain = (
            gradients(run(op, backend, function), inputs, grad)
            for backend in ("triton", "triton", "reference")
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        torch.testing.assert_close(first[1:], plain[1:], rtol=1e-4, atol=1e-3)


def test_tiles_of_ignored_rows():
    logits = torch.full((300, 5), float("nan"))
    logits[7] = torch.randn(5)
    target = torch.full((300,), -100)
    target[7] = 3
    four = OPS.cross_entropy_statistics(logits, target, 0, 5, -100)
    ignored = torch.arange(300) != 7
    for statistic, neutral in zip(four, (0.0, 1.0, 0.0, 0.0), strict=True):
        assert torch.equal(statistic[ignored], torch.full((299,), neutral))
    loss = torch.log(four[1][7]) + four[0][7] - four[2][7]
    torch.testing.assert_close(loss, ce._plain(logits[7:8], target[7:8])[0])


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU such a tensor takes memory")
def test_offsets_beyond_31_bits():
    """Three rows so far apart that their offsets do not fit, in memory that is never touched."""
    stride = 2**30 + 24
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # has a name from Python 3.13 on
    memory = mmap.mmap(-1, 2 * (2 * stride + 64), flags=mmap.MAP_PRIVATE | no_reserve)
    x = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, 40), (stride, 1))
    x.copy_(torch.randn(3, 40))
    dense, target = x.clone(), torch.tensor([1, 39, 2])
    for function in (
        lambda x: OPS.layer_norm_forward(x, None, None, 1e-5)[0],
        lambda x: OPS.bias_gelu_forward(x, None, "none"),
        lambda x: OPS.bias_dropout_residual_forward(x, None, x, 0.0, None, 0, None, 0),
        lambda x: OPS.masked_softmax_forward(x[None, None], None, 1.0, True, 0.0, *[None, 0] * 2)[
            0
        ],
        lambda x: OPS.cross_entropy_statistics(x, target, 0, 40, -100)[1],
    ):
        assert torch.equal(function(x), function(dense))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_more_than_two_to_the_31_elements():
    rows = 2**21 + 3
    if torch.cuda.mem_get_info()[0] < 3 * 2 * 1024 * rows:
        pytest.skip("needs 13 GB of GPU memory")
    x = torch.randn(1, 1024).to(torch.bfloat16).expand(rows, 1024)
    y = run("layer_norm", "triton", layer_norm, x)
    assert torch.equal(y[-3:], run("layer_norm", "triton", layer_norm, x[:1]).expand(3, 1024))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_captured_graph_draws_fresh_bits():
    x, row_ids, seed = torch.ones(64, 256), _row_ids(64), SEED.clone()

    def step():
        return OPS.bias_dropout_residual_forward(x, None, None, 0.5, seed, 0, row_ids, 0)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(2):
        seed += 1
        graph.replay()
        assert torch.equal(
            y != 0, philox_keep_mask(seed, row_ids[None], 0.5, 0, 256, 0, 0, 1)[0, 0]
        )


# --- The raw ops


def _raw_calls():
    """Every raw op with arguments that make use of strides and of what is optional."""
    x, wide = torch.randn(6, 19), torch.randn(6, 40)[:, 4:23]
    w, rows, seed = torch.randn(19), _row_ids(6), (SEED, 7)
    scores, some = torch.randn(2, 3, 4, 9), torch.randn(2, 4, 3, 12)[..., 2:11].transpose(1, 2)
    mask, heads = torch.rand(2, 1, 1, 9) < 0.4, (*seed, _row_ids(2, 4), 5)
    target, per_row = torch.tensor([3, 25, -100, 12, 10, 0]), torch.rand(6) + 1
    yes = True
    return {
        "layer_norm_forward": [(x, w, w, 1e-5), (wide, None, None, 1e-5)],
        "add_layer_norm_forward": [(x, wide, w, None, 1e-5)],
        "layer_norm_backward": [
            (x, wide, per_row, per_row, w, wide, yes, yes, yes),
            (wide, x, per_row, per_row, None, None, yes, False, False),
        ],
        "bias_gelu_forward": [(wide, w, "tanh"), (x, None, "none")],
        "bias_gelu_backward": [(x, wide, w, "none", yes, yes), (x, x, None, "none", yes, False)],
        "masked_softmax_forward": [
            (some, mask, 0.5, True, 0.3, *heads),
            (scores, None, 0.5, False, 0.0, None, 0, None, 0),
        ],
        "masked_softmax_backward": [
            (some, scores, 0.5, 0.3, *heads),
            (some, scores, 0.5, 0.0, None, 0, None, 0),
        ],
        "bias_dropout_residual_forward": [
            (x, w, wide, 0.3, *seed, rows, 5),
            (wide, None, x, 0.0, None, 0, None, 0),
        ],
        "bias_dropout_residual_backward": [
            (wide, 0.3, *seed, rows, 5, yes, yes),
            (x, 0.0, None, 0, None, 0, False, yes),
        ],
        "cross_entropy_statistics": [(wide, target, 10, 26, -100)],
        "cross_entropy_backward": [
            (per_row, wide, target, per_row, per_row, 10, 26, -100, 0.1),
        ],
    }


@pytest.mark.parametrize("op", _MODULES)
def test_opcheck(op):
    for arguments in _raw_calls()[op]:
        torch.library.opcheck(getattr(OPS, op), arguments)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs the compiled CPU kernels")
@pytest.mark.parametrize("op", _MODULES)
def test_agrees_with_the_compiled_kernels(op):
    if op not in NATIVE_OPS.get("cpu", ()):
        pytest.skip(f"no compiled {op}")
    for arguments in _raw_calls()[op]:
        if op == "masked_softmax_backward" and arguments[3] > 0:
            continue  # the CPU's reads what is dropped from the signs that its forward sets
        ours, theirs = (getattr(ops, op)(*arguments) for ops in (OPS, torch.ops.tpcore))
        if op == "masked_softmax_forward":
            theirs = theirs[0], theirs[1].abs()
        if op == "cross_entropy_statistics":  # what is said of an ignored row is of no account
            ours, theirs = ([s[[0, 1, 3, 4, 5]] for s in four] for four in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6, equal_nan=True)


def test_frozen_inputs_cost_nothing():
    x, per_row, w, key = torch.randn(40, 8), torch.rand(40), torch.rand(8), (0.5, SEED, 0)
    for need_x, need_weight, need_bias in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        needs = [bool(need_x), bool(need_weight), bool(need_bias)]
        grads = OPS.layer_norm_backward(x, x, per_row, per_row, w, None, *needs)
        assert [g.numel() > 0 for g in grads] == needs
        for grads in (
            OPS.bias_gelu_backward(x, x, w, "none", *needs[:2]),
            OPS.bias_dropout_residual_backward(x, *key, _row_ids(40), 0, *needs[:2]),
        ):
            assert [g.numel() > 0 for g in grads] == needs[:2]


def test_raw_ops_refuse_to_lose_a_gradient():
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"tpcore_triton\.bias_gelu_forward is a raw kernel"):
        OPS.bias_gelu_forward(x, None, "none")
