from __future__ import annotations

import pytest
import torch

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
from tpcore._philox import philox_keep_mask
from tpcore.kernels import masked_softmax, record_backends, use_backend

by_backend = by_backends("reference", "cpu")
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
OP = "masked_softmax"
SEED = torch.tensor([987654321987654321])
INFINITY = float("inf")


def _row_ids(batch, queries):
    return (torch.arange(batch * queries) * 0x3_0000_0007).reshape(batch, queries)


def _plain(scores, mask, scale, causal, p=0.0, row_ids=None, head_offset=0):
    z = scores * scale
    if causal:
        queries, keys = scores.shape[-2:]
        future = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        mask = future if mask is None else mask | future
    if mask is not None:
        z = z.masked_fill(mask, -INFINITY)
    y = torch.softmax(z, -1)
    if p > 0:
        heads, keys = scores.shape[1], scores.shape[3]
        keep = philox_keep_mask(SEED, row_ids, p, 5, keys, 0, head_offset, heads)
        y = torch.where(keep, y / (1 - p), 0.0)
    return y


def _mask(*shape):
    """About a third is masked, but never the first key."""
    mask = torch.rand(shape) < 0.35
    mask[..., 0] = False
    return mask


@by_backend
@by_dtype
@pytest.mark.parametrize("keys", [1, 2, 3, 17, 31, 33, 127, 128, 129, 1000, 4097])
def test_accuracy_for_any_number_of_keys(backend, dtype, keys):
    mask = _mask(2, 1, 1, keys)
    compare(
        lambda s: run(OP, backend, masked_softmax, s, mask, 0.37),
        lambda s: _plain(s, mask, 0.37, False),
        ((torch.randn(2, 3, 4, keys) * 4).to(dtype),),
    )


@by_backend
@by_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "mask_shape",
    [None, (2, 1, 1, 23), (1, 1, 11, 23), (2, 3, 11, 23), (23,), (3, 1, 1), (1, 3, 11, 1)],
    ids=str,
)
def test_accuracy_for_any_mask(backend, dtype, causal, mask_shape):
    mask = None if mask_shape is None else _mask(*mask_shape)
    row_ids = _row_ids(2, 11)
    scores = (torch.randn(2, 3, 11, 23) * 4).to(dtype)
    for p in (0.0, 0.25):
        compare(
            lambda s, p=p: run(
                OP,
                backend,
                masked_softmax,
                s,
                mask,
                0.5,
                causal,
                dropout_p=p,
                seed=SEED,
                stream=5,
                row_ids=row_ids,
                head_offset=6,
            ),
            lambda s, p=p: _plain(s, mask, 0.5, causal, p, row_ids, 6),
            (scores,),
        )


@by_backend
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradcheck(backend, p, causal):
    require(backend)
    scores = torch.randn(2, 2, 5, 9, dtype=torch.float64, requires_grad=True)
    mask = _mask(2, 1, 1, 9)
    mask[1] = True

    def function(s):
        return masked_softmax(s, mask, 0.7, causal, dropout_p=p, seed=SEED, row_ids=_row_ids(2, 5))

    with use_backend(backend), record_backends() as calls:
        assert torch.autograd.gradcheck(function, (scores,))
    assert set(calls) == {(OP, backend)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_sign_of_saved_probabilities_is_the_dropout_mask(dtype):
    require("cpu")
    row_ids = _row_ids(2, 7)
    scores = torch.randn(2, 3, 7, 51).to(dtype)
    scores[..., 40:] = -1e4  # probabilities of zero have a sign too
    forward = torch.ops.tpcore.masked_softmax_forward
    y, probs = forward(scores, None, 1.0, False, 0.4, SEED, 5, row_ids, 2)
    keep = philox_keep_mask(SEED, row_ids, 0.4, 5, 51, 0, 2, 3)
    assert torch.equal(~probs.signbit(), keep)
    assert torch.equal(probs.abs(), forward(scores, None, 1.0, False, 0.0, None, 0, None, 0)[0])
    assert not y[~keep].any()


@by_backend
@by_dtype
def test_fully_masked_rows_are_zero_with_zero_gradient(backend, dtype):
    scores = torch.randn(2, 2, 3, 40).to(dtype)
    scores[1] = float("nan")  # what padding holds must not matter
    scores.requires_grad_()
    mask = torch.zeros(2, 1, 1, 40, dtype=torch.bool)
    mask[1] = True
    y = run(OP, backend, masked_softmax, scores, mask)
    assert not y[1].any()
    y.pow(2).sum().backward()
    assert not scores.grad[1].any()
    assert scores.grad[0].any()


@by_backend
def test_more_queries_than_keys_under_causal(backend):
    # The last query sees the last key, so the first two of five queries see nothing.
    scores = torch.randn(1, 1, 5, 3)
    y = run(OP, backend, masked_softmax, scores, None, 1.0, True)
    assert not y[0, 0, :2].any()
    torch.testing.assert_close(y[0, 0, 2:].sum(-1), torch.ones(3))
    assert not y[0, 0, 2, 1:].any()


@by_backend
@by_dtype
def test_nan_and_infinity(backend, dtype):
    scores = torch.randn(1, 1, 6, 37).to(dtype)
    scores[0, 0, 0, 5] = float("nan")  # live: its row is NaN
    scores[0, 0, 1, 36] = float("nan")  # masked: changes nothing
    scores[0, 0, 2, 7] = INFINITY
    scores[0, 0, 3, 7] = -INFINITY
    scores[0, 0, 4] = -INFINITY
    mask = torch.zeros(1, 1, 6, 37, dtype=torch.bool)
    mask[..., 36] = True
    y = run(OP, backend, masked_softmax, scores, mask)[0, 0]
    assert y[0, :36].isnan().all()
    assert y[1].isfinite().all()
    assert y[2].isnan().any()  # as torch.softmax: inf - inf
    assert y[3, 7] == 0
    assert y[3].isfinite().all()
    assert y[4, :36].isnan().all()  # live keys of no weight at all: undefined, as torch.softmax
    assert not y[:, 36][y[:, 36].isfinite()].any()


@by_backend
def test_large_scores_do_not_overflow(backend):
    scores = torch.tensor([1e4, 1e4 - 1, -1e4, 3e38]).reshape(1, 1, 1, 4)
    y = run(OP, backend, masked_softmax, scores, torch.tensor([False, False, False, True]))
    expected = torch.tensor([0.0, -1.0]).exp()
    torch.testing.assert_close(y[0, 0, 0], torch.cat([expected / expected.sum(), torch.zeros(2)]))


@by_backend
def test_a_shard_of_the_heads_draws_the_same_bits(backend):
    scores, row_ids = torch.randn(2, 8, 5, 19), _row_ids(2, 5)
    key = {"dropout_p": 0.4, "seed": SEED, "stream": 9, "row_ids": row_ids}
    whole = run(OP, backend, masked_softmax, scores, **key)
    shard = run(OP, backend, masked_softmax, scores[:, 3:6], head_offset=3, **key)
    assert torch.equal(shard, whole[:, 3:6])
    key["row_ids"] = row_ids[1:]
    assert torch.equal(run(OP, backend, masked_softmax, scores[1:], **key), whole[1:])


@by_backend
def test_strides_and_empty(backend):
    wide = torch.randn(2, 3, 11, 50)
    mask = _mask(2, 1, 1, 50)
    views = [
        (wide[..., 3:40], mask[..., 3:40]),
        (wide[:, ::2], mask),
        (wide.transpose(1, 2), mask),
        (wide[:1].expand(2, 3, 11, 50), mask.expand(2, 3, 11, 50)),
        (wide.transpose(2, 3), mask[..., :11]),
    ]
    for scores, some in views:
        ours = run(OP, backend, masked_softmax, scores, some)
        dense = run(OP, backend, masked_softmax, scores.contiguous(), some.contiguous())
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-7)
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        assert masked_softmax(torch.randn(shape)).shape == shape


@by_backend
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_grad_output_is_not_modified(backend, p):
    key = {"dropout_p": p, "seed": SEED, "row_ids": _row_ids(2, 4)}
    function = lambda s: run(OP, backend, masked_softmax, s, _mask(9), **key)  # noqa: E731
    assert_grad_not_modified(function, torch.randn(2, 3, 4, 9))


@by_backend
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_to_one_graph(backend, p):
    require(backend)

    def function(scores, mask, row_ids):
        return masked_softmax(scores, mask, 0.3, dropout_p=p, seed=SEED, row_ids=row_ids)

    graph = compiled(function)
    with use_backend(backend):
        for queries in (6, 11):
            (scores,) = leaves(torch.randn(2, 3, queries, 24))
            arguments = scores, _mask(2, 1, 1, 24), _row_ids(2, queries)
            ours, plain = graph(*arguments), function(*arguments)
            torch.testing.assert_close(ours, plain)
            grad = torch.randn_like(plain)
            mine, theirs = (torch.autograd.grad(y, scores, grad) for y in (ours, plain))
            torch.testing.assert_close(mine, theirs)


@by_backend
def test_autocast_changes_nothing(backend):
    scores = torch.randn(1, 2, 3, 16, dtype=torch.bfloat16)
    outside = run(OP, backend, masked_softmax, scores)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = run(OP, backend, masked_softmax, scores)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bits_do_not_depend_on_threads(p):
    require("cpu")
    key = {"dropout_p": p, "seed": SEED, "row_ids": _row_ids(3, 50)}
    mask = _mask(3, 1, 1, 70)
    assert_same_bits_for_any_threads(
        lambda s: run(OP, "cpu", masked_softmax, s, mask, **key), torch.randn(3, 4, 50, 70)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [0, 1, 6])
def test_opcheck(dtype, queries):
    require(DEVICE)
    ops, p = torch.ops.tpcore, 0.3
    scores = torch.randn(2, 3, queries, 19).to(dtype)
    strided = torch.randn(2, queries, 3, 40)[..., 4:23].to(dtype).transpose(1, 2)
    key, no_key = (SEED, 7, _row_ids(2, queries), 5), (None, 0, None, 0)
    mask = _mask(2, 1, 1, 19)
    torch.library.opcheck(ops.masked_softmax_forward, (scores, mask, 0.5, False, p, *key))
    torch.library.opcheck(ops.masked_softmax_forward, (strided, None, 0.5, True, 0.0, *no_key))
    torch.library.opcheck(ops.masked_softmax_backward, (strided, scores, 0.5, p, *key))
    torch.library.opcheck(ops.masked_softmax_backward, (scores, strided, 0.5, 0.0, *no_key))


def test_errors_name_the_argument():
    scores = torch.randn(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"scores has shape \(4, 5\); expected four dimensions"):
        masked_softmax(scores[0, 0])
    with pytest.raises(ValueError, match=r"mask is torch.float32; expected bool"):
        masked_softmax(scores, torch.zeros(5))
    with pytest.raises(ValueError, match=r"mask.*\(2, 4, 5\).*broadcast"):
        masked_softmax(scores, torch.zeros(2, 4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"row_ids has shape \(2, 5\); expected \(2, 4\)"):
        masked_softmax(scores, dropout_p=0.1, seed=SEED, row_ids=_row_ids(2, 5))
    with pytest.raises(ValueError, match=r"needs a key, but seed is None"):
        masked_softmax(scores, dropout_p=0.1)
