"""Kernels for the gradients of all position tables: `position_sums`, then `position_products`, one launch each.

A table's gradient is the sum of dQ Wq (or [dK dV] Wkv) over the rows at each position. Summing comes first, for it is
linear: products of a table's rows remain, and the rows' own products need not be kept. Fixed order, no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from cast_kernels.triton.blocks import dot, odd, unodd
from cast_kernels.triton.launch import Buffer, Planner, as_odd

#: Columns of a program of `position_sums`, and rows that it adds at a time.
COLUMNS, ROWS = 64, 32
#: Members of a position that one program adds; more are split, or frames' eight positions would keep few programs
#: busy with a thousand rows each.
MEMBERS = 256
#: Tile of `position_products`: [positions, channels in], and channels out of a step. Small, as the tables are.
_TILE = {"BM": 16, "BN": 64, "BK": 32}


class Table(NamedTuple):
    """One table's gradient that is to be made."""

    x: Buffer  # [clips * frames * patches, out], gradients of what was projected
    weight: Buffer  # [out, D], of the projection
    grad: Buffer  # [W, D], written
    by: tuple[int, int]  # a row's position is frame * by[0] + patch * by[1]


class Sum(NamedTuple):
    """One table as `position_sums` takes it. 16 divides widths: a compiler that knows it loads four at a time."""

    x: Any  # [rows, width]
    partial: Any  # [splits, length, width] in fp32, written
    width: Any
    length: Any  # odd
    splits: Any  # odd
    by_frame: Any  # odd
    by_patch: Any  # odd
    end: Any  # odd: the program before which the table ends


class Product(NamedTuple):
    """One table as `position_products` takes it."""

    partial: Any  # [splits, length, width] in fp32
    weight: Any  # [width, D]
    out: Any  # [length, D], written
    width: Any
    length: Any  # odd
    splits: Any  # odd
    end: Any  # odd: the program before which the table ends


@triton.jit(do_not_specialize=["rows", "frames", "patches"])
def position_sums(tables, rows, frames, patches, BR: tl.constexpr, BC: tl.constexpr):
    """Every table's partial = sums of rows of x at each position, one table behind the other.

    A position's members are its clips, times what its window leaves out: patches where it counts frames, frames where
    it counts patches.
    """
    tile = tl.program_id(0)
    own, start = tables[0], odd(0)
    for i in tl.static_range(1, len(tables)):
        if odd(tile) >= tables[i - 1].end:
            own, start = tables[i], tables[i - 1].end
    tile -= unodd(start)
    length, splits, by_frame, by_patch = unodd(own.length), unodd(own.splits), unodd(own.by_frame), unodd(own.by_patch)
    blocks = tl.cdiv(own.width, BC)
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
        here = (member < end)[:, None] & (column < own.width)[None, :]
        value = tl.load(own.x + row.to(tl.int64)[:, None] * own.width + column[None, :], mask=here, other=0.0)
        total += tl.sum(value.to(tl.float32), 0)
    at = (split.to(tl.int64) * length + position) * own.width + column
    tl.store(own.partial + at, total, mask=column < own.width)


@triton.jit
def position_products(tables, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Every table's out [length, D] = sum over splits of partial [splits, length, width] @ weight [width, D].

    In fp32.
    """
    tile = tl.program_id(0)
    own, start = tables[0], odd(0)
    for i in tl.static_range(1, len(tables)):
        if odd(tile) >= tables[i - 1].end:
            own, start = tables[i], tables[i - 1].end
    tile -= unodd(start)
    partial, weight, out, width, length, splits = (
        own.partial, own.weight, own.out, own.width, unodd(own.length), unodd(own.splits),
    )  # fmt: skip
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


def add(planner: Planner, tables: Sequence[Table], frames: int, patches: int) -> None:
    """Plan every table's `grad`.

    Args:
        planner: of the buffers.
        tables: at least one; `x` and `weight` of one dtype, `grad` of one dtype.
        frames, patches: of a clip.
    """
    rows, d = tables[0].x.shape[0], tables[0].weight.shape[1]
    widths, lengths = [table.x.shape[1] for table in tables], [table.grad.shape[0] for table in tables]
    splits = [triton.cdiv(rows // length, MEMBERS) for length in lengths]
    shapes = list(zip(splits, lengths, widths, strict=True))
    partials = [planner.scratch(*shape, dtype=torch.float32) for shape in shapes]
    ends = list(accumulate(split * length * triton.cdiv(width, COLUMNS) for split, length, width in shapes))
    summed = tuple(
        Sum(table.x, partial, width, *map(as_odd, (length, split, *table.by, end)))
        for table, partial, (split, length, width), end in zip(tables, partials, shapes, ends, strict=True)
    )
    planner.launch(position_sums, (ends[-1],), summed, rows, frames, patches, BR=ROWS, BC=COLUMNS, num_warps=2)
    ends = list(accumulate(triton.cdiv(n, _TILE["BM"]) * triton.cdiv(d, _TILE["BN"]) for n in lengths))
    products = tuple(
        Product(partial, table.weight, table.grad, width, as_odd(length), as_odd(split), as_odd(end))
        for table, partial, (split, length, width), end in zip(tables, partials, shapes, ends, strict=True)
    )
    planner.launch(position_products, (ends[-1],), products, D=d, **_TILE, num_warps=4)
