"""Cross entropy on a shard of the vocabulary in Triton; formulas in `tpcore.kernels.cross_entropy`.

Bytes per logit of s bytes: statistics s, in one pass with a running maximum; backward 2s (logits,
grad_logits): 6 for bfloat16 in all. Rows whose target is ignored are not read: their statistics are
those of a loss of 0, which is (0, 1, 0, 0), and their gradient is written as 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tpcore.kernels.triton.rows import load_per_row, row_max, row_sum, rows_of
from tpcore.kernels.triton.tiles import Tile, launching_on, tile_for

_NOT_SPECIALIZED = ["num_rows", "num_live", "vocab_start", "num_classes", "ignore_index"]


@triton.jit
def _load(logits_rows, columns, counted, num_columns):
    """Padding included: its end is aligned where that of the classes is not, so loads stay wide."""
    z = tl.load(logits_rows + columns, mask=counted & (columns < num_columns), other=0.0)
    return z.to(tl.float32)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _statistics_kernel(
    logits,
    target,
    max_out,
    sum_exp_out,
    target_logit_out,
    sum_out,
    num_rows,
    num_columns,
    num_live,
    vocab_start,
    num_classes,
    ignore_index,
    logits_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = rows_of(tl.program_id(0), ROWS)
    in_rows = rows < num_rows
    wanted = load_per_row(target, rows, in_rows, ignore_index, ROWS)
    counted = wanted != ignore_index
    logits_rows = logits + rows * logits_stride
    top = tl.where(counted, float("-inf"), 0.0)
    sum_exp = tl.zeros([ROWS, BLOCK], tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    end = num_live
    if ROWS == 1:
        end = tl.where(counted, num_live, 0)
    for start in range(0, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        inside = counted & (columns < num_live)
        z = _load(logits_rows, columns, counted, num_columns)
        z = tl.where(inside, z, float("-inf"))
        new = tl.maximum(top, row_max(z))
        shift = tl.where(new == float("-inf"), 0.0, new)
        sum_exp = sum_exp * tl.exp(top - shift) + tl.exp(z - shift)
        total += tl.where(inside, z, 0.0)
        top = new
    local = wanted - vocab_start
    own = counted & (local >= 0) & (local < num_live)
    target_logit = tl.load(logits_rows + local, mask=own, other=0.0).to(tl.float32)
    invalid = counted & ((wanted < 0) | (wanted >= num_classes))
    target_logit = tl.where(invalid, float("nan"), target_logit)
    row_sum_exp = row_sum(sum_exp)
    tl.store(max_out + rows, top, mask=in_rows)
    tl.store(sum_exp_out + rows, tl.where(counted, row_sum_exp, 1.0), mask=in_rows)
    tl.store(target_logit_out + rows, target_logit, mask=in_rows)
    tl.store(sum_out + rows, row_sum(total), mask=in_rows)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _backward_kernel(
    grad_loss,
    logits,
    target,
    maximum,
    sum_exp,
    grad_logits,
    num_rows,
    num_columns,
    num_live,
    vocab_start,
    ignore_index,
    logits_stride,
    confidence,
    uniform,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column_blocks = tl.cdiv(num_columns, BLOCK)
    program = tl.program_id(0)
    rows = rows_of(program // column_blocks, ROWS)
    columns = program % column_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_rows = rows < num_rows
    wanted = load_per_row(target, rows, in_rows, ignore_index, ROWS)
    counted = wanted != ignore_index
    inside = counted & (columns < num_live)
    z = _load(logits + rows * logits_stride, columns, counted, num_columns)
    top = load_per_row(maximum, rows, counted, 0.0, ROWS)
    scale = 1.0 / load_per_row(sum_exp, rows, counted, 1.0, ROWS)
    grad = load_per_row(grad_loss, rows, counted, 0.0, ROWS)
    local = wanted - vocab_start
    local = tl.where((local >= 0) & (local < num_live), local, -1).to(tl.int32)
    share = tl.where(columns == local, confidence + uniform, uniform)
    value = tl.where(inside, grad * (tl.exp(z - top) * scale - share), 0.0)
    tl.store(
        grad_logits + rows * num_columns + columns, value, mask=in_rows & (columns < num_columns)
    )


def _tile(num_columns: int) -> Tile:
    return tile_for(num_columns, elements=4096, max_columns=4096)


def _live_columns(logits: Tensor, vocab_start: int, num_classes: int) -> int:
    """How many columns are classes; those after them are padding."""
    return max(0, min(logits.shape[1], num_classes - vocab_start))


def cross_entropy_statistics(
    logits: Tensor, target: Tensor, vocab_start: int, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_columns = logits.shape
    maximum, sum_exp, target_logit, sum_logits = (
        logits.new_empty(num_rows, dtype=torch.float32) for _ in range(4)
    )
    tile = _tile(num_columns)
    with launching_on(logits):
        _statistics_kernel[(triton.cdiv(num_rows, tile.rows),)](
            logits,
            target,
            maximum,
            sum_exp,
            target_logit,
            sum_logits,
            num_rows,
            num_columns,
            _live_columns(logits, vocab_start, num_classes),
            vocab_start,
            num_classes,
            ignore_index,
            logits.stride(0),
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
    return maximum, sum_exp, target_logit, sum_logits


def cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    vocab_start: int,
    num_classes: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    num_rows, num_columns = logits.shape
    grad_logits = logits.new_empty(logits.shape)
    tile = _tile(num_columns)
    grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns),)
    with launching_on(logits):
        _backward_kernel[grid](
            grad_loss,
            logits,
            target,
            maximum,
            sum_exp,
            grad_logits,
            num_rows,
            num_columns,
            _live_columns(logits, vocab_start, num_classes),
            vocab_start,
            ignore_index,
            logits.stride(0),
            1.0 - label_smoothing,
            label_smoothing / num_classes,
            ROWS=tile.rows,
            BLOCK=tile.columns,
            num_warps=tile.num_warps,
        )
    return grad_logits
