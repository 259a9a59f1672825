from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.harness import (
    DEVICE,
    assert_grad_not_modified,
    assert_same_bits_for_any_threads,
    by_backends,
    by_dtype,
    compare,
    compiled,
    leaves,
    require,
    run,
)
from tpcore._philox import philox_keep_mask
from tpcore.kernels import bias_dropout_residual, record_backends, use_backend

by_backend = by_backends("reference", "cpu")
OP, OPS = "bias_dropout_residual", torch.ops.tpcore
SEED = torch.tensor([0x1234_5678_9ABC_DEF])


def _row_ids(*shape):
    return (torch.arange(torch.Size(shape).numel()) * 0x1_0000_3001).reshape(shape)


def _plain(x, bias, residual, p, row_ids, stream=0, column_offset=0):
    y = x if bias is None else x + bias.to(x.dtype)
    if p > 0:
        keep = philox_keep_mask(
            SEED, row_ids.reshape(1, -1), p, stream, x.shape[-1], column_offset, 0, 1
        )
        y = torch.where(keep.view(x.shape), y / (1 - p), 0.0)
    return y if residual is None else y + residual


def _inputs(shape, dtypes=(torch.float64, torch.float64)):
    x, residual = torch.randn(shape).to(dtypes[0]), torch.randn(shape).to(dtypes[0])
    return x, torch.randn(shape[-1:]).to(dtypes[1]), residual


@by_backend
@by_dtype
@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (2, 3, 34), (70, 384)], ids=str)
def test_accuracy(backend, dtypes, p, shape):
    row_ids = _row_ids(*shape[:-1])
    compare(
        lambda *a: run(OP, backend, bias_dropout_residual, *a, p=p, seed=SEED, row_ids=row_ids),
        lambda *a: _plain(*a, p, row_ids),
        _inputs(shape, dtypes),
    )


@by_backend
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_and_optional_arguments(backend, bias, residual, p):
    require(backend)
    x, b, r = leaves(*_inputs((6, 7)))
    inputs = (x, b if bias else None, r if residual else None)
    row_ids = _row_ids(6)

    def function(*a):
        return bias_dropout_residual(*a, p=p, seed=SEED, stream=3, row_ids=row_ids)

    with use_backend(backend), record_backends() as calls:
        assert torch.autograd.gradcheck(function, inputs)
        torch.testing.assert_close(function(*inputs), _plain(*inputs, p, row_ids, stream=3))
    assert set(calls) == {(OP, backend)} or (p == 0 and not bias and not residual)


@by_backend
@pytest.mark.parametrize("column_offset", [0, 1, 2, 3, 4, 130])
def test_a_shard_of_the_columns_draws_the_same_bits(backend, column_offset):
    x, bias, residual = _inputs((9, 300), (torch.float32, torch.float32))
    row_ids = _row_ids(9)
    key = {"p": 0.4, "seed": SEED, "stream": 77}
    whole = run(OP, backend, bias_dropout_residual, x, bias, residual, row_ids=row_ids, **key)
    part = slice(column_offset, column_offset + 151)
    shard = run(
        OP,
        backend,
        bias_dropout_residual,
        x[:, part],
        bias[part],
        residual[:, part],
        row_ids=row_ids,
        column_offset=column_offset,
        **key,
    )
    assert torch.equal(shard, whole[:, part])
    rows = torch.tensor([8, 2, 5])
    some = run(
        OP,
        backend,
        bias_dropout_residual,
        x[rows],
        bias,
        residual[rows],
        row_ids=row_ids[rows],
        **key,
    )
    assert torch.equal(some, whole[rows])


@by_backend
def test_keys_are_independent(backend):
    x = torch.ones(64, 256)
    base = {"p": 0.5, "seed": SEED, "stream": 1, "row_ids": _row_ids(64)}
    dropped = [
        run(OP, backend, bias_dropout_residual, x, **{**base, **change}) == 0
        for change in (
            {},
            {"stream": 2},
            {"seed": SEED + 1},
            {"seed": SEED + (1 << 40)},
            {"row_ids": _row_ids(64) + 1},
            {"row_ids": _row_ids(64) + (1 << 50)},
        )
    ]
    for i, a in enumerate(dropped):
        assert abs(a.float().mean() - 0.5) < 0.02
        for b in dropped[:i]:
            assert abs((a == b).float().mean() - 0.5) < 0.02


@by_backend
def test_dropped_elements_are_zero_whatever_they_were(backend):
    x = torch.full((4, 100), float("nan"))
    row_ids = _row_ids(4)
    y = run(OP, backend, bias_dropout_residual, x, p=0.5, seed=SEED, row_ids=row_ids)
    keep = philox_keep_mask(SEED, row_ids[None], 0.5, 0, 100, 0, 0, 1)[0, 0]
    assert torch.equal(y.isnan(), keep)
    assert not y[~keep].any()


@by_backend
def test_strides_and_empty(backend):
    wide = torch.randn(40, 75)
    bias = torch.randn(37)
    for x in (wide[:, 5:42], wide[::3, 1:38], wide[:1, :37].expand(9, 37), wide[:37, :37].t()):
        key = {"p": 0.2, "seed": SEED, "row_ids": _row_ids(x.shape[0])}
        ours = run(OP, backend, bias_dropout_residual, x, bias, x, **key)
        dense = x.contiguous()
        assert torch.equal(ours, run(OP, backend, bias_dropout_residual, dense, bias, dense, **key))
    x, bias = leaves(torch.randn(0, 37), bias)
    key = {"p": 0.2, "seed": SEED, "row_ids": _row_ids(0)}
    run(OP, backend, bias_dropout_residual, x, bias, x.detach(), **key).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(37))


@by_backend
def test_mixed_residual_dtype_is_promoted(backend):
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn(4, 8, requires_grad=True)
    y = run(OP, backend, bias_dropout_residual, x, None, residual)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert residual.grad.dtype == torch.float32


@by_backend
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_output_is_not_modified(backend, p):
    key = {"p": p, "seed": SEED, "row_ids": _row_ids(6)}
    function = lambda *a: run(OP, backend, bias_dropout_residual, *a, **key)  # noqa: E731
    assert_grad_not_modified(function, *_inputs((6, 33), (torch.float32, torch.float32)))


@by_backend
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_to_one_graph(backend, p):
    require(backend)

    def function(x, bias, residual, row_ids):
        return bias_dropout_residual(x, bias, residual, p=p, seed=SEED, row_ids=row_ids)

    graph = compiled(function)
    with use_backend(backend):
        for rows in (6, 11):
            inputs = leaves(*_inputs((rows, 24), (torch.float32, torch.float32)))
            row_ids = _row_ids(rows)
            ours, plain = graph(*inputs, row_ids), function(*inputs, row_ids)
            torch.testing.assert_close(ours, plain)
            grad = torch.randn_like(plain)
            mine, theirs = (torch.autograd.grad(y, inputs, grad) for y in (ours, plain))
            torch.testing.assert_close(mine, theirs)


@by_backend
def test_autocast_changes_nothing(backend):
    x, bias, residual = _inputs((5, 16), (torch.bfloat16, torch.float32))
    outside = run(OP, backend, bias_dropout_residual, x, bias, residual)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = run(OP, backend, bias_dropout_residual, x, bias, residual)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, outside)


def test_frozen_inputs_cost_nothing():
    require(DEVICE)
    for needs in ((True, False), (False, True)):
        x = torch.randn(40, 8)
        if DEVICE == "cpu":
            grads = OPS.bias_dropout_residual_cpu_backward(x, x[:, :1].byte(), 0.5, *needs)
        else:
            grads = OPS.bias_dropout_residual_backward(x, 0.5, SEED, 0, _row_ids(40), 0, *needs)
        assert [g.numel() > 0 for g in grads] == list(needs)


@pytest.mark.parametrize("columns", [1, 8, 17, 64, 127, 1000])
@pytest.mark.parametrize("offset", [0, 4, 5, 1023])
def test_saved_bits_are_the_mask(columns, offset):
    require("cpu")
    row_ids = _row_ids(5)
    x = torch.randn(5, columns)
    _, saved = torch.ops.tpcore.bias_dropout_residual_cpu_forward(
        x, None, None, 0.3, SEED, 9, row_ids, offset
    )
    keep = philox_keep_mask(SEED, row_ids[None], 0.3, 9, columns, offset, 0, 1)[0, 0]
    bits = saved[..., None] >> torch.arange(8) & 1
    assert saved.shape == (5, -(-columns // 8))
    assert torch.equal(bits.flatten(1)[:, :columns].bool(), keep)
    grad, _ = torch.ops.tpcore.bias_dropout_residual_cpu_backward(x, saved, 0.3, True, False)
    assert torch.equal(grad, torch.where(keep, x * torch.tensor(1 / 0.7), 0.0))


@by_backend
def test_a_checkpointed_layer_draws_the_same_bits(backend):
    inputs = _inputs((9, 70), (torch.float32, torch.float32))
    key = {"p": 0.3, "seed": SEED, "row_ids": _row_ids(9)}
    results = []
    for again in (False, True):
        arguments = leaves(*inputs)

        def function(*a):
            return run(OP, backend, bias_dropout_residual, *a, **key) ** 2

        y = checkpoint(function, *arguments, use_reentrant=False) if again else function(*arguments)
        results.append([y, *torch.autograd.grad(y.sum(), arguments)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bits_do_not_depend_on_threads():
    require("cpu")
    inputs = _inputs((333, 200), (torch.float32, torch.float32))
    key = {"p": 0.1, "seed": SEED, "row_ids": _row_ids(333)}
    assert_same_bits_for_any_threads(
        lambda *a: run(OP, "cpu", bias_dropout_residual, *a, **key), *inputs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_opcheck(dtype, rows):
    require(DEVICE)
    x, bias, residual = _inputs((rows, 19), (dtype, torch.float32))
    strided = torch.randn(rows, 40)[:, 4:23].to(dtype)
    key = (0.3, SEED, 7, _row_ids(rows), 5)
    no_key = (0.0, None, 0, None, 0)
    cpu = DEVICE == "cpu"
    forward = OPS.bias_dropout_residual_cpu_forward if cpu else OPS.bias_dropout_residual_forward
    torch.library.opcheck(forward, (x, bias, residual, *key))
    torch.library.opcheck(forward, (strided, None, None, *key))
    torch.library.opcheck(forward, (x, bias, strided, *no_key))
    if cpu:
        backward = OPS.bias_dropout_residual_cpu_backward
        bits, no_bits = (forward(x, bias, None, *k)[1] for k in (key, no_key))
        torch.library.opcheck(backward, (strided, bits, 0.3, True, True))
        torch.library.opcheck(backward, (x, no_bits, 0.0, False, True))
    else:
        backward = OPS.bias_dropout_residual_backward
        torch.library.opcheck(backward, (strided, *key, True, True))
        torch.library.opcheck(backward, (x, *no_key, False, True))


def test_errors_name_the_argument():
    x = torch.randn(3, 4)
    good = {"p": 0.1, "seed": SEED, "row_ids": _row_ids(3)}
    for change, message in (
        ({"p": 1.0}, r"probability is 1\.0; expected 0 <= p < 1"),
        ({"seed": None}, "needs a key, but seed is None"),
        ({"row_ids": None}, "needs a key, but row_ids is None"),
        ({"seed": torch.tensor([1.0])}, r"seed is torch\.float32"),
        ({"row_ids": _row_ids(3).int()}, r"row_ids is torch\.int32; expected int64"),
        ({"row_ids": _row_ids(4)}, r"row_ids has shape \(4,\); expected \(3,\)"),
        ({"stream": 65536}, r"stream=65536 is outside"),
        ({"residual": torch.randn(3, 5)}, r"residual has shape \(3, 5\)"),
        ({"bias": torch.randn(3)}, r"bias has shape \(3,\); expected \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            bias_dropout_residual(x, **{**good, **change})
