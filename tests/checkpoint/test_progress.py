"""The bar of a long conversion: on a terminal only, and it reaches its end."""

import io
import math

import pytest

from tests.checkpoint import tiny
from tpcore import checkpoint
from tpcore.checkpoint import progress
from tpcore.checkpoint.io import _read

pytest.importorskip("rich")


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def source(tmp_path):
    return tiny.write_megatron(tmp_path / "a", tiny.random_model())


@pytest.mark.parametrize("to", ["megatron", "megatron-core", "nemo", "huggingface"])
def test_a_bar_counts_every_byte_that_is_written(source, tmp_path, monkeypatch, to):
    seen = []
    total = []
    from rich.progress import Progress

    original, added = Progress.advance, Progress.add_task
    monkeypatch.setattr(progress, "SHOWN_FROM_BYTES", 0)
    monkeypatch.setattr("sys.stderr", _Terminal())

    def add(self, description, **options):
        total.append(options["total"])
        return added(self, description, **options)

    def advance(self, task, count):
        seen.append(count)
        original(self, task, count)

    monkeypatch.setattr(Progress, "add_task", add)
    monkeypatch.setattr(Progress, "advance", advance)
    size = 1 if to == "huggingface" else 2
    checkpoint.convert(source, tmp_path / "out", to=to, tensor_parallel_size=size)
    (expected,) = total
    state = _read(source, None, {})
    assert expected >= 4 * sum(math.prod(tensor.shape) for tensor in state.tensors.values())
    assert sum(seen) == expected
    assert len(seen) > len(state.tensors) - 2  # it moves all the time, not once at the end


def test_what_stands_before_the_bar_is_the_destination(source, tmp_path, monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(progress, "SHOWN_FROM_BYTES", 0)
    monkeypatch.setattr("sys.stderr", terminal)
    checkpoint.convert(source, tmp_path / "converted", to="megatron")
    assert "converted" in terminal.getvalue()


@pytest.mark.parametrize("kind", ["a file", "short"])
def test_otherwise_nothing_is_printed(source, tmp_path, monkeypatch, kind):
    stream = io.StringIO() if kind == "a file" else _Terminal()
    if kind == "a file":
        monkeypatch.setattr(progress, "SHOWN_FROM_BYTES", 0)
    monkeypatch.setattr("sys.stderr", stream)
    checkpoint.convert(source, tmp_path / "out", to="megatron")
    assert stream.getvalue() == ""
