from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.device import DEVICE
from tests.helpers.ranks import run_ranks
from tests.layers.twins import assert_as_accurate_as_torch
from tpcore.layers import loss as loss_module
from tpcore.layers.loss import vocab_parallel_cross_entropy
from tpcore.parallel.collectives import all_reduce
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.sharding import Sharded, shard

T, V, PADDED = 11, 13, 24  # at size 4 the last shard holds nothing but padding


def _inputs(dtype):
    generator = torch.Generator(DEVICE).manual_seed(1)
    logits = (4 * torch.randn(T, PADDED, generator=generator)).to(dtype)
    logits[:, V:] = 50.0  # would dominate the softmax if padding took part
    target = torch.randint(0, V, (T,), generator=generator)
    target[[2, 7]] = -100
    return logits, target, torch.rand(T, generator=generator)


def _plain(logits, target, smoothing, z_loss):
    live = logits[:, :V]
    loss = F.cross_entropy(
        live, target, ignore_index=-100, label_smoothing=smoothing, reduction="none"
    )
    return loss + z_loss * live.logsumexp(1).square().masked_fill(target == -100, 0)


def _check_equals_plain(tp, smoothing, z_loss, dtype):
    logits, target, grad_loss = _inputs(dtype)
    own = shard(logits, Sharded(1), tp.rank, tp.size).clone().requires_grad_()
    before = own.detach().clone()
    loss = vocab_parallel_cross_entropy(
        own, target, tp=tp, num_classes=V, label_smoothing=smoothing, z_loss=z_loss
    )
    loss.backward(grad_loss)
    assert torch.equal(own.detach(), before), "the logits were modified"
    results = []
    for twin_dtype in (torch.float32, torch.float64):
        full = logits.to(twin_dtype, copy=True).requires_grad_()
        plain = _plain(full, target, smoothing, z_loss)
        plain.backward(grad_loss.to(twin_dtype))
        results.append((plain.detach(), full.grad))
    (same, same_grad), (exact, exact_grad) = results
    assert_as_accurate_as_torch(loss.detach(), same, exact, "loss")
    # exp(logit - lse) inherits the rounding of lse, which is around 10 here and saved in float32.
    assert_as_accurate_as_torch(
        own.grad,
        same_grad.to(dtype),
        exact_grad,
        "gradient",
        factor=4,
        keep=lambda full: shard(full, Sharded(1), tp.rank, tp.size),
    )
    assert loss[[2, 7]].tolist() == [0.0, 0.0]
    assert own.grad[[2, 7]].abs().max() == 0
    first_padding = max(0, min(own.shape[1], V - tp.rank * own.shape[1]))
    assert not own.grad[:, first_padding:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.02])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_the_loss_of_the_full_vocabulary(size, z_loss, smoothing, dtype):
    run_ranks(_check_equals_plain, size, smoothing, z_loss, dtype)


def test_z_loss_is_no_less_than_nothing():
    logits, target, _ = _inputs(torch.float32)
    with pytest.raises(ValueError, match=r"z_loss=-1\.0; expected 0 or more"):
        vocab_parallel_cross_entropy(
            logits, target, tp=TensorParallelGroup.single(), num_classes=V, z_loss=-1.0
        )


def _check_all_columns_by_default(tp):
    logits, target, _ = _inputs(torch.float64)
    own = shard(logits, Sharded(1), tp.rank, tp.size)
    ours = vocab_parallel_cross_entropy(own, target, tp=tp)
    expected = F.cross_entropy(logits, target, ignore_index=-100, reduction="none")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("size", [1, 2])
def test_without_num_classes_every_column_is_a_class(size):
    run_ranks(_check_all_columns_by_default, size)


def _check_number_of_collectives(tp):
    calls = []

    def counted(x, group, op="sum"):
        calls.append((op, tuple(x.shape)))
        return all_reduce(x, group, op)

    logits, target, _ = _inputs(torch.float32)
    own = shard(logits, Sharded(1), tp.rank, tp.size).clone().requires_grad_()
    loss_module.all_reduce = counted
    try:
        loss = vocab_parallel_cross_entropy(
            own, target, tp=tp, num_classes=V, label_smoothing=0.1, z_loss=0.1
        )
        loss.sum().backward()
    finally:
        loss_module.all_reduce = all_reduce
    assert calls == [("max", (T,)), ("sum", (3, T))]


def test_two_collectives_forward_and_none_backward():
    run_ranks(_check_number_of_collectives, 2)


def _check_more_classes_than_columns(tp):
    logits, target = torch.zeros(2, 4), torch.tensor([0, 1])
    for num_classes in (0, 4 * tp.size + 1):
        with pytest.raises(ValueError, match=f"num_classes={num_classes}; expected 1 to"):
            vocab_parallel_cross_entropy(logits, target, tp=tp, num_classes=num_classes)


@pytest.mark.parametrize("size", [1, 2])
def test_every_class_needs_a_column(size):
    run_ranks(_check_more_classes_than_columns, size)
