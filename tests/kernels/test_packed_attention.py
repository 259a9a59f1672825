from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.harness import (
    DEVICE,
    assert_grad_not_modified,
    assert_same_bits_for_any_threads,
    by_backends,
    compare,
    compiled,
    leaves,
    require,
    run,
)
from tpcore import _native
from tpcore._native import attention_dropout_keep_mask, dropout_keep_mask
from tpcore.kernels import masked_softmax, packed_attention, record_backends, use_backend

# On other devices attention goes by matrix products and masked_softmax.
by_backend = by_backends("reference", *(["cpu"] if DEVICE == "cpu" else []))
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
by_p = pytest.mark.parametrize("p", [0.0, 0.3], ids=["no-dropout", "dropout"])
by_causal = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
OP = "packed_attention"
SEED = torch.tensor([987654321987654321])
HEADS = 3
MIXED = (1, 17, 300, 2, 16, 47, 48, 49, 33, 1, 128, 97, 5)
INFINITY = float("inf")


def _cu_seqlens(lengths):
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


def _row_ids(lengths):
    return torch.arange(sum(lengths)) * 0x3_0000_0007


def _qkv(lengths, d, dtype=torch.float32, heads=HEADS):
    return (torch.randn(sum(lengths), heads, 3, d) * 1.5).to(dtype)


def _key(lengths, p, head_offset=0):
    key = {"dropout_p": p, "seed": SEED, "stream": 5, "head_offset": head_offset}
    return {**key, "row_ids": _row_ids(lengths)} if p > 0 else {}


def _ours(backend, lengths, p=0.0, causal=False, head_offset=0, **kwargs):
    arguments = {"causal": causal, **_key(lengths, p, head_offset), **kwargs}
    return lambda qkv: run(OP, backend, packed_attention, qkv, _cu_seqlens(lengths), **arguments)


def _plain(lengths, p=0.0, causal=False, head_offset=0):
    """PyTorch's own attention of one sequence after the other, in the dtype of qkv."""

    def attention(qkv):
        outputs = []
        ids = _row_ids(lengths).split(lengths)
        for own, own_ids in zip(qkv.split(lengths), ids, strict=True):
            q, k, v = own.permute(2, 1, 0, 3)
            s, n = len(own), len(q)
            if p == 0:
                y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]
            else:
                scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
                if causal:
                    future = torch.ones(s, s, dtype=torch.bool).triu(1)
                    scores = scores.masked_fill(future, -INFINITY)
                keep = attention_dropout_keep_mask(
                    p, SEED, 5, own_ids[None], n, s, head_offset=head_offset
                )[0]
                y = torch.where(keep, scores.softmax(-1) / (1 - p), 0.0) @ v
            outputs.append(y.transpose(0, 1))
        return torch.cat(outputs)

    return attention


@by_backend
@by_dtype
@by_p
@by_causal
@pytest.mark.parametrize("d", [32, 64])
def test_accuracy_for_mixed_lengths(backend, dtype, p, causal, d):
    compare(
        _ours(backend, MIXED, p, causal, 6),
        _plain(MIXED, p, causal, 6),
        (_qkv(MIXED, d, dtype),),
    )


@by_backend
@by_dtype
@pytest.mark.parametrize("d", [1, 3, 8, 15, 16, 17, 33, 72, 100, 128])
def test_accuracy_for_any_head_size(backend, dtype, d):
    lengths = (3, 61, 1, 30)
    qkv = _qkv(lengths, d, dtype, heads=2)
    compare(_ours(backend, lengths, 0.3, True), _plain(lengths, 0.3, True), (qkv,))


@pytest.mark.parametrize("start", range(1, 300, 50))
def test_every_length(start):
    require("cpu")
    for length in range(start, min(start + 50, 301)):
        lengths = (length,)
        for causal in (False, True):
            (qkv,) = leaves(_qkv(lengths, 8, heads=1))
            grad = torch.randn(length, 1, 8)
            y = _ours("cpu", lengths, 0.1, causal)(qkv)
            exact = _ours("reference", lengths, 0.1, causal)(qkv)
            torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
            grads = (torch.autograd.grad(out, qkv, grad)[0] for out in (y, exact))
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@by_backend
@by_p
@by_causal
def test_gradcheck(backend, p, causal):
    require(backend)
    lengths = (4, 1, 6)
    (qkv,) = leaves(_qkv(lengths, 5, torch.float64, heads=2))
    function = lambda x: packed_attention(  # noqa: E731
        x, _cu_seqlens(lengths), 0.7, causal, **_key(lengths, p)
    )
    with use_backend(backend), record_backends() as calls:
        assert torch.autograd.gradcheck(function, (qkv,))
    assert set(calls) == {(OP, backend)}


@by_backend
@by_causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_bits_are_those_of_the_generator(backend, dtype, causal):
    # With equal scores and the identity as values, the context is the dropped probabilities.
    lengths, p, d = (128, 1, 50, 33, 31), 0.4, 128
    starts = _cu_seqlens(lengths).tolist()
    qkv = torch.zeros(sum(lengths), HEADS, 3, d, dtype=dtype)
    for start, n in zip(starts, lengths, strict=False):
        qkv[start : start + n, :, 2, :n] = torch.eye(n)[:, None]
    y = _ours(backend, lengths, p, causal, 40)(qkv)
    for start, n in zip(starts, lengths, strict=False):
        for head in range(HEADS):
            ids = _row_ids(lengths)[start : start + n]
            keep = dropout_keep_mask(p, SEED, 5, ids, n, head=40 + head)
            if causal:
                keep = keep.tril()
            assert torch.equal(y[start : start + n, head, :n] != 0, keep)


@by_backend
@by_causal
def test_equals_the_products_around_masked_softmax(backend, causal):
    lengths, p = (200, 200), 0.2
    qkv, key = _qkv(lengths, 16), _key(lengths, p, 2)
    q, k, v = qkv.view(2, 200, HEADS, 3, 16).permute(3, 0, 2, 1, 4)
    key["row_ids"] = key["row_ids"].view(2, 200)
    probs = masked_softmax(q @ k.transpose(2, 3), None, 0.3, causal, **key)
    expected = (probs @ v).transpose(1, 2).reshape(400, HEADS, 16)
    y = _ours(backend, lengths, p, causal, 2, scale=0.3)(qkv)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@by_backend
def test_order_company_and_shards_change_nothing(backend):
    lengths, p = (60, 7, 33), 0.3
    qkv, ids = _qkv(lengths, 32, heads=8), _row_ids(lengths)
    whole = _ours(backend, lengths, p)(qkv)
    shard = _ours(backend, lengths, p, head_offset=3)(qkv[:, 3:6])
    torch.testing.assert_close(shard, whole[:, 3:6], rtol=0, atol=0)
    parts, own_ids = qkv.split(lengths), ids.split(lengths)
    key = {**_key(lengths, p), "row_ids": torch.cat([own_ids[2], own_ids[0]])}
    pair = run(
        OP, backend, packed_attention, torch.cat([parts[2], parts[0]]), _cu_seqlens((33, 60)), **key
    )
    torch.testing.assert_close(pair, torch.cat([whole[67:], whole[:60]]), rtol=0, atol=0)


@by_backend
@by_causal
def test_one_token_attends_to_itself(backend, causal):
    qkv = _qkv((1, 1, 1), 20)
    assert torch.equal(_ours(backend, (1, 1, 1), causal=causal)(qkv), qkv[:, :, 2])


@by_backend
def test_empty_sequences_and_no_tokens(backend):
    qkv = _qkv((5, 4), 16)
    with_gaps = run(OP, backend, packed_attention, qkv, torch.tensor([0, 0, 5, 5, 9, 9]).int())
    torch.testing.assert_close(with_gaps, _ours(backend, (5, 4))(qkv), rtol=0, atol=0)
    for ends in ([0], [0, 0]):
        (nothing,) = leaves(_qkv((), 16))
        y = run(OP, backend, packed_attention, nothing, torch.tensor(ends).int())
        assert y.shape == (0, HEADS, 16)
        y.sum().backward()
        assert nothing.grad.shape == nothing.shape


@by_backend
def test_strides(backend):
    lengths = (40, 9)
    wide = _qkv(lengths, 24, heads=8)
    ours = _ours(backend, lengths, 0.2)
    views = [wide[:, :HEADS], wide[..., 3:17], wide[:, ::2], wide[:1].expand(wide.shape)]
    views += [wide.transpose(1, 3).contiguous().transpose(1, 3)]
    for view in views:
        torch.testing.assert_close(ours(view), ours(view.contiguous()), rtol=0, atol=1e-5)


@by_backend
def test_nan_and_infinity_stay_where_they_are(backend):
    lengths = (60, 70)
    qkv = _qkv(lengths, 16)
    qkv[3, 0, 0] = float("nan")  # a query: its own context
    qkv[20, 1, 1] = float("nan")  # a key: all of its sequence
    qkv[30, 2, 2, 5] = INFINITY  # a value: its column
    (qkv,) = leaves(qkv)
    y = _ours(backend, lengths)(qkv)
    bad = ~y.isfinite()
    expected = torch.zeros_like(bad)
    expected[3, 0] = True
    expected[:60, 1] = True
    expected[:60, 2, 5] = True
    assert torch.equal(bad, expected)
    assert y[:60, 2, 5].isposinf().all()
    (grad,) = torch.autograd.grad(y, qkv, torch.ones_like(y))
    assert grad[60:].isfinite().all()
    assert grad[:60, 1].isnan().any()


@by_backend
def test_large_scores_do_not_overflow(backend):
    qkv = torch.tensor([[1024.0, 1024, 1], [1024.0, 1023, 2]]).view(2, 1, 3, 1)
    y = run(OP, backend, packed_attention, qkv, _cu_seqlens((2,)), 2.0**-10)
    weights = torch.tensor([1024.0, 1023]).softmax(0)
    torch.testing.assert_close(y.flatten(), (weights @ torch.tensor([1.0, 2.0])).expand(2))


@by_backend
@by_p
def test_grad_output_is_not_modified(backend, p):
    assert_grad_not_modified(_ours(backend, (9, 4), p), _qkv((9, 4), 8))


def test_without_requires_grad_there_is_no_graph():
    require("cpu")
    y = _ours("cpu", (9, 4))(_qkv((9, 4), 8))
    assert not y.requires_grad
    with pytest.raises(RuntimeError, match="raw kernel without a gradient"):
        torch.ops.tpcore.packed_attention_forward(
            *leaves(torch.randn(4, 24)), _cu_seqlens((4,)), 1, 1.0, False, 0.0, None, 0, None, 0
        )


@by_p
def test_compiles_to_one_graph(p):
    require("cpu")

    def function(qkv, cu_seqlens, row_ids):
        key = {"dropout_p": p, "seed": SEED, "row_ids": row_ids} if p > 0 else {}
        return packed_attention(qkv, cu_seqlens, causal=True, **key)

    graph = compiled(function)
    for lengths in ((6, 11), (40, 2, 9), (3,)):
        (qkv,) = leaves(_qkv(lengths, 8))
        arguments = qkv, _cu_seqlens(lengths), _row_ids(lengths)
        ours, plain = graph(*arguments), function(*arguments)
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
        grad = torch.randn_like(plain)
        mine, theirs = (torch.autograd.grad(y, qkv, grad)[0] for y in (ours, plain))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@by_backend
def test_autocast_changes_nothing(backend):
    for dtype in (torch.bfloat16, torch.float32):
        qkv = _qkv((9, 4), 16, dtype)
        outside = _ours(backend, (9, 4))(qkv)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = _ours(backend, (9, 4))(qkv)
        assert inside.dtype == dtype
        assert torch.equal(inside, outside)


@by_p
@by_causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads(dtype, p, causal):
    require("cpu")
    assert_same_bits_for_any_threads(_ours("cpu", MIXED, p, causal), _qkv(MIXED, 32, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(), (1,), (6, 0, 20)], ids=str)
def test_opcheck(dtype, lengths):
    require("cpu")
    ops, t, cu_seqlens = torch.ops.tpcore, sum(lengths), _cu_seqlens(lengths)
    qkv, grad = _qkv(lengths, 8, dtype).flatten(1), torch.randn(t, HEADS * 8).to(dtype)
    wide = torch.randn(t, HEADS * 24 + 5).to(dtype)[:, : HEADS * 24]
    for x, *key in ((qkv, 0.3, SEED, 5, _row_ids(lengths), 7), (wide, 0.0, None, 0, None, 0)):
        forward = x, cu_seqlens, HEADS, 0.5, True, *key
        torch.library.opcheck(ops.packed_attention_forward, forward)
        _, *statistics = ops.packed_attention_forward(*forward)
        backward = grad, x, *statistics, cu_seqlens, 0.5, True, *key
        torch.library.opcheck(ops.packed_attention_backward, backward)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 4], "runs from 0 to 4; expected 0 to 5"),
        ([1, 5], "runs from 1 to 5; expected 0 to 5"),
        ([0, 7, 5], "decreases at 2"),
        ([0, -1, 5], "decreases at 1"),
    ],
    ids=str,
)
def test_the_kernel_never_reads_outside_its_tokens(ends, message):
    require("cpu")
    with pytest.raises(RuntimeError, match=f"cu_seqlens {message}"):
        packed_attention(_qkv((5,), 8), torch.tensor(ends).int())


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16", "amx"])
def test_other_instruction_sets(isa):
    """What above is about bfloat16, with the kernel for another instruction set."""
    require("cpu")
    if isa == _native.status("cpu").info["isa"]:
        pytest.skip("the tests above are for it")
    tests = [__file__, "-k", "bfloat16 and not other", "-q", "-p", "no:cacheprovider", "-n", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TPCORE_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    if "names an instruction set that this machine" in done.stdout + done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stdout


def test_errors_name_the_argument():
    qkv, cu_seqlens = _qkv((5,), 8), _cu_seqlens((5,))
    with pytest.raises(ValueError, match=r"qkv has shape \(5, 3, 24\); expected \[tokens, heads"):
        packed_attention(qkv.view(5, 3, 24), cu_seqlens)
    with pytest.raises(ValueError, match=r"cu_seqlens is torch.int64 of shape \(2,\)"):
        packed_attention(qkv, cu_seqlens.long())
    with pytest.raises(ValueError, match=r"row_ids has shape \(4,\); expected \(5,\)"):
        packed_attention(qkv, cu_seqlens, dropout_p=0.1, seed=SEED, row_ids=_row_ids((4,)))
    with pytest.raises(ValueError, match=r"head_offset=65535; expected the number of a head"):
        packed_attention(qkv, cu_seqlens, head_offset=65535)
    with pytest.raises(ValueError, match=r"qkv is torch.int64; expected float32"):
        packed_attention(qkv.long(), cu_seqlens)
    with pytest.raises(ValueError, match=r"needs a key, but seed is None"):
        packed_attention(qkv, cu_seqlens, dropout_p=0.1)
