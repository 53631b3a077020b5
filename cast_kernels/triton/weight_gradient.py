"""Kernel `weight_gradient`: all weight gradients of one op in one launch, dW = dY^T X for every layer.

A program owns one tile of one layer's gradient and sums over all rows, or over one of a few parts of them where that
fills the chip; then `sum_parts` adds up the parts. No atomics, and the same order of additions on every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from cast_kernels.triton.blocks import channels, dot, odd, unodd, zeros
from cast_kernels.triton.launch import Plan, Planner, as_odd, planned
from cast_kernels.triton.tiles import Tile

#: Parts of the rows, at most: each costs a write and a read of all gradients in float32.
MOST_PARTS = 4
#: Elements of a program of `sum_parts`.
_BLOCK = 1024


class Layer(NamedTuple):
    """One linear layer's gradient: weight [M, N] = left^T right."""

    left: Any  # [rows, M], gradient of the output
    right: Any  # [rows, N], input
    weight: Any  # [M, N], written


class Product(NamedTuple):
    """One layer as the kernel takes it. 16 divides sizes: a compiler that knows it loads four elements at a time."""

    left: Any  # [rows, m]
    right: Any  # [rows, n]
    out: Any  # [m, n], written with WHOLE
    rows: Any  # odd
    m: Any
    n: Any
    at: Any  # where the layer begins in a row of `partial`
    end: Any  # odd: the tile before which the layer ends


class Part(NamedTuple):
    """One layer as `sum_parts` takes it."""

    out: Any  # [end - begin], written
    begin: Any  # in a row of `partial`
    end: Any
    end_tile: Any  # odd


@triton.jit(do_not_specialize=["parts"])
def weight_gradient(
    layers, partial, parts, total,
    BM: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Tiles [BM, CHUNKS * CHUNK] of all gradients, one layer behind the other; all matrices are row-major.

    Unless WHOLE, program `tile * parts + part` takes its part of the rows and writes to partial [parts, total], the
    layer from its `at` on.
    """
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    own, start = layers[0], odd(0)
    for i in tl.static_range(1, len(layers)):
        if odd(tile) >= layers[i - 1].end:
            own, start = layers[i], layers[i - 1].end
    left, right, m, n, rows = own.left, own.right, own.m, own.n, unodd(own.rows)
    tile -= unodd(start)
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
            tl.store(own.out + i[:, None] * n + column[None, :], acc[c].to(own.out.dtype.element_ty), mask=here)
        else:
            mine = partial + part.to(tl.int64) * total + own.at
            tl.store(mine + i[:, None] * n + column[None, :], acc[c], mask=here)


@triton.jit(do_not_specialize=["parts"])
def sum_parts(layers, partial, parts, total, BLOCK: tl.constexpr):
    """Every layer's `out`, flat, = sum over parts of partial [parts, total] from its begin to its end."""
    tile = tl.program_id(0)
    own, start = layers[0], odd(0)
    for i in tl.static_range(1, len(layers)):
        if odd(tile) >= layers[i - 1].end_tile:
            own, start = layers[i], layers[i - 1].end_tile
    i = (tile - unodd(start)) * BLOCK + tl.arange(0, BLOCK)
    inside = i < own.end - own.begin
    value = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        value += tl.load(partial + tl.cast(part, tl.int64) * total + own.begin + i, mask=inside, other=0.0)
    tl.store(own.out + i, value.to(own.out.dtype.element_ty), mask=inside)


def add(planner: Planner, layers: Sequence[Layer], tile: Tile) -> None:
    """Plan every layer's `weight`.

    Args:
        planner: of the buffers.
        layers: at least one; operands of one dtype, weights of one dtype.
        tile: BM = `rows`, BK = `k`; `columns`, of 128 at most in one product; `programs` that fill the GPU.
    """
    sizes = [layer.weight.shape for layer in layers]
    ends = list(accumulate(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns) for m, n in sizes))
    parts, chunk = split(ends[-1], tile.programs), math.gcd(tile.columns, 128)
    stops = list(accumulate(m * n for m, n in sizes))
    begins = [0, *stops[:-1]]
    partial = planner.scratch(*((parts, stops[-1]) if parts > 1 else (1,)), dtype=torch.float32)
    products = tuple(
        Product(*layer, as_odd(layer.left.shape[0]), m, n, begin, as_odd(end))
        for layer, (m, n), begin, end in zip(layers, sizes, begins, ends, strict=True)
    )
    planner.launch(
        weight_gradient, (ends[-1] * parts,), products, partial, parts, stops[-1], BM=tile.rows, CHUNK=chunk,
        CHUNKS=tile.columns // chunk, BK=tile.k, STAGES=tile.stages, WHOLE=parts == 1, num_warps=tile.warps,
    )  # fmt: skip
    if parts > 1:
        blocks = list(accumulate(triton.cdiv(m * n, _BLOCK) for m, n in sizes))
        pieces = tuple(
            Part(layer.weight, begin, stop, as_odd(end))
            for layer, begin, stop, end in zip(layers, begins, stops, blocks, strict=True)
        )
        planner.launch(sum_parts, (blocks[-1],), pieces, partial, parts, stops[-1], BLOCK=_BLOCK, num_warps=4)


@planned
def _plan(
    shapes: tuple[tuple[int, int, int], ...], operands: torch.dtype, weights: torch.dtype, tile: Tile
) -> Plan:  # fmt: skip
    planner = Planner()
    lefts = [planner.given(rows, m, dtype=operands) for rows, m, _ in shapes]
    rights = [planner.given(rows, n, dtype=operands) for rows, _, n in shapes]
    outs = [planner.given(m, n, dtype=weights) for _, m, n in shapes]
    add(planner, [Layer(*layer) for layer in zip(lefts, rights, outs, strict=True)], tile)
    return planner.plan()


def launch(layers: Sequence[Layer], tile: Tile) -> None:
    """Fill every layer's `weight`: as :func:`add`, of contiguous tensors."""
    first = layers[0]
    shapes = tuple((layer.left.shape[0], *layer.weight.shape) for layer in layers)
    given = [x for column in zip(*layers, strict=True) for x in column]
    _plan(shapes, first.left.dtype, first.weight.dtype, tile).run(given, inputs=2 * len(layers))


def split(tiles: int, programs: int) -> int:
    """Into how many parts the rows are split: the fewest that come within a tenth of the shortest time.

    Time is waves of programs, each as long as its part of the rows.
    """
    waves = {parts: triton.cdiv(tiles * parts, programs) / parts for parts in range(1, MOST_PARTS + 1)}
    return min(parts for parts, time in waves.items() if time <= 1.1 * min(waves.values()))
