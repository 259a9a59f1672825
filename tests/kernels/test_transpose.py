"""The raw op transpose16: exact, whatever the sizes, strides, bits and threads."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.harness import require

OP = torch.ops.tpcore.transpose16
SIZES = [
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 40),
    (40, 1),
    (31, 33),
    (32, 32),
    (33, 31),
    (70, 259),
    (459, 96),
]
by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _compiled():
    require("cpu")


def _bits(*shape):
    """Every pattern of 16 bits is as likely, those of NaN too."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-(1 << 15), 1 << 15, shape, generator=generator, dtype=torch.int16)


@by_dtype
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_bit_arrives(shape, dtype):
    x = _bits(*shape)
    y = OP(x.view(dtype))
    assert y.dtype == dtype
    assert y.shape == shape[::-1]
    assert torch.equal(y.view(torch.int16), x.t())


@by_dtype
def test_rows_begin_on_cache_lines_an_odd_number_apart_with_zeros_between(dtype):
    for rows in (1, 32, 33, 64, 65, 459):
        y = OP(_bits(rows, 7).view(dtype))
        assert y.stride(1) == 1
        assert y.stride(0) > rows
        assert y.stride(0) % 64 == 32
        assert y.data_ptr() % 64 == 0
        between = y.as_strided((7, y.stride(0) - rows), y.stride(), rows).view(torch.int16)
        assert not between.any()


def test_columns_of_a_wider_matrix():
    wide = _bits(45, 200)
    assert torch.equal(
        OP(wide.view(torch.bfloat16)[:, 3:120]).view(torch.int16), wide[:, 3:120].t()
    )


def test_the_number_of_threads_does_not_matter():
    x, threads = _bits(700, 300).view(torch.bfloat16), torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(OP(x).view(torch.int16), x.view(torch.int16).t())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, dtype=torch.bfloat16), "expected two dimensions"),
        (torch.zeros(3, 4), "expected bfloat16 or float16"),
        (torch.zeros(3, 4, dtype=torch.bfloat16).t(), "not contiguous"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(RuntimeError, match=message):
        OP(x)


def test_opcheck():
    for rows in (5, 33, 70):
        torch.library.opcheck(OP, (torch.randn(rows, 9).bfloat16(),))
