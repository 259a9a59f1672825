"""Matrix products of few different numbers of rows, where a new number is expensive.

On a CPU oneDNN compiles each product in half precision anew for each number of rows: 0.5 to 4 ms,
and about a megabyte that stays (docs/memory.md). Packed batches have ever new numbers of tokens, so
they are rounded up. In float32 torch multiplies without compiling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tpcore.layers.linear_function import dtype_of_products


def row_step(weight: Tensor, rows: int) -> int:
    """What to make the number of rows of a product with `weight` a multiple of; 1: nothing gained.

    At least 32; of more than 512 rows a 16th to a 32nd, so that 16 numbers are left between each
    power of two and the next.
    """
    if weight.device.type != "cpu" or dtype_of_products(weight).itemsize != 2:
        return 1
    return max(32, 1 << max(0, rows.bit_length() - 5))


def missing_rows(weight: Tensor, rows: int) -> int:
    """How many rows are missing to the next such multiple."""
    return -rows % row_step(weight, rows)


def on_rounded_rows(function: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor) -> Tensor:
    """function(x) for a function of each row that multiplies by `weight`; x [rows, columns]."""
    rows = x.shape[0]
    missing = missing_rows(weight, rows)
    return function(F.pad(x, (0, 0, 0, missing)))[:rows] if missing else function(x)
