"""Kernel `weight_gradient`: all weight gradients of one op in one launch, dW = dY^T X for up to ten layers.

A program owns one tile of one layer's gradient and sums over all rows itself: no partial sums in memory, no second
stage, and the same order of additions on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cast_kernels.triton.blocks import dot
from cast_kernels.triton.tiles import Tile

#: Layers that one launch takes: B-CAST has two up-, two down-, two output, two query and two key-value projections.
LAYERS = 10


class Layer(NamedTuple):
    """One linear layer's gradient: weight [M, N] = left^T right."""

    left: Tensor  # [rows, M], gradient of the output
    right: Tensor  # [rows, N], input
    weight: Tensor  # [M, N], written


@triton.jit(do_not_specialize=[*(f"rows{i}" for i in range(10)), *(f"end{i}" for i in range(9))])
def weight_gradient(
    left0, left1, left2, left3, left4, left5, left6, left7, left8, left9,
    right0, right1, right2, right3, right4, right5, right6, right7, right8, right9,
    out0, out1, out2, out3, out4, out5, out6, out7, out8, out9,
    rows0, rows1, rows2, rows3, rows4, rows5, rows6, rows7, rows8, rows9,
    m0, m1, m2, m3, m4, m5, m6, m7, m8, m9,
    n0, n1, n2, n3, n4, n5, n6, n7, n8, n9,
    end0, end1, end2, end3, end4, end5, end6, end7, end8,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [BM, BN] of all gradients, one layer behind the other: layer i ends before program `end<i>`.

    left<i> [rows, m], right<i> [rows, n], out<i> [m, n], row-major; sizes are multiples of 16.
    """
    tile = tl.program_id(0)
    left, right, out, rows, m, n = left0, right0, out0, rows0, m0, n0
    start = 0
    if tile >= end0:
        left, right, out, rows, m, n, start = left1, right1, out1, rows1, m1, n1, end0
    if tile >= end1:
        left, right, out, rows, m, n, start = left2, right2, out2, rows2, m2, n2, end1
    if tile >= end2:
        left, right, out, rows, m, n, start = left3, right3, out3, rows3, m3, n3, end2
    if tile >= end3:
        left, right, out, rows, m, n, start = left4, right4, out4, rows4, m4, n4, end3
    if tile >= end4:
        left, right, out, rows, m, n, start = left5, right5, out5, rows5, m5, n5, end4
    if tile >= end5:
        left, right, out, rows, m, n, start = left6, right6, out6, rows6, m6, n6, end5
    if tile >= end6:
        left, right, out, rows, m, n, start = left7, right7, out7, rows7, m7, n7, end6
    if tile >= end7:
        left, right, out, rows, m, n, start = left8, right8, out8, rows8, m8, n8, end7
    if tile >= end8:
        left, right, out, rows, m, n, start = left9, right9, out9, rows9, m9, n9, end8
    tile -= start
    tiles_n = tl.cdiv(n, BN)
    i = tile // tiles_n * BM + tl.arange(0, BM)
    j = tile % tiles_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, rows, BK, num_stages=STAGES):
        row = (k + tl.arange(0, BK)).to(tl.int64)
        a = tl.load(left + row[:, None] * m + i[None, :], mask=(row < rows)[:, None] & (i < m)[None, :], other=0.0)
        b = tl.load(right + row[:, None] * n + j[None, :], mask=(row < rows)[:, None] & (j < n)[None, :], other=0.0)
        acc = dot(tl.trans(a), b, acc)
    here = (i < m)[:, None] & (j < n)[None, :]
    tl.store(out + i[:, None] * n + j[None, :], acc.to(out.dtype.element_ty), mask=here)


def launch(layers: Sequence[Layer], tile: Tile) -> None:
    """Fill every layer's `weight`.

    Args:
        layers: 1 to :data:`LAYERS`; operands of one dtype, weights of one dtype, all contiguous.
        tile: BM = `rows`, BN = `columns`, BK = `k`.
    """
    filled = [*layers, *[layers[-1]] * (LAYERS - len(layers))]
    ends, total = [], 0
    for layer in layers:
        m, n = layer.weight.shape
        total += triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
        ends.append(total)
    ends += [total] * (LAYERS - len(ends))
    weight_gradient[(total,)](
        *(x.left for x in filled), *(x.right for x in filled), *(x.weight for x in filled),
        *(x.left.shape[0] for x in filled), *(x.weight.shape[0] for x in filled), *(x.weight.shape[1] for x in filled),
        *ends[:-1], BM=tile.rows, BN=tile.columns, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
