"""Regions, cross entropy, random states, checkpointing, data, by Megatron's names."""

import pytest
import torch
import torch.nn.functional as F

from tests.interop.ranks import run_megatron
from tpcore.interop.megatron import tensor_parallel, utils
from tpcore.interop.megatron.tensor_parallel import get_cuda_rng_tracker
from tpcore.parallel.collectives import all_gather
from tpcore.parallel.sharding import Sharded, shard


def _of_rank(rank):
    """Small integers [4, 8], another table on each rank: sums are exact."""
    return (torch.arange(32.0).view(4, 8) * 7 + rank * 5) % 11


# name -> (arguments, what each rank gets from the tables of all, gradient from all the gradients)
REGIONS = {
    "copy_to_tensor_model_parallel_region": (
        (),
        lambda r, n, xs: xs[r],
        lambda r, n, gs: sum(gs),
    ),
    "reduce_from_tensor_model_parallel_region": (
        (),
        lambda r, n, xs: sum(xs),
        lambda r, n, gs: gs[r],
    ),
    "scatter_to_tensor_model_parallel_region": (
        (),
        lambda r, n, xs: xs[r].chunk(n, -1)[r],
        lambda r, n, gs: torch.cat(gs, -1),
    ),
    "gather_from_tensor_model_parallel_region": (
        (),
        lambda r, n, xs: torch.cat(xs, -1),
        lambda r, n, gs: gs[r].chunk(n, -1)[r],
    ),
    "scatter_to_sequence_parallel_region": (
        (),
        lambda r, n, xs: xs[r].chunk(n)[r],
        lambda r, n, gs: torch.cat(gs),
    ),
    "gather_from_sequence_parallel_region": (
        (),
        lambda r, n, xs: torch.cat(xs),
        lambda r, n, gs: sum(gs).chunk(n)[r],
    ),
    "gather_from_sequence_parallel_region of equal gradients": (
        (False,),
        lambda r, n, xs: torch.cat(xs),
        lambda r, n, gs: gs[r].chunk(n)[r],
    ),
    "reduce_scatter_to_sequence_parallel_region": (
        (),
        lambda r, n, xs: sum(xs).chunk(n)[r],
        lambda r, n, gs: torch.cat(gs),
    ),
    "all_gather_last_dim_from_tensor_parallel_region": (
        (),
        lambda r, n, xs: torch.cat(xs, -1),
        lambda r, n, gs: sum(gs).chunk(n, -1)[r],
    ),
    "reduce_scatter_last_dim_to_tensor_parallel_region": (
        (),
        lambda r, n, xs: sum(xs).chunk(n, -1)[r],
        lambda r, n, gs: torch.cat(gs, -1),
    ),
}


def _check_regions(tp):
    ranks = range(tp.size)
    for name, (arguments, forward, backward) in REGIONS.items():
        region = getattr(tensor_parallel, name.split()[0])
        every = [_of_rank(rank) for rank in ranks]
        x = every[tp.rank].clone().requires_grad_()
        y = region(x, *arguments)
        assert torch.equal(y, forward(tp.rank, tp.size, every)), name
        grads = [((torch.arange(float(y.numel())) * 3 + r) % 7).view(y.shape) for r in ranks]
        (grad,) = torch.autograd.grad(y, x, grads[tp.rank])
        assert torch.equal(grad, backward(tp.rank, tp.size, grads)), name
        assert torch.equal(x, every[tp.rank]), f"{name} modified its input"
    region = tensor_parallel.gather_from_sequence_parallel_region
    x = torch.ones(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(region(x, to_model_parallel=False).sum(), x)
    assert torch.equal(grad, torch.ones(2, 3))
    with pytest.raises(ValueError, match="output_split_sizes is not None"):
        region(x, True, None, [1, 1])
    scatter = tensor_parallel.reduce_scatter_to_sequence_parallel_region
    with pytest.raises(ValueError, match="input_split_sizes is not None"):
        scatter(x, None, [1, 1])
    equal = torch.ones(4, 3)  # as Megatron-Core's own callers write it
    assert region(equal, True, None, None, True).shape == (4 * tp.size, 3)
    assert scatter(equal, None, None, use_global_buffer=True).shape == (4 // tp.size, 3)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_regions(size):
    run_megatron(_check_regions, size)


# --- cross entropy


def _megatron_loss(logits, target, smoothing):
    """The formula of one rank that holds the whole vocabulary, in float64."""
    log_probs = F.log_softmax(logits.double(), -1)
    chosen = -log_probs.gather(-1, target[..., None]).squeeze(-1)
    share = smoothing * logits.shape[-1] / (logits.shape[-1] - 1)
    return (1 - share) * chosen - share * log_probs.mean(-1)


def _check_cross_entropy(tp, smoothing):
    generator = torch.Generator().manual_seed(2)
    full = (torch.randn(3, 5, 24, generator=generator) * 4).double()
    target = torch.randint(24, (3, 5), generator=generator)
    twin = full.clone().requires_grad_()
    expected = _megatron_loss(twin, target, smoothing)
    weights = torch.arange(15.0).view(3, 5).double()
    (expected_grad,) = torch.autograd.grad(expected, twin, weights)
    own = shard(full, Sharded(-1), tp.rank, tp.size).clone().requires_grad_()
    before = own.detach().clone()
    loss = tensor_parallel.vocab_parallel_cross_entropy(own, target, smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    everyone = all_gather(loss.detach()[None], tp)
    assert all(torch.equal(other, loss) for other in everyone), "the loss differs between ranks"
    (grad,) = torch.autograd.grad(loss, own, weights)
    expected_own = shard(expected_grad, Sharded(-1), tp.rank, tp.size)
    torch.testing.assert_close(grad, expected_own, rtol=1e-11, atol=1e-12)
    assert torch.equal(own, before), "the logits were overwritten"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocab_parallel_cross_entropy(size, smoothing):
    run_megatron(_check_cross_entropy, size, smoothing)


def _check_no_target(tp):
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(tp.rank)).requires_grad_()
    target = torch.tensor([3, -1, -100, 10**6])
    loss = tensor_parallel.vocab_parallel_cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    assert (loss != 0).tolist() == [True, False, False, False]
    loss.sum().backward()
    assert logits.grad.abs().sum(1).ne(0).tolist() == [True, False, False, False]
    half = tensor_parallel.vocab_parallel_cross_entropy(logits.detach().bfloat16(), target)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss.detach(), rtol=0.02, atol=0)


def test_a_target_that_is_no_id_has_no_loss():
    run_megatron(_check_no_target, 2)


# --- random states


def _check_streams(tp):
    tracker = get_cuda_rng_tracker()
    assert tracker is get_cuda_rng_tracker()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    assert tracker.is_initialized()
    plain = torch.rand(6)
    with tracker.fork():
        forked = torch.rand(6)
    after = torch.rand(6)
    torch.manual_seed(1234)
    assert torch.equal(torch.rand(6), plain)
    assert torch.equal(torch.rand(6), after), "the fork moved the default stream"
    torch.manual_seed(1234 + 2718 + tp.rank)
    assert torch.equal(torch.rand(6), forked)
    with tracker.fork():
        assert torch.equal(torch.rand(6), torch.rand(6, generator=_after(6, 3952 + tp.rank)))
    tensor_parallel.model_parallel_cuda_manual_seed(1234, tp_rank=5)
    with tracker.fork():
        assert torch.equal(torch.rand(6), torch.rand(6, generator=_after(0, 3957)))


def _after(draws, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.rand(draws, generator=generator)
    return generator


def _check_tracker(tp):
    tracker = get_cuda_rng_tracker()
    tensor_parallel.model_parallel_cuda_manual_seed(5)
    tracker.add("other", 99)
    assert sorted(tracker.get_states()) == ["model-parallel-rng", "other"]
    saved = tracker.get_states()

    def draws():
        values = []
        with tracker.fork():
            values.append(torch.rand(2))
            with tracker.fork("other"):
                values.append(torch.rand(2))
                with tracker.fork():  # goes on where the outer one is
                    values.append(torch.rand(2))
            values.append(torch.rand(2))
        return torch.stack(values)

    first = draws()
    generator = torch.Generator().manual_seed(5 + 2718 + tp.rank)
    expected = torch.rand(3, 2, generator=generator)
    assert torch.equal(first[[0, 2, 3]], expected)
    assert not torch.equal(draws(), first)
    tracker.set_states(saved)
    assert torch.equal(draws(), first)
    with pytest.raises(ValueError, match="there is a stream 'other' already"):
        tracker.add("other", 7)
    with pytest.raises(ValueError, match=r"seed=99 .* is that of 'other'"):
        tracker.add("another", 99)
    with pytest.raises(ValueError, match="there is no stream 'nothing'"), tracker.fork("nothing"):
        pass
    tracker.reset()
    assert not tracker.is_initialized()
    assert tracker.get_states() == {}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_seeds_of_the_streams(size):
    run_megatron(_check_streams, size)


def test_the_tracker_nests_and_restores():
    run_megatron(_check_tracker, 2)


def _check_checkpoint(tp):
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(8, 8, generator=generator).requires_grad_()
    x = torch.randn(4, 8, generator=generator).requires_grad_()

    calls = []

    def layer(hidden, scale):
        calls.append(1)
        hidden = F.dropout(hidden @ weight, 0.3)
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        with get_cuda_rng_tracker().fork():
            hidden = F.dropout(hidden.tanh(), 0.3)
        hidden = tensor_parallel.reduce_from_tensor_model_parallel_region(hidden)
        return hidden * scale

    results = []
    for how in ((None,), (), (False,), (True,)):
        tensor_parallel.model_parallel_cuda_manual_seed(77)
        calls.clear()
        plain = how == (None,)
        y = layer(x, 2.0) if plain else tensor_parallel.checkpoint(layer, *how, x, 2.0)
        torch.rand(3)  # what comes between does not matter
        with get_cuda_rng_tracker().fork():
            torch.rand(3)
        grads = torch.autograd.grad(y.square().sum(), (x, weight))
        assert len(calls) == (1 if plain else 2)
        with get_cuda_rng_tracker().fork():
            forked = torch.rand(2)
        results.append((y, *grads, torch.rand(2), forked))
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_checkpoint_restores_every_stream(size):
    run_megatron(_check_checkpoint, size)


# --- data and splitting


def _check_broadcast(tp):
    keys = ["text", "types", "empty", "one"]
    sent = {
        "text": torch.arange(24).view(2, 3, 4),
        "types": torch.arange(6).view(3, 2).t(),
        "empty": torch.zeros(0, 4, dtype=torch.int64),
        "one": torch.tensor(7),
        "more": torch.ones(1),
    }
    got = tensor_parallel.broadcast_data(keys, sent if tp.rank == 0 else None, torch.int64)
    assert list(got) == keys
    for key in keys:
        assert got[key].shape == sent[key].shape
        assert torch.equal(got[key].cpu(), sent[key])
    for wrong, message in [
        (None, "data is None on the first rank"),
        ({"text": sent["text"]}, "data has no 'types'; it has 'text'"),
        ({**sent, "one": 7}, r"data\['one'\] is a int; expected a tensor"),
        ({**sent, "one": torch.tensor(7.0)}, r"data\['one'\] is torch.float32; expected"),
        ({**sent, "one": torch.zeros([1] * 6, dtype=torch.int64)}, "has 6 dimensions; at most 5"),
    ]:
        first = tp.rank == 0
        with pytest.raises(ValueError, match=message if first else "failed on the first rank"):
            tensor_parallel.broadcast_data(keys, wrong if first else None, torch.int64)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_broadcast_data(size):
    run_megatron(_check_broadcast, size)


def _check_flat(tp):
    x = torch.arange(24.0).view(4, 6)
    share = tensor_parallel.split_tensor_into_1d_equal_chunks(x, new_buffer=True)
    assert torch.equal(share, x.flatten().chunk(tp.size)[tp.rank])
    assert share.untyped_storage().nbytes() == share.numel() * 4
    assert torch.equal(tensor_parallel.gather_split_1d_tensor(share).view(4, 6), x)


def test_flat_shares():
    run_megatron(_check_flat, 4)


def test_splitting_and_dividing():
    x = torch.arange(12.0).view(2, 6)
    parts = tensor_parallel.split_tensor_along_last_dim(x, 3)
    assert [part.tolist() for part in parts] == [
        [[0, 1], [6, 7]],
        [[2, 3], [8, 9]],
        [[4, 5], [10, 11]],
    ]
    assert parts[0].data_ptr() == x.data_ptr()
    copies = tensor_parallel.split_tensor_along_last_dim(x, 3, contiguous_split_chunks=True)
    assert all(copy.is_contiguous() for copy in copies)
    with pytest.raises(ValueError, match="6 is not divisible by 4"):
        tensor_parallel.split_tensor_along_last_dim(x, 4)
    assert utils.divide(12, 4) == 3
    with pytest.raises(ValueError, match="13 is not divisible by 4"):
        utils.ensure_divisibility(13, 4)
    vocabulary = tensor_parallel.VocabUtility
    assert vocabulary.vocab_range_from_per_partition_vocab_size(10, 2, 4) == (20, 30)
    assert vocabulary.vocab_range_from_global_vocab_size(40, 3, 4) == (30, 40)
