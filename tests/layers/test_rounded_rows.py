"""Numbers of rows: few of them where products are compiled for each."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.device import on_the_cpu
from tpcore.layers.rounded_rows import missing_rows, on_rounded_rows, row_step

pytestmark = on_the_cpu

HALF = torch.empty(0, device="cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("rows", "rounded"),
    [(0, 0), (1, 32), (32, 32), (33, 64), (511, 512), (513, 544), (1025, 1088), (6000, 6144)],
)
def test_rounded(rows, rounded):
    assert rows + missing_rows(HALF, rows) == rounded


def test_few_numbers_are_left_and_little_is_added():
    rounded = {rows: rows + missing_rows(HALF, rows) for rows in range(1, 8193)}
    assert all(0 <= more - rows < max(32, rows / 16 + 1) for rows, more in rounded.items())
    for low in (512, 1024, 2048, 4096):
        assert len({rounded[rows] for rows in range(low + 1, 2 * low + 1)}) == 16


def test_where_nothing_is_rounded():
    for dtype in (torch.float32, torch.float64):
        assert row_step(torch.empty(0, dtype=dtype), 100) == 1
    assert row_step(HALF.to("meta"), 100) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert row_step(torch.empty(0), 100) == 32
        assert row_step(torch.empty(0, dtype=torch.float64), 100) == 1


@pytest.mark.parametrize("rows", [1, 32, 37])
def test_the_function_of_each_row_is_the_same(rows):
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 24, generator=draw).bfloat16().requires_grad_()
    weight = torch.randn(5, 24, generator=draw).bfloat16().requires_grad_()
    seen = []

    def function(x):
        seen.append(len(x))
        return x @ weight.t()

    y = on_rounded_rows(function, weight, x)
    assert seen == [rows + missing_rows(weight, rows)]
    torch.testing.assert_close(y, x @ weight.t())
    grad = torch.randn(rows, 5, generator=draw).bfloat16()
    found = torch.autograd.grad(y, (x, weight), grad)
    expected = torch.autograd.grad(x @ weight.t(), (x, weight), grad)
    torch.testing.assert_close(found, expected)
