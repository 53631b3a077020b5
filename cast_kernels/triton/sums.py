"""Kernels for the second stage of vector gradients: fixed-order sums, no atomics.

`reduce_rows` adds up the partial sums that programs left; `position_sums` adds up the rows that share a position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns of a program: 64 fp32 are two 128-byte lines a row, and 12 programs cover the paper's largest vector.
COLUMNS = 64
#: Rows added at a time, so that loads overlap.
ROWS = 32
#: Members of a position that one program of `position_sums` adds; more are split, or frames' eight positions would
#: keep eight programs busy with a thousand rows each.
MEMBERS = 128


@triton.jit(do_not_specialize=["rows", "width", "first_columns", "second_columns"])
def reduce_rows(
    partial, out0, out1, out2, rows, width, first_columns, second_columns,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum partial [rows, width] over rows; columns go to out0, then out1, then out2, each as long as its share."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = column < width
    total = tl.zeros((BC,), tl.float32)
    for r in range(0, rows, BR):
        row = (r + tl.arange(0, BR)).to(tl.int64)
        value = tl.load(
            partial + row[:, None] * width + column[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(value, 0)
    end = first_columns + second_columns
    tl.store(out0 + column, total.to(out0.dtype.element_ty), mask=inside & (column < first_columns))
    middle = inside & (column >= first_columns) & (column < end)
    tl.store(out1 + (column - first_columns), total.to(out1.dtype.element_ty), mask=middle)
    tl.store(out2 + (column - end), total.to(out2.dtype.element_ty), mask=inside & (column >= end))


@triton.jit(do_not_specialize=["clips", "frames", "patches", "splits", "by_frame", "by_patch", "members"])
def position_sums(
    x, partial, clips, frames, patches, splits, by_frame, by_patch, members,
    D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial [splits, W, D] = sums of the rows of x [B*T*N, D] at position frame * by_frame + patch * by_patch.

    The grid is (W, columns, splits). A position's members are its clips, times what its window leaves out: patches
    where it counts frames, frames where it counts patches.
    """
    position, split = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    share = tl.cdiv(members, splits)
    end = tl.minimum((split + 1) * share, members)
    total = tl.zeros((BC,), tl.float32)
    for r in range(split * share, end, BR):
        member = (r + tl.arange(0, BR)).to(tl.int64)
        if by_patch == 0:  # the window is one patch's frames
            row = (member // patches * frames + position) * patches + member % patches
        elif by_frame == 0:  # one frame's patches
            row = member * patches + position
        else:  # a whole clip
            row = member * frames * patches + position
        value = tl.load(
            x + row[:, None] * D + column[None, :], mask=(member < end)[:, None] & (column < D)[None, :], other=0.0
        )
        total += tl.sum(value.to(tl.float32), 0)
    at = (split.to(tl.int64) * tl.num_programs(0) + position) * D + column
    tl.store(partial + at, total, mask=column < D)


def reduce(partial: Tensor, outputs: list[Tensor]) -> None:
    """Sum partial [rows, width] over its rows into up to three vectors that share its columns, in their dtypes."""
    rows, width = partial.shape
    first, second, third = (*outputs, *[outputs[-1]] * (3 - len(outputs)))
    lengths = [x.numel() for x in outputs] + [0, 0]
    reduce_rows[(triton.cdiv(width, COLUMNS),)](
        partial, first, second, third, rows, width, lengths[0], lengths[1], BR=ROWS, BC=COLUMNS, num_warps=2
    )


def sum_positions(x: Tensor, table: Tensor, clips: int, frames: int, patches: int, by: tuple[int, int]) -> None:
    """table [W, D] = sums of the rows of x [clips * frames * patches, D] at each position.

    Args:
        by: (by_frame, by_patch): a row's position is frame * by_frame + patch * by_patch.
    """
    length, width = table.shape
    members = clips * frames * patches // length
    splits = triton.cdiv(members, MEMBERS)
    partial = x.new_empty((splits, length * width), dtype=torch.float32)
    grid = (length, triton.cdiv(width, COLUMNS), splits)
    position_sums[grid](
        x, partial, clips, frames, patches, splits, *by, members, D=width, BR=ROWS, BC=COLUMNS, num_warps=2
    )
    reduce(partial, [table])
