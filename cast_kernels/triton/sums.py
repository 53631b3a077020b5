"""Kernel `reduce_rows`: the second stage of all vector gradients of one op in one launch, in a fixed order, no atomics.

It adds up the partial sums that programs left, a row each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels.triton.blocks import odd, unodd
from cast_kernels.triton.launch import Buffer, Plan, Planner, as_odd, planned

#: Columns of a program: 64 fp32 are two 128-byte lines a row, and 12 programs cover the paper's largest vector.
COLUMNS = 64
#: Rows added at a time, so that loads overlap.
ROWS = 32


class Reduction(NamedTuple):
    """Column sums that are to be made: the columns of partial [rows, width] go to the outputs, one behind the other."""

    partial: Any  # float32
    outputs: Sequence[Any]  # one to three vectors of one dtype, `width` elements together


class Sums(NamedTuple):
    """One reduction as the kernel takes it."""

    partial: Any  # [rows, width] in fp32
    first: Any  # [middle], written
    second: Any  # [last - middle], written
    third: Any  # [width - last], written
    rows: Any  # odd
    width: Any
    middle: Any
    last: Any
    end: Any  # odd: the program before which the reduction ends


@triton.jit
def reduce_rows(reductions, BR: tl.constexpr, BC: tl.constexpr):
    """Sum each partial [rows, width] over rows: columns below `middle` go to first, those below `last` to second.

    One reduction behind the other.
    """
    tile = tl.program_id(0)
    own, start = reductions[0], odd(0)
    for i in tl.static_range(1, len(reductions)):
        if odd(tile) >= reductions[i - 1].end:
            own, start = reductions[i], reductions[i - 1].end
    rows = unodd(own.rows)
    column = (tile - unodd(start)) * BC + tl.arange(0, BC)
    inside = column < own.width
    total = tl.zeros((BC,), tl.float32)
    for r in range(0, rows, BR):
        row = (r + tl.arange(0, BR)).to(tl.int64)
        at = row[:, None] * own.width + column[None, :]
        total += tl.sum(tl.load(own.partial + at, mask=(row < rows)[:, None] & inside[None, :], other=0.0), 0)
    rounded = total.to(own.first.dtype.element_ty)
    tl.store(own.first + column, rounded, mask=inside & (column < own.middle))
    tl.store(own.second + (column - own.middle), rounded, mask=inside & (column >= own.middle) & (column < own.last))
    tl.store(own.third + (column - own.last), rounded, mask=inside & (column >= own.last))


def add(planner: Planner, reductions: Sequence[Reduction]) -> None:
    """Plan at least one of them, of buffers; all outputs have one dtype."""
    made, end = [], 0
    for partial, outputs in reductions:
        rows, width = partial.shape
        first, second, third = (*outputs, *[outputs[-1]] * (3 - len(outputs)))
        middle = first.shape[0]
        last = middle + (second.shape[0] if len(outputs) > 1 else 0)
        end += triton.cdiv(width, COLUMNS)
        made.append(Sums(partial, first, second, third, as_odd(rows), width, middle, last, as_odd(end)))
    planner.launch(reduce_rows, (end,), tuple(made), BR=ROWS, BC=COLUMNS, num_warps=2)


@planned
def _plan(shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], dtype: torch.dtype) -> Plan:
    planner = Planner()
    partials = [planner.given(*partial, dtype=torch.float32) for partial, _ in shapes]
    vectors: list[list[Buffer]] = [[planner.given(n, dtype=dtype) for n in lengths] for _, lengths in shapes]
    add(planner, [Reduction(*pair) for pair in zip(partials, vectors, strict=True)])
    return planner.plan()


def reduce(reductions: Sequence[Reduction]) -> None:
    """Do at least one of them, of tensors; all outputs have one dtype."""
    given: list[Tensor] = [partial for partial, _ in reductions]
    given += [vector for _, outputs in reductions for vector in outputs]
    shapes = tuple((tuple(partial.shape), tuple(x.numel() for x in outputs)) for partial, outputs in reductions)
    _plan(shapes, given[-1].dtype).run(given)
