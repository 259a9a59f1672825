"""Collectives in shared memory: bits, who uses it, leaks, failures."""

from __future__ import annotations

import copy
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import run_ranks
from tests.kernels.harness import require
from tests.parallel.test_collectives import AUTOGRAD, _check_adjoint
from tpcore.parallel import collectives, shared_memory
from tpcore.parallel.group import TensorParallelGroup
from tpcore.parallel.shared_memory import REDUCED_DTYPES, channel_of, open_channel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux")

# Around a vector, a line, the switch from one step to two, a chunk of a small and of a large half.
COUNTS = [0, 1, 3, 17, 64, 1000, 4097, 8191, 8192, 8193, 20000, 65537]
SMALL_HALF = 16384


@pytest.fixture(scope="module", autouse=True)
def _native():
    require("cpu")


def _group_of(tp, size):
    """A group of the first ``size`` of four ranks; None on the others."""
    if size == tp.size:
        return tp
    process_group = dist.new_group(list(range(size)))
    return TensorParallelGroup.from_process_group(process_group) if tp.rank < size else None


def _values(rank, count, dtype, seed=0):
    """Numbers whose sum depends on the order in which they are added."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    return (values * 10.0 ** (rank % 3)).to(dtype)


def _sum_in_rank_order(parts):
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def _same_bits(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    a, b = (t.contiguous().view(torch.uint8) if t.numel() else t for t in (a, b))
    assert torch.equal(a, b)


def _check_sums(world, size, dtype, half_bytes):
    tp = _group_of(world, size)
    if tp is None:
        return
    channel = open_channel(tp, half_bytes)
    for count in COUNTS:
        every = [_values(rank, count, dtype) for rank in range(size)]
        mine = every[tp.rank].clone()
        expected = _sum_in_rank_order(every)
        _same_bits(channel.all_reduce(mine), expected)
        started = channel.start_all_reduce(mine)
        assert channel.finish(started)
        assert not channel.finish(started)
        _same_bits(started, expected)
        _same_bits(channel.all_reduce(mine, "max"), torch.stack(every).amax(0))
        _same_bits(mine, every[tp.rank])
        channel.all_reduce_in_place(mine)
        _same_bits(mine, expected)
        every = [_values(rank, size * count, dtype, 1).view(size, count) for rank in range(size)]
        scattered = channel.reduce_scatter(every[tp.rank])
        _same_bits(scattered, _sum_in_rank_order(every)[tp.rank : tp.rank + 1])


@pytest.mark.parametrize("half_bytes", [SMALL_HALF, shared_memory.HALF_BYTES])
@pytest.mark.parametrize("dtype", REDUCED_DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_have_the_bits_of_a_sum_in_rank_order(size, dtype, half_bytes):
    run_ranks(_check_sums, 2 if size == 2 else 4, size, dtype, half_bytes)


def _check_copies(world, size, dtype):
    tp = _group_of(world, size)
    if tp is None:
        return
    channel = open_channel(tp, SMALL_HALF)
    for count in COUNTS:
        every = [(_values(rank, count, torch.float64) * 100).to(dtype) for rank in range(size)]
        _same_bits(channel.all_gather(every[tp.rank]), torch.cat(every))
        for source in range(size):
            _same_bits(channel.broadcast(every[tp.rank], source), every[source])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_gathered_and_broadcast_tensors_are_exact(size, dtype):
    run_ranks(_check_copies, 2 if size == 2 else 4, size, dtype)


def _check_layouts(tp):
    channel = channel_of(tp)
    every = [_values(rank, 41 * 7, torch.float32).view(41, 7) for rank in range(tp.size)]
    table = every[tp.rank]
    padded = torch.zeros(41 * 7 + 1)
    padded[1:] = table.flatten()
    assert padded[1:].data_ptr() % 16
    layouts = {
        "transposed": table.t().contiguous().t(),
        "unaligned": padded[1:].view(41, 7),
        "every other column": table.repeat_interleave(2, 1)[:, ::2],
        "requires grad": table.clone().requires_grad_(),
    }
    for x in layouts.values():
        _same_bits(collectives.all_reduce(x, tp), _sum_in_rank_order(every))
        _same_bits(collectives.all_gather(x, tp, dim=-1), torch.cat(every, 1))
        _same_bits(channel.broadcast(x, 1), every[1])
    expanded = torch.full((), float(tp.rank)).expand(5, 3)
    assert collectives.all_reduce(expanded, tp).tolist() == [[1.0] * 3] * 5
    unaligned = padded[1:]
    assert collectives.all_reduce_in_place(unaligned, tp) is unaligned
    _same_bits(unaligned.view(41, 7), _sum_in_rank_order(every))
    scalar = collectives.all_reduce(torch.tensor(2.0), tp)
    assert scalar.shape == ()
    assert scalar.item() == 4.0


def test_any_strides_and_alignment():
    run_ranks(_check_layouts, 2)


def _check_extreme_values(tp):
    nan, inf = float("nan"), float("inf")
    values = [0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 3e38, 1e-45]
    mine = torch.tensor(values if tp.rank else [v for v in values for _ in values])
    mine = mine.repeat(len(values)) if tp.rank else mine
    every = collectives.all_gather(mine[None], tp)
    greatest = collectives.all_reduce(mine, tp, "max")
    assert torch.equal(greatest.isnan(), every.isnan().any(0))
    assert torch.equal(greatest.nan_to_num(nan=7.0), every.amax(0).nan_to_num(nan=7.0))
    total = collectives.all_reduce(mine, tp)
    assert torch.equal(total.isnan(), (every[0] + every[1]).isnan())
    _same_bits(total.nan_to_num(nan=0.0), (every[0] + every[1]).nan_to_num(nan=0.0))


def test_nan_and_infinity_are_not_lost():
    run_ranks(_check_extreme_values, 2)


def _check_adjoints(tp):
    assert channel_of(tp) is not None
    for name in AUTOGRAD:
        _check_adjoint(tp, name)


@pytest.mark.parametrize("size", [2, 4])
def test_autograd_collectives_are_adjoint_over_shared_memory(size):
    run_ranks(_check_adjoints, size)


def _check_two_phases(tp):
    every = [_values(rank, 30000, torch.bfloat16) for rank in range(tp.size)]
    others = [_values(rank, 100, torch.float32, 1) for rank in range(tp.size)]
    first = collectives.start_all_reduce(every[tp.rank], tp)
    second = collectives.start_all_reduce(others[tp.rank], tp)
    gathered = collectives.all_gather(others[tp.rank], tp)
    third = collectives.start_all_reduce(others[tp.rank], tp, "max")
    _same_bits(collectives.wait(second), _sum_in_rank_order(others))
    _same_bits(collectives.wait(first), _sum_in_rank_order(every))
    _same_bits(gathered, torch.cat(others))
    _same_bits(collectives.wait(third), torch.stack(others).amax(0))


@pytest.mark.parametrize("size", [2, 4])
def test_started_collectives_finish_in_any_order(size):
    run_ranks(_check_two_phases, size)


def _check_threads(tp):
    mine = _values(tp.rank, 300_001, torch.bfloat16)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append((collectives.all_reduce(mine, tp), collectives.all_gather(mine, tp)))
    torch.set_num_threads(1)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            _same_bits(a, b)


def test_the_number_of_threads_changes_no_bit():
    run_ranks(_check_threads, 2)


def _every_collective(x, tp):
    y = collectives.reduce_from(collectives.copy_to(x, tp) * 2, tp)
    y = collectives.gather_from_sequence(y[:3], tp) + collectives.gather_from(x, tp).sum()
    return collectives.reduce_scatter_to_sequence(y, tp)


def _check_compiled(tp):
    compiled = torch.compile(_every_collective, backend="aot_eager", fullgraph=True)
    results = []
    for function in (_every_collective, compiled):
        x = _values(tp.rank, 24, torch.float32).view(4, 6).requires_grad_()
        y = function(x, tp)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        _same_bits(a, b)


def test_compiled_collectives_have_the_same_bits():
    run_ranks(_check_compiled, 2)


def _check_wrap_around(tp):
    channel = open_channel(tp, SMALL_HALF)
    channel._segment.view(torch.int32)[32 * tp.rank] = -5  # this rank's counter
    dist.barrier(tp.process_group)
    mine = torch.full((9000,), tp.rank + 1.0)
    for _ in range(10):
        assert channel.all_reduce(mine).unique().tolist() == [tp.size * (tp.size + 1) / 2]
    assert 0 < channel._segment.view(torch.int32)[32 * tp.rank].item() < 100


def test_the_step_counters_wrap_around():
    run_ranks(_check_wrap_around, 4)


# --- Which groups use it


@contextmanager
def _undecided(tp):
    """As if no collective had been called yet."""
    decided = shared_memory._CHANNELS.pop(tp.process_group, None)
    try:
        yield
    finally:
        shared_memory._CHANNELS[tp.process_group] = decided


def _check_too_small(tp):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("tpcore.parallel.shared_memory").addHandler(handler)
    half_bytes, shared_memory.HALF_BYTES = shared_memory.HALF_BYTES, 1 << 44
    try:
        with _undecided(tp):
            assert channel_of(tp) is None
            assert collectives.all_reduce(torch.ones(3), tp).tolist() == [tp.size] * 3
            assert channel_of(tp) is None
            shared_memory._CHANNELS.pop(tp.process_group)
            insisting = TensorParallelGroup.from_process_group(tp.process_group, shared_memory=True)
            with pytest.raises(ValueError, match="was asked for and is not possible: rank 0: /dev"):
                collectives.all_reduce(torch.ones(3), insisting)
    finally:
        shared_memory.HALF_BYTES = half_bytes
        logging.getLogger("tpcore.parallel.shared_memory").removeHandler(handler)
    return [record.getMessage() for record in records]


def test_too_little_shared_memory_falls_back_to_gloo_and_says_why():
    first, second = run_ranks(_check_too_small, 2)
    (line,) = first
    assert line.startswith("collectives of ranks [0, 1] go through gloo, not shared memory: rank 0")
    assert "MiB free, and 67108864.0 MiB are needed" in line
    assert "\n" not in line
    assert second == []


def _check_wishes(tp):
    group = TensorParallelGroup.from_process_group
    cases = [
        (None, None, True),
        (None, "auto", True),
        (None, "0", False),
        (None, "1", True),
        (True, "0", True),
        (False, "1", False),
    ]
    for argument, variable, expected in cases:
        if variable is None:
            os.environ.pop("TPCORE_SHARED_MEMORY", None)
        else:
            os.environ["TPCORE_SHARED_MEMORY"] = variable
        with _undecided(tp):
            wishing = group(tp.process_group, shared_memory=argument)
            assert (channel_of(wishing) is not None) == expected
            assert collectives.all_reduce(torch.ones(1), wishing).item() == tp.size
    os.environ["TPCORE_SHARED_MEMORY"] = "yes"
    with (
        _undecided(tp),
        pytest.raises(ValueError, match="TPCORE_SHARED_MEMORY is 'yes'; expected auto, 1 or 0"),
    ):
        channel_of(tp)
    del os.environ["TPCORE_SHARED_MEMORY"]
    with _undecided(tp):  # the wish of one rank is enough to go without
        assert channel_of(group(tp.process_group, shared_memory=None if tp.rank else False)) is None


def test_argument_and_environment_decide():
    run_ranks(_check_wishes, 2)


def _check_several_hosts(tp):
    shared_memory._host, original = (lambda size: f"host {tp.rank}"), shared_memory._host
    try:
        with pytest.raises(shared_memory.UnavailableError, match="run on several hosts"):
            open_channel(tp)
    finally:
        shared_memory._host = original


def test_ranks_on_several_hosts_cannot_use_it():
    run_ranks(_check_several_hosts, 2)


# --- Lifetime


def _open_things():
    """How many descriptors this process has, and how many nameless files of /dev/shm it maps."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = sum("/dev/shm/#" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), mapped


def _check_cycles(tp, cycles):
    before = None
    for cycle in range(cycles + 1):
        channel = open_channel(tp, SMALL_HALF)
        assert channel.all_reduce(torch.ones(5)).tolist() == [tp.size] * 5
        del channel
        if cycle == 0:
            before = _open_things()
    assert _open_things() == before


@pytest.mark.parametrize("cycles", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_opening_and_dropping_channels_leaks_nothing(cycles):
    run_ranks(_check_cycles, 2, cycles)


def _check_lifetime(tp):
    collectives.all_reduce(torch.ones(1), tp)
    before = _open_things()
    process_group = dist.new_group(list(range(tp.size)))
    group = TensorParallelGroup.from_process_group(process_group)
    channel = weakref.ref(channel_of(group))
    for clone in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert channel_of(clone) is channel()
    assert collectives.all_reduce(torch.ones(1), group).item() == tp.size
    dist.barrier(process_group)
    dist.destroy_process_group(process_group)
    del process_group, group, clone
    gc.collect()
    assert channel() is None
    assert _open_things()[1] == before[1]


def test_a_channel_lives_as_long_as_its_process_group():
    run_ranks(_check_lifetime, 4)


# --- Failures, in processes forked from this one, since they break their channel or die.


def _forked_rank(connection, folder, rank, size, body):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=30),
    )
    tp = TensorParallelGroup.from_process_group(dist.new_group(list(range(size))))
    assert channel_of(tp) is not None
    start = time.monotonic()
    try:
        outcome = body(tp)
    except (RuntimeError, AssertionError) as error:
        outcome = str(error)
    connection.send((outcome, time.monotonic() - start))
    connection.recv()  # until all have reported: a rank that ends is noticed by the others
    os._exit(0)


def _fork_ranks(folder, size, body, missing=()):
    """What body returned or raised, and after how many seconds, on each rank but the missing."""
    context = multiprocessing.get_context("fork")
    ends, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        args = (theirs, str(folder), rank, size, body)
        process = context.Process(target=_forked_rank, args=args, daemon=True)
        process.start()
        ends.append(ours)
        processes.append(process)
    try:
        outcomes = {}
        for rank in set(range(size)) - set(missing):
            assert ends[rank].poll(30), f"rank {rank} hangs"
            outcomes[rank] = ends[rank].recv()
        return outcomes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _names_in_shared_memory():
    foreign = ("sem.", "torch_", "pymp-")
    return {name for name in os.listdir("/dev/shm") if not name.startswith(foreign)}


def _killed_in_the_middle(tp):
    if tp.rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    x = torch.ones(1 << 20)
    while True:
        collectives.all_reduce(x, tp)


def test_a_killed_rank_is_named_by_the_others(tmp_path):
    before = _names_in_shared_memory()
    outcomes = _fork_ranks(tmp_path, 3, _killed_in_the_middle, missing=[1])
    for message, seconds in outcomes.values():
        assert "rank 1 of 3" in message
        assert seconds < 10
    assert any("has ended in the middle of a collective" in m for m, _ in outcomes.values())
    assert _names_in_shared_memory() == before


def _stopped(tp):
    channel = channel_of(tp)
    channel._member = (*channel._member[:3], 700)
    if tp.rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    collectives.all_reduce(torch.ones(5), tp)


def test_a_rank_that_does_not_come_in_time_is_named(tmp_path):
    outcomes = _fork_ranks(tmp_path, 3, _stopped, missing=[2])
    for message, seconds in outcomes.values():
        assert "rank 2 of 3" in message
        assert "the global ranks of the group are [0, 1, 2]" in message
        assert seconds < 10
    assert any("has not come to this collective within 0.7 s" in m for m, _ in outcomes.values())


def _different_calls(tp):
    message = (
        f"collective: rank {1 - tp.rank} of 2 called another collective, or the same with another"
    )
    with pytest.raises(RuntimeError, match=message):
        collectives.all_reduce(torch.ones(5 + tp.rank), tp)
    collectives.broadcast(torch.ones(1), tp)


def test_different_calls_are_refused_and_the_channel_stays_broken(tmp_path):
    for rank, (message, _) in _fork_ranks(tmp_path, 2, _different_calls).items():
        assert f"an earlier collective of this group failed on rank {1 - rank} of 2" in message


def _gone(tp):
    if tp.rank == 0:
        shared_memory._CHANNELS.clear()
        gc.collect()
        return "dropped"
    return collectives.all_reduce(torch.ones(5), tp)


def test_a_rank_that_dropped_its_group_is_named(tmp_path):
    outcomes = _fork_ranks(tmp_path, 2, _gone)
    assert outcomes[0][0] == "dropped"
    assert "rank 0 of 2 has ended" in outcomes[1][0]
    assert outcomes[1][1] < 10
