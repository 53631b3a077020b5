"""Kernels for the gradients of all position tables: `position_sums`, then `position_products`, one launch each.

A table's gradient is the sum of dQ Wq (or [dK dV] Wkv) over the rows at each position. Summing comes first, for it is
linear: products of a table's rows remain, and the rows' own products need not be kept. Fixed order, no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels.triton.blocks import dot

#: Columns of a program of `position_sums`, and rows that it adds at a time.
COLUMNS, ROWS = 64, 32
#: Members of a position that one program adds; more are split, or frames' eight positions would keep few programs
#: busy with a thousand rows each.
MEMBERS = 256
#: Tables of one launch: two for each direction. Widths are left to Triton's specialisation, which finds that 16 divides
#: them: without it, elements are loaded one by one.
MOST = 4
#: Tile of `position_products`: [positions, channels in], and channels out of a step. Small, as the tables are.
_TILE = {"BM": 16, "BN": 64, "BK": 32}


class Table(NamedTuple):
    """One table's gradient that is to be made."""

    x: Tensor  # [clips * frames * patches, out], gradients of what was projected
    weight: Tensor  # [out, D], of the projection
    grad: Tensor  # [W, D], written
    by: tuple[int, int]  # a row's position is frame * by[0] + patch * by[1]


@triton.jit(do_not_specialize=[
    "frames", "patches",
    *(f"{name}{i}" for i in range(4) for name in ("length", "splits", "by_frame", "by_patch", "end")),
])  # fmt: skip
def position_sums(
    x0, x1, x2, x3, partial0, partial1, partial2, partial3, width0, width1, width2, width3,
    length0, length1, length2, length3, splits0, splits1, splits2, splits3,
    by_frame0, by_frame1, by_frame2, by_frame3, by_patch0, by_patch1, by_patch2, by_patch3, end0, end1, end2,
    rows, frames, patches,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial<i> [splits, length, width] = sums of rows of x<i> [rows, width] at each position, one i behind the other.

    A position's members are its clips, times what its window leaves out: patches where it counts frames, frames where
    it counts patches.
    """
    tile = tl.program_id(0)
    x, partial, width, length, splits, by_frame, by_patch = x0, partial0, width0, length0, splits0, by_frame0, by_patch0
    start = 0
    if tile >= end0:
        x, partial, width, length, splits = x1, partial1, width1, length1, splits1
        by_frame, by_patch, start = by_frame1, by_patch1, end0
    if tile >= end1:
        x, partial, width, length, splits = x2, partial2, width2, length2, splits2
        by_frame, by_patch, start = by_frame2, by_patch2, end1
    if tile >= end2:
        x, partial, width, length, splits = x3, partial3, width3, length3, splits3
        by_frame, by_patch, start = by_frame3, by_patch3, end2
    tile -= start
    blocks = tl.cdiv(width, BC)
    column = tile % blocks * BC + tl.arange(0, BC)
    position, split = tile // blocks % length, tile // blocks // length
    members = rows // length
    share = tl.cdiv(members, splits)
    end = tl.minimum((split + 1) * share, members)
    total = tl.zeros((BC,), tl.float32)
    for r in range(split * share, end, BR):
        member = r + tl.arange(0, BR)  # in 32 bits, for it is divided
        if by_patch == 0:  # the window is one patch's frames
            row = (member // patches * frames + position) * patches + member % patches
        elif by_frame == 0:  # one frame's patches
            row = member * patches + position
        else:  # a whole clip
            row = member * frames * patches + position
        here = (member < end)[:, None] & (column < width)[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * width + column[None, :], mask=here, other=0.0)
        total += tl.sum(value.to(tl.float32), 0)
    at = (split.to(tl.int64) * length + position) * width + column
    tl.store(partial + at, total, mask=column < width)


@triton.jit(do_not_specialize=[f"{name}{i}" for i in range(4) for name in ("length", "splits", "end")])
def position_products(
    partial0, partial1, partial2, partial3, weight0, weight1, weight2, weight3, out0, out1, out2, out3,
    width0, width1, width2, width3, length0, length1, length2, length3, splits0, splits1, splits2, splits3,
    end0, end1, end2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out<i> [length, D] = sum over splits of partial<i> [splits, length, width] @ weight<i> [width, D], in fp32."""
    tile = tl.program_id(0)
    partial, weight, out, width, length, splits = partial0, weight0, out0, width0, length0, splits0
    start = 0
    if tile >= end0:
        partial, weight, out, width, length, splits = partial1, weight1, out1, width1, length1, splits1
        start = end0
    if tile >= end1:
        partial, weight, out, width, length, splits = partial2, weight2, out2, width2, length2, splits2
        start = end1
    if tile >= end2:
        partial, weight, out, width, length, splits = partial3, weight3, out3, width3, length3, splits3
        start = end2
    tile -= start
    blocks: tl.constexpr = (D + BN - 1) // BN
    i = tile // blocks * BM + tl.arange(0, BM)
    j = tile % blocks * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, width, BK):
        inner = k + tl.arange(0, BK)
        summed = (i < length)[:, None] & (inner < width)[None, :]
        total = tl.zeros((BM, BK), tl.float32)
        for split in range(splits):
            at = (split * length + i).to(tl.int64)[:, None] * width + inner[None, :]
            total += tl.load(partial + at, mask=summed, other=0.0)
        inside = (inner < width)[:, None] & (j < D)[None, :]
        w = tl.load(weight + inner[:, None] * D + j[None, :], mask=inside, other=0.0)
        acc = dot(total, w.to(tl.float32), acc)
    here = (i < length)[:, None] & (j < D)[None, :]
    tl.store(out + i[:, None] * D + j[None, :], acc.to(out.dtype.element_ty), mask=here)


def launch(tables: Sequence[Table], frames: int, patches: int) -> None:
    """Fill every table's `grad`.

    Args:
        tables: 1 to :data:`MOST`; `x` and `weight` of one dtype, `grad` of one dtype, all contiguous.
        frames, patches: of a clip.
    """
    filled = [*tables, *[tables[-1]] * (MOST - len(tables))]
    rows, d = filled[0].x.shape[0], filled[0].weight.shape[1]
    widths, lengths = [table.x.shape[1] for table in filled], [table.grad.shape[0] for table in filled]
    splits = [triton.cdiv(rows // length, MEMBERS) for length in lengths]
    partials = [
        table.x.new_empty((split, length, width), dtype=torch.float32)
        for table, split, length, width in zip(tables, splits, lengths, widths, strict=False)
    ]
    partials += partials[-1:] * (MOST - len(tables))
    programs = [s * n * triton.cdiv(width, COLUMNS) for s, n, width in zip(splits, lengths, widths, strict=True)]
    ends = _ends(programs, len(tables))
    position_sums[(ends[-1],)](
        *(table.x for table in filled), *partials, *widths, *lengths, *splits, *(table.by[0] for table in filled),
        *(table.by[1] for table in filled), *ends[:-1], rows, frames, patches, BR=ROWS, BC=COLUMNS, num_warps=2,
    )  # fmt: skip
    ends = _ends([triton.cdiv(n, _TILE["BM"]) * triton.cdiv(d, _TILE["BN"]) for n in lengths], len(tables))
    position_products[(ends[-1],)](
        *partials, *(table.weight for table in filled), *(table.grad for table in filled), *widths, *lengths, *splits,
        *ends[:-1], D=d, **_TILE, num_warps=4,
    )  # fmt: skip


def _ends(programs: Sequence[int], count: int) -> list[int]:
    """Where each of `count` ends, if one lies behind the other; the others are empty."""
    return [sum(programs[: min(i + 1, count)]) for i in range(len(programs))]
