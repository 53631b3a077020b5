"""Kernel `exchange_backward`: back through residual scale, up-projection, GELU and output projection, row by row.

One launch for both directions. From dY it makes f gelu(h), the right operand of the up-projection's weight gradient;
dh, the left operand of the output projection's; dO for the attention; and its rows' share of both bias gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from cast_kernels.triton.blocks import (
    channels,
    column_sums,
    gelu,
    gelu_gradient,
    load_chunk,
    narrow,
    offset,
    pieces,
    store_chunk,
    zeros,
)


class Received(NamedTuple):
    """One asking stream's tensors; those with `rows` lie in the stream's order."""

    grad_y: Any  # [rows, DIM]
    h: Any  # [rows, D]; written first with RECOMPUTE_H
    o: Any  # [B*T*N, D]
    scale: Any  # a factor in fp32 for each token of a clip (spatial), or for each clip
    g: Any  # [rows, D]; written with PARAMETERS
    dh: Any  # [B*T*N + B*T, D], written; CLS rows at the end
    do: Any  # [B*T*N, D], written
    partial: Any  # [tiles, DIM + D] in fp32, column sums of scale * dY, then of dh; written with PARAMETERS
    proj: Any  # [D, D]
    proj_bias: Any  # [D]
    up: Any  # [DIM, D]


@triton.jit(do_not_specialize=["rows", "frames", "patches", "spatial_tiles"])
def exchange_backward(
    spatial, temporal, cls, rows, frames, patches, spatial_tiles,
    SPATIAL_SCALED: tl.constexpr, TEMPORAL_SCALED: tl.constexpr, RECOMPUTE_H: tl.constexpr,
    PARAMETERS: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Programs below `spatial_tiles` take BM rows of the spatial stream, the others of the temporal, as they lie.

    `rows` counts frames of all clips, `cls` [B*T, D] is CLS's n in fp32. With PARAMETERS some of them want a gradient.
    """
    COMPUTE: tl.constexpr = spatial.g.dtype.element_ty
    PIECE: tl.constexpr = CHUNK // 2 if CHUNK == 128 else CHUNK
    PIECES: tl.constexpr = CHUNK // PIECE * CHUNKS
    tile = tl.program_id(0)
    if tile < spatial_tiles:
        first = 1
        own = spatial
    else:
        first = 0
        tile -= spatial_tiles
        own = temporal
    tokens = patches + first
    row = tile * BM + tl.arange(0, BM)
    mask = row < rows * tokens
    frame, token = row // tokens, row % tokens
    is_patch, is_cls = mask & (token >= first), mask & (token < first)
    p_row = frame * patches + token - first
    factor = tl.where(mask, 1.0, 0.0)
    if SPATIAL_SCALED or TEMPORAL_SCALED:
        scaled = mask & tl.where(first == 1, SPATIAL_SCALED, TEMPORAL_SCALED)
        at = frame // frames * tl.where(first == 1, tokens, 1) + token * first
        factor = tl.where(scaled, tl.load(own.scale + at, mask=scaled, other=0.0), factor)
    if RECOMPUTE_H:
        hidden_row = zeros(BM, CHUNK, CHUNKS)
        hidden_row = narrow(
            hidden_row, own.o, p_row, is_patch, own.proj, D, D, False, COMPUTE, BK, CHUNK, CHUNKS, STAGES
        )
        again = pieces(hidden_row, BM, CHUNK, CHUNKS, PIECE)
    for c in tl.static_range(PIECES):
        if RECOMPUTE_H:
            at_c = channels(c, PIECE)
            bias = tl.load(own.proj_bias + at_c, mask=at_c < D, other=0.0).to(tl.float32)
            hidden = again[c] + tl.where(is_patch[:, None], bias[None, :], 0.0)
            hidden += load_chunk(cls, frame, is_cls, c, D, PIECE)
            hidden = hidden.to(COMPUTE).to(tl.float32)
            store_chunk(own.h, row, mask, hidden, c, D, PIECE)
        else:
            hidden = load_chunk(own.h, row, mask, c, D, PIECE).to(tl.float32)
        if PARAMETERS:
            store_chunk(own.g, row, mask, factor[:, None] * gelu(hidden), c, D, PIECE)
    tl.debug_barrier()  # h is read back below: beside dg it would not fit in registers
    dg_row = zeros(BM, CHUNK, CHUNKS)
    dg_row = narrow(dg_row, own.grad_y, row, mask, own.up, DIM, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    dg = pieces(dg_row, BM, CHUNK, CHUNKS, PIECE)
    dh_row = tl.where(is_patch, p_row, rows * patches + frame)
    for c in tl.static_range(PIECES):
        kept = load_chunk(own.h, row, mask, c, D, PIECE).to(tl.float32)
        gradient = factor[:, None] * dg[c] * gelu_gradient(kept)
        if PARAMETERS:
            column_sums(own.partial, tile, DIM, DIM + D, channels(c, PIECE), gradient, is_patch, D)
        store_chunk(own.dh, dh_row, mask, gradient, c, D, PIECE)
    tl.debug_barrier()  # dh is read back as an operand: in registers it would stand beside the next product's row
    do_row = zeros(BM, CHUNK, CHUNKS)
    do_row = narrow(do_row, own.dh, p_row, is_patch, own.proj, D, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    d_o = pieces(do_row, BM, CHUNK, CHUNKS, PIECE)
    for c in tl.static_range(PIECES):
        store_chunk(own.do, p_row, is_patch, d_o[c], c, D, PIECE)
    if PARAMETERS:
        for j in range(0, DIM, BN):
            column = j + tl.arange(0, BN)
            here = mask[:, None] & (column < DIM)[None, :]
            value = tl.load(own.grad_y + offset(row, DIM)[:, None] + column[None, :], mask=here, other=0.0)
            total = tl.sum(factor[:, None] * value.to(tl.float32), 0)
            tl.store(own.partial + tile * (DIM + D) + column, total, mask=column < DIM)
