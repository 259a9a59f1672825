from __future__ import annotations

import pytest
import torch

from tpcore.parallel.random import RandomStreams

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def _expected(seed, count, device):
    """The first draws of a generator of that seed, two at a time."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.rand(2, generator=generator, device=device) for _ in range(count)]


def _draw(device):
    return torch.rand(2, device=device)


def _streams(device, **seeds):
    streams = RandomStreams(device)
    for name, seed in seeds.items():
        streams.add(name, seed)
    return streams


@on_each_device
def test_a_fork_draws_from_its_stream_and_leaves_the_default_alone(device):
    streams = _streams(device, a=5, b=6)
    torch.manual_seed(1)
    a, b, default = _expected(5, 3, device), _expected(6, 1, device), _expected(1, 3, device)
    assert torch.equal(_draw(device), default[0])
    with streams.fork("a"):
        assert torch.equal(_draw(device), a[0])
        assert torch.equal(_draw(device), a[1])
    assert torch.equal(_draw(device), default[1])
    with streams.fork("b"):
        assert torch.equal(_draw(device), b[0])
    with streams.fork("a"):
        assert torch.equal(_draw(device), a[2])
    assert torch.equal(_draw(device), default[2])
    assert streams.names == ("a", "b")


@on_each_device
def test_forks_nest_also_into_a_stream_that_runs(device):
    streams = _streams(device, a=5, b=6)
    torch.manual_seed(1)
    a, b, default = _expected(5, 5, device), _expected(6, 2, device), _expected(1, 1, device)
    drawn = []
    with streams.fork("a"):
        drawn.append(_draw(device))
        with streams.fork("b"):
            assert torch.equal(_draw(device), b[0])
            with streams.fork("a"):
                drawn.append(_draw(device))
            assert torch.equal(_draw(device), b[1])
        drawn.append(_draw(device))
        with streams.fork("a"):
            drawn.append(_draw(device))
        drawn.append(_draw(device))
    # No number of a stream is drawn twice.
    assert torch.equal(torch.stack(drawn), torch.stack(a))
    assert torch.equal(_draw(device), default[0])


def test_an_exception_leaves_everything_in_place():
    streams = _streams("cpu", a=5)
    torch.manual_seed(1)
    with pytest.raises(ZeroDivisionError), streams.fork("a"):
        _draw("cpu") / (1 // 0)
    assert torch.equal(_draw("cpu"), _expected(1, 1, "cpu")[0])
    with streams.fork("a"):
        assert torch.equal(_draw("cpu"), _expected(5, 2, "cpu")[1])


@on_each_device
def test_states_can_be_kept_and_put_back(device):
    streams = _streams(device, a=5, b=6)
    with streams.fork("a"):
        _draw(device)
        states = streams.get_states()  # of a running stream: where it is now
        first = _draw(device), _draw(device)
    streams.set_states(states)
    with streams.fork("a"):
        assert torch.equal(_draw(device), first[0])
        streams.set_states(states)  # while it runs
        assert torch.equal(_draw(device), first[0])
        assert torch.equal(_draw(device), first[1])
    states["a"].zero_()  # a copy
    with streams.fork("a"):
        _draw(device)
    # In another process: other streams may be there.
    other = RandomStreams(device)
    other.set_states(streams.get_states())
    with streams.fork("b"):
        expected = _draw(device)
    with other.fork("b"):
        assert torch.equal(_draw(device), expected)


def test_reset_forgets_names_and_seeds():
    streams = _streams("cpu", a=5)
    with streams.fork("a"), pytest.raises(ValueError, match="'a' is running"):
        streams.reset()
    streams.reset()
    assert streams.names == ()
    streams.add("a", 5)
    with streams.fork("a"):
        assert torch.equal(_draw("cpu"), _expected(5, 1, "cpu")[0])


def test_errors():
    streams = _streams("cpu", a=5)
    with pytest.raises(ValueError, match="there is a stream 'a' already; streams: 'a'"):
        streams.add("a", 7)
    with pytest.raises(ValueError, match="seed=5 of the stream 'b' is that of 'a'"):
        streams.add("b", 5)
    with (
        pytest.raises(ValueError, match=r"no stream 'c'; add\(name, seed\) first; streams: 'a'"),
        streams.fork("c"),
    ):
        pass
    with streams.fork("a"), pytest.raises(ValueError, match="states has no 'a', which is running"):
        streams.set_states({})
