"""Kernel `reduce_rows`: the second stage of all vector gradients of one op in one launch, in a fixed order, no atomics.

It adds up the partial sums that programs left, a row each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

#: Columns of a program: 64 fp32 are two 128-byte lines a row, and 12 programs cover the paper's largest vector.
COLUMNS = 64
#: Rows added at a time, so that loads overlap.
ROWS = 32
#: Reductions that one launch takes: B-CAST has two for each of its three backward kernels.
MOST = 6


class Reduction(NamedTuple):
    """Column sums that are to be made: the columns of partial [rows, width] go to the outputs, one behind the other."""

    partial: Tensor  # float32
    outputs: Sequence[Tensor]  # one to three vectors of one dtype, `width` elements together


@triton.jit(do_not_specialize=[f"{name}{i}" for i in range(6) for name in ("rows", "width", "middle", "last", "end")])
def reduce_rows(
    partial0, partial1, partial2, partial3, partial4, partial5,
    first0, first1, first2, first3, first4, first5,
    second0, second1, second2, second3, second4, second5,
    third0, third1, third2, third3, third4, third5,
    rows0, rows1, rows2, rows3, rows4, rows5,
    width0, width1, width2, width3, width4, width5,
    middle0, middle1, middle2, middle3, middle4, middle5,
    last0, last1, last2, last3, last4, last5,
    end0, end1, end2, end3, end4,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum each partial [rows, width] over rows: columns below `middle` go to first, those below `last` to second.

    One reduction behind the other: number i ends before program `end<i>`.
    """
    tile = tl.program_id(0)
    partial, first, second, third, rows, width = partial0, first0, second0, third0, rows0, width0
    middle, last, start = middle0, last0, 0
    if tile >= end0:
        partial, first, second, third, rows, width = partial1, first1, second1, third1, rows1, width1
        middle, last, start = middle1, last1, end0
    if tile >= end1:
        partial, first, second, third, rows, width = partial2, first2, second2, third2, rows2, width2
        middle, last, start = middle2, last2, end1
    if tile >= end2:
        partial, first, second, third, rows, width = partial3, first3, second3, third3, rows3, width3
        middle, last, start = middle3, last3, end2
    if tile >= end3:
        partial, first, second, third, rows, width = partial4, first4, second4, third4, rows4, width4
        middle, last, start = middle4, last4, end3
    if tile >= end4:
        partial, first, second, third, rows, width = partial5, first5, second5, third5, rows5, width5
        middle, last, start = middle5, last5, end4
    column = (tile - start) * BC + tl.arange(0, BC)
    inside = column < width
    total = tl.zeros((BC,), tl.float32)
    for r in range(0, rows, BR):
        row = (r + tl.arange(0, BR)).to(tl.int64)
        value = tl.load(
            partial + row[:, None] * width + column[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(value, 0)
    rounded = total.to(first.dtype.element_ty)
    tl.store(first + column, rounded, mask=inside & (column < middle))
    tl.store(second + (column - middle), rounded, mask=inside & (column >= middle) & (column < last))
    tl.store(third + (column - last), rounded, mask=inside & (column >= last))


def reduce(reductions: Sequence[Reduction]) -> None:
    """Do 1 to :data:`MOST` of them; all outputs have one dtype."""
    filled = [*reductions, *[reductions[-1]] * (MOST - len(reductions))]
    columns: list[list[Tensor | int]] = []
    ends, total = [], 0
    for number, (partial, outputs) in enumerate(filled):
        rows, width = partial.shape
        middle = outputs[0].numel()
        last = middle + (outputs[1].numel() if len(outputs) > 1 else 0)
        columns.append([partial, *outputs, *[outputs[-1]] * (3 - len(outputs)), rows, width, middle, last])
        total += triton.cdiv(width, COLUMNS) if number < len(reductions) else 0
        ends.append(total)
    arguments = [value for column in zip(*columns, strict=True) for value in column]
    reduce_rows[(total,)](*arguments, *ends[:-1], BR=ROWS, BC=COLUMNS, num_warps=2)
