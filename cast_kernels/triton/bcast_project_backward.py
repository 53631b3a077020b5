"""Kernel `project_backward`: back through the attention's projections, positions, LayerNorm and the down-projection.

One launch for both streams, the mirror of `project`. It makes dX, and for the weight gradients dz, n + q_pos and
n + kv_pos; and its rows' share of three vector gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from cast_kernels.triton.blocks import (
    channels,
    column_sums,
    dot,
    load_chunk,
    load_row,
    load_weight,
    narrow,
    normalised,
    offset,
    pieces,
    statistics,
    store_chunk,
    zeros,
)

#: Arguments that are 1 or a multiple of 16 in some problems only: no kernels of their own for them.
_SIZES = ["rows", "frames", "patches", "spatial_tiles", "t2s_by_frame", "t2s_by_patch", "s2t_by_frame", "s2t_by_patch"]


class Projected(NamedTuple):
    """One stream's tensors. Of a role that the stream does not have, nothing is read that matters."""

    z: Any  # [rows, D]
    dq: Any  # [B*T*N, D]
    dkv: Any  # [B*T*N, 2D]
    dz: Any  # [rows, D], written
    q_input: Any  # [B*T*N, D], n + q_pos; written with PARAMETERS
    kv_input: Any  # [B*T*N, D], n + kv_pos; written with PARAMETERS
    partial: Any  # [tiles, 3D] in fp32, column sums for the norm's weight and bias, then of dz; with PARAMETERS
    grad: Any  # [rows, DIM]; written with WANT_X
    grad_out: Any  # [rows, DIM]
    down: Any  # [D, DIM]
    norm: Any  # [D]
    norm_bias: Any  # [D]
    q_pos: Any  # [W, D], of the direction in which the stream asks
    kv_pos: Any  # [W, D], of the direction in which it answers
    q_weight: Any  # [D, D]
    kv_weight: Any  # [2D, D]


@triton.jit(do_not_specialize=_SIZES)
def project_backward(
    spatial, temporal, dh, rows, frames, patches, spatial_tiles, eps,
    t2s_by_frame, t2s_by_patch, s2t_by_frame, s2t_by_patch,
    DIM: tl.constexpr, D: tl.constexpr, T2S: tl.constexpr, S2T: tl.constexpr, POSITIONS: tl.constexpr,
    WANT_X: tl.constexpr, PARAMETERS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs below `spatial_tiles` take BM rows of the spatial stream, the others of the temporal.

    `rows` counts frames of all clips. CLS receives its gradient from dh's last B*T rows. With PARAMETERS some of those
    that this kernel is the way to want a gradient.
    """
    tile = tl.program_id(0)
    if tile < spatial_tiles:
        first = 1
        own = spatial
        q_by_frame, q_by_patch, kv_by_frame, kv_by_patch = t2s_by_frame, t2s_by_patch, s2t_by_frame, s2t_by_patch
        asks, answers = T2S, S2T
    else:
        first = 0
        tile -= spatial_tiles
        own = temporal
        q_by_frame, q_by_patch, kv_by_frame, kv_by_patch = s2t_by_frame, s2t_by_patch, t2s_by_frame, t2s_by_patch
        asks, answers = S2T, T2S
    COMPUTE: tl.constexpr = spatial.z.dtype.element_ty
    PIECE: tl.constexpr = CHUNK // 2 if CHUNK == 128 else CHUNK
    PIECES: tl.constexpr = CHUNK // PIECE * CHUNKS
    tokens = patches + first
    row = tile * BM + tl.arange(0, BM)
    mask = row < rows * tokens
    frame, patch = row // tokens, row % tokens - first
    is_patch, is_cls = mask & (patch >= 0), mask & (patch < 0)
    p_row, time = frame * patches + patch, frame % frames

    z_row = load_row(own.z, row, mask, D, CHUNK, CHUNKS)
    mean, rstd = statistics(z_row, eps, BM, D, CHUNK, CHUNKS)
    # A direction that is absent contributes masked rows, so zero: only ablations pay for multiplying them.
    asked, answered = is_patch & (asks != 0), is_patch & (answers != 0)
    if PARAMETERS:
        for c in tl.static_range(PIECES):
            z = load_chunk(own.z, row, mask, c, D, PIECE)
            n = normalised(z, mean, rstd, own.norm, own.norm_bias, c, D, PIECE)
            q_n, kv_n = n, n
            if POSITIONS:
                q_at, kv_at = time * q_by_frame + patch * q_by_patch, time * kv_by_frame + patch * kv_by_patch
                q_n += load_chunk(own.q_pos, q_at, asked, c, D, PIECE).to(tl.float32)
                kv_n += load_chunk(own.kv_pos, kv_at, answered, c, D, PIECE).to(tl.float32)
            store_chunk(own.q_input, p_row, asked, q_n, c, D, PIECE)
            store_chunk(own.kv_input, p_row, answered, kv_n, c, D, PIECE)
    dn_row = zeros(BM, CHUNK, CHUNKS)
    dn_row = narrow(dn_row, own.dkv, p_row, answered, own.kv_weight, 2 * D, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    dn_row = narrow(dn_row, own.dq, p_row, asked, own.q_weight, D, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    dn = pieces(dn_row, BM, CHUNK, CHUNKS, PIECE)
    total, product = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    both = ()
    for c in tl.static_range(PIECES):
        value = dn[c]
        if T2S:
            value += load_chunk(dh, rows * patches + frame, is_cls, c, D, PIECE).to(tl.float32)
        at = channels(c, PIECE)
        xhat = (load_chunk(own.z, row, mask, c, D, PIECE).to(tl.float32) - mean[:, None]) * rstd[:, None]
        if PARAMETERS:
            column_sums(own.partial, tile, 0, 3 * D, at, value * xhat, mask, D)
            column_sums(own.partial, tile, D, 3 * D, at, value, mask, D)
        g = value * tl.load(own.norm + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
        total += tl.sum(g, 1)
        product += tl.sum(g * xhat, 1)
        both += (g,)
    for c in tl.static_range(PIECES):
        at = channels(c, PIECE)
        xhat = (load_chunk(own.z, row, mask, c, D, PIECE).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dz = rstd[:, None] * (both[c] - (total / D)[:, None] - xhat * (product / D)[:, None])
        dz = tl.where((at < D)[None, :], dz, 0.0)
        if PARAMETERS:
            column_sums(own.partial, tile, 2 * D, 3 * D, at, dz, mask, D)
        store_chunk(own.dz, row, mask, dz, c, D, PIECE)
    if WANT_X:  # a stream that asks is one that receives: its residual carries a gradient
        tl.debug_barrier()  # dz is read back as an operand: in registers it would stand beside the product's columns
        received = mask & (asks != 0)
        if DIM <= 2 * CHUNK * CHUNKS:  # no loop: behind each product there are spills, and these two are all there are
            for j in tl.static_range(0, DIM, CHUNK * CHUNKS):
                _store_columns(own, row, mask, received, j, DIM, D, BM, BK, CHUNK, CHUNKS, PIECE, STAGES)
        else:
            for j in range(0, DIM, CHUNK * CHUNKS):
                _store_columns(own, row, mask, received, j, DIM, D, BM, BK, CHUNK, CHUNKS, PIECE, STAGES)


@triton.jit
def _store_columns(
    own, row, mask, received, j, DIM: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Columns from j on of grad = dz @ down + grad_out, which counts where `received`; as many as a row is wide."""
    dx_row = zeros(BM, CHUNK, CHUNKS)
    dx_row = _columns(dx_row, own.dz, row, mask, own.down, j, DIM, D, BK, CHUNK, CHUNKS, STAGES)
    dx = pieces(dx_row, BM, CHUNK, CHUNKS, PIECE)
    for c in tl.static_range(CHUNK // PIECE * CHUNKS):
        column = j + channels(c, PIECE)
        at = offset(row, DIM)[:, None] + column[None, :]
        here = (column < DIM)[None, :]
        more = dx[c] + tl.load(own.grad_out + at, mask=received[:, None] & here, other=0.0)
        tl.store(own.grad + at, more.to(own.grad.dtype.element_ty), mask=mask[:, None] & here)


@triton.jit
def _columns(
    row, x, rows, mask, weight, start, WIDTH: tl.constexpr, D: tl.constexpr,
    BK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """row + columns `start` on of x @ weight: x [*, D], weight [D, WIDTH], as many columns as a row is wide."""
    EVEN: tl.constexpr = WIDTH % (CHUNK * CHUNKS) == 0
    for k in tl.range(0, D, BK, num_stages=STAGES):
        inner = k + tl.arange(0, BK)
        here = mask[:, None] if D % BK == 0 else mask[:, None] & (inner < D)[None, :]
        a = tl.load(x + offset(rows, D)[:, None] + inner[None, :], mask=here, other=0.0)
        step = ()
        for c in tl.static_range(CHUNKS):
            out = start + channels(c, CHUNK)
            w = load_weight(weight, out, inner, WIDTH, D, True, EVEN, D % BK == 0)
            step += (dot(a, w, row[c]),)
        row = step
    return row
