"""How a matrix is cut into tiles, and how many programs share the rows of a backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# 16 elements per thread: two 16-byte accesses in half precision, and few enough registers that
# several programs share a multiprocessor.
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 16
_MAX_ROWS = 128


class Tile(NamedTuple):
    """The piece of a matrix that a program holds at once; both sides are powers of two."""

    rows: int
    columns: int
    num_warps: int


def tile_for(
    num_columns: int, *, elements: int, max_columns: int, max_rows: int = _MAX_ROWS
) -> Tile:
    """A tile of about `elements` elements; whole rows, unless they exceed `max_columns`.

    At least four columns, the width of a group of random words. No more than `max_rows` rows,
    rounded up to a power of two.
    """
    columns = min(max(4, triton.next_power_of_2(num_columns)), max_columns)
    rows = min(max(1, elements // columns), _MAX_ROWS, triton.next_power_of_2(max(1, max_rows)))
    num_warps = min(_MAX_WARPS, max(1, rows * columns // _ELEMENTS_PER_WARP))
    return Tile(rows, columns, num_warps)


def row_groups(x: Tensor, tile: Tile, *, column_blocks: int, resident_warps: int) -> int:
    """Into how many groups a backward pass splits the rows of x [rows, columns].

    One program walks through one group of one block of columns and keeps its column sums in
    registers, so each group leaves one row of partial sums: there are no more of them than programs
    run at a time, with `resident_warps` warps on each multiprocessor.
    """
    processors = 1
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = processors * max(1, resident_warps // tile.num_warps)
    tiles = triton.cdiv(x.shape[0], tile.rows)
    return max(1, min(tiles, triton.cdiv(programs, column_blocks)))


def column_sums(partial: Tensor | None, x: Tensor) -> Tensor:
    """The second stage: partial sums [groups, columns] added in a fixed order; empty for None."""
    return x.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(dim=0)


def launching_on(x: Tensor) -> AbstractContextManager:
    """Kernels start on the current device: makes that the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
