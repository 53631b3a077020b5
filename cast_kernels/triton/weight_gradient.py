"""Kernel `weight_gradient`: all weight gradients of one op in one launch, dW = dY^T X for up to ten layers.

A program owns one tile of one layer's gradient and sums over all rows, or over one of a few parts of them where that
fills the chip; then `sum_parts` adds up the parts. No atomics, and the same order of additions on every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels.triton.blocks import channels, dot, zeros
from cast_kernels.triton.tiles import Tile

#: Layers that one launch takes: B-CAST has two up-, two down-, two output, two query and two key-value projections.
LAYERS = 10
#: Parts of the rows, at most: each costs a write and a read of all gradients in float32.
MOST_PARTS = 4
#: Elements of a program of `sum_parts`.
_BLOCK = 1024


class Layer(NamedTuple):
    """One linear layer's gradient: weight [M, N] = left^T right."""

    left: Tensor  # [rows, M], gradient of the output
    right: Tensor  # [rows, N], input
    weight: Tensor  # [M, N], written


# Not `at` and `total`: 16 divides them, and a compiler that knows it loads and stores four elements at a time.
@triton.jit(do_not_specialize=["parts", *(f"{x}{i}" for i in range(10) for x in ("rows", "end"))])
def weight_gradient(
    left0, left1, left2, left3, left4, left5, left6, left7, left8, left9,
    right0, right1, right2, right3, right4, right5, right6, right7, right8, right9,
    out0, out1, out2, out3, out4, out5, out6, out7, out8, out9,
    rows0, rows1, rows2, rows3, rows4, rows5, rows6, rows7, rows8, rows9,
    m0, m1, m2, m3, m4, m5, m6, m7, m8, m9,
    n0, n1, n2, n3, n4, n5, n6, n7, n8, n9,
    end0, end1, end2, end3, end4, end5, end6, end7, end8,
    partial, at0, at1, at2, at3, at4, at5, at6, at7, at8, at9, parts, total,
    BM: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Tiles [BM, CHUNKS * CHUNK] of all gradients, one layer behind the other: layer i ends before tile `end<i>`.

    left<i> [rows, m], right<i> [rows, n], out<i> [m, n], row-major; sizes are multiples of 16. Unless WHOLE, program
    `tile * parts + part` takes its part of the rows and writes to partial [parts, total], the layer from `at<i>` on.
    """
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    left, right, out, rows, m, n, at = left0, right0, out0, rows0, m0, n0, at0
    start = 0
    if tile >= end0:
        left, right, out, rows, m, n, at, start = left1, right1, out1, rows1, m1, n1, at1, end0
    if tile >= end1:
        left, right, out, rows, m, n, at, start = left2, right2, out2, rows2, m2, n2, at2, end1
    if tile >= end2:
        left, right, out, rows, m, n, at, start = left3, right3, out3, rows3, m3, n3, at3, end2
    if tile >= end3:
        left, right, out, rows, m, n, at, start = left4, right4, out4, rows4, m4, n4, at4, end3
    if tile >= end4:
        left, right, out, rows, m, n, at, start = left5, right5, out5, rows5, m5, n5, at5, end4
    if tile >= end5:
        left, right, out, rows, m, n, at, start = left6, right6, out6, rows6, m6, n6, at6, end5
    if tile >= end6:
        left, right, out, rows, m, n, at, start = left7, right7, out7, rows7, m7, n7, at7, end6
    if tile >= end7:
        left, right, out, rows, m, n, at, start = left8, right8, out8, rows8, m8, n8, at8, end7
    if tile >= end8:
        left, right, out, rows, m, n, at, start = left9, right9, out9, rows9, m9, n9, at9, end8
    tile -= start
    BN: tl.constexpr = CHUNK * CHUNKS
    tiles_n = tl.cdiv(n, BN)
    i = tile // tiles_n * BM + tl.arange(0, BM)
    first = tile % tiles_n * BN
    share = tl.cdiv(tl.cdiv(rows, BK), parts) * BK
    end = tl.minimum(part * share + share, rows)
    acc = zeros(BM, CHUNK, CHUNKS)
    for k in tl.range(part * share, end, BK, num_stages=STAGES):
        row = (k + tl.arange(0, BK)).to(tl.int64)
        a = tl.load(left + row[:, None] * m + i[None, :], mask=(row < end)[:, None] & (i < m)[None, :], other=0.0)
        step = ()
        for c in tl.static_range(CHUNKS):
            j = first + channels(c, CHUNK)
            b = tl.load(right + row[:, None] * n + j[None, :], mask=(row < end)[:, None] & (j < n)[None, :], other=0.0)
            step += (dot(tl.trans(a), b, acc[c]),)
        acc = step
    for c in tl.static_range(CHUNKS):
        column = first + channels(c, CHUNK)
        here = (i < m)[:, None] & (column < n)[None, :]
        if WHOLE:
            tl.store(out + i[:, None] * n + column[None, :], acc[c].to(out.dtype.element_ty), mask=here)
        else:
            mine = partial + part.to(tl.int64) * total + at
            tl.store(mine + i[:, None] * n + column[None, :], acc[c], mask=here)


@triton.jit(do_not_specialize=["parts", *(f"end{i}" for i in range(9))])
def sum_parts(
    partial, out0, out1, out2, out3, out4, out5, out6, out7, out8, out9,
    at0, at1, at2, at3, at4, at5, at6, at7, at8, at9, end0, end1, end2, end3, end4, end5, end6, end7, end8,
    parts, total,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out<i>, flat, = sum over parts of partial [parts, total] from `at<i>` to `at<i + 1>`, or to the end."""
    tile = tl.program_id(0)
    out, at, end, start = out0, at0, at1, 0
    if tile >= end0:
        out, at, end, start = out1, at1, at2, end0
    if tile >= end1:
        out, at, end, start = out2, at2, at3, end1
    if tile >= end2:
        out, at, end, start = out3, at3, at4, end2
    if tile >= end3:
        out, at, end, start = out4, at4, at5, end3
    if tile >= end4:
        out, at, end, start = out5, at5, at6, end4
    if tile >= end5:
        out, at, end, start = out6, at6, at7, end5
    if tile >= end6:
        out, at, end, start = out7, at7, at8, end6
    if tile >= end7:
        out, at, end, start = out8, at8, at9, end7
    if tile >= end8:
        out, at, end, start = out9, at9, total, end8
    i = (tile - start) * BLOCK + tl.arange(0, BLOCK)
    inside = i < end - at
    value = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        value += tl.load(partial + tl.cast(part, tl.int64) * total + at + i, mask=inside, other=0.0)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


def launch(layers: Sequence[Layer], tile: Tile) -> None:
    """Fill every layer's `weight`.

    Args:
        layers: 1 to :data:`LAYERS`; operands of one dtype, weights of one dtype, all contiguous.
        tile: BM = `rows`, BK = `k`; `columns`, of 128 at most in one product; `programs` that fill the GPU.
    """
    filled = [*layers, *[layers[-1]] * (LAYERS - len(layers))]
    sizes = [layer.weight.shape for layer in layers]
    ends = _ends([triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns) for m, n in sizes])
    parts, chunk = split(ends[-1], tile.programs), math.gcd(tile.columns, 128)
    elements = _ends([m * n for m, n in sizes])
    begins = [0, *elements[:-1]]
    weights, first = [layer.weight for layer in filled], layers[0].left
    partial = first.new_empty((parts, elements[-1]) if parts > 1 else (1,), dtype=torch.float32)
    weight_gradient[(ends[-1] * parts,)](
        *(x.left for x in filled), *(x.right for x in filled), *weights,
        *(x.left.shape[0] for x in filled), *(x.shape[0] for x in weights), *(x.shape[1] for x in weights),
        *ends[:-1], partial, *begins, parts, elements[-1], BM=tile.rows, CHUNK=chunk, CHUNKS=tile.columns // chunk,
        BK=tile.k, STAGES=tile.stages, WHOLE=parts == 1, num_warps=tile.warps,
    )  # fmt: skip
    if parts > 1:
        ends = _ends([triton.cdiv(m * n, _BLOCK) for m, n in sizes])
        begins = [*begins[: len(layers)], *elements[-1:] * (LAYERS - len(layers))]
        sum_parts[(ends[-1],)](
            partial, *weights, *begins, *ends[:-1], parts, elements[-1], BLOCK=_BLOCK, num_warps=4
        )  # fmt: skip


def split(tiles: int, programs: int) -> int:
    """Into how many parts the rows are split: the fewest that come within a tenth of the shortest time.

    Time is waves of programs, each as long as its part of the rows.
    """
    waves = {parts: triton.cdiv(tiles * parts, programs) / parts for parts in range(1, MOST_PARTS + 1)}
    return min(parts for parts, time in waves.items() if time <= 1.1 * min(waves.values()))


def _ends(counts: Sequence[int]) -> list[int]:
    """Where each of up to :data:`LAYERS` ends if one lies behind the other; what is absent is empty."""
    ends = list(accumulate(counts))
    return ends + ends[-1:] * (LAYERS - len(ends))
