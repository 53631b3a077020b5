"""Kernel `project_backward`: back through the attention's projections, positions, LayerNorm and the down-projection.

One launch for both streams, the mirror of `project`. It makes dX, and for the weight gradients dz, n + q_pos and
n + kv_pos; for the position tables the gradients of those two sums; and its rows' share of four vector gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cast_kernels.triton.blocks import (
    channels,
    column_sums,
    load_chunk,
    load_row,
    narrow,
    normalised,
    offset,
    statistics,
    store_chunk,
    store_row,
    widen,
    zeros,
)

#: Arguments that are 1 or a multiple of 16 in some problems only: no kernels of their own for them.
_SIZES = ["rows", "frames", "patches", "spatial_tiles", "t2s_by_frame", "t2s_by_patch", "s2t_by_frame", "s2t_by_patch"]


@triton.jit(do_not_specialize=_SIZES)
def project_backward(
    spatial_z, spatial_dq, spatial_dkv, spatial_dz, spatial_q_input, spatial_kv_input, spatial_dq_input,
    spatial_dkv_input, spatial_partial, spatial_grad, spatial_grad_out, spatial_down, spatial_norm, spatial_norm_bias,
    spatial_q_pos, spatial_kv_pos, spatial_q_weight, spatial_kv_weight,
    temporal_z, temporal_dq, temporal_dkv, temporal_dz, temporal_q_input, temporal_kv_input, temporal_dq_input,
    temporal_dkv_input, temporal_partial, temporal_grad, temporal_grad_out, temporal_down, temporal_norm,
    temporal_norm_bias, temporal_q_pos, temporal_kv_pos, temporal_q_weight, temporal_kv_weight,
    dh, rows, frames, patches, spatial_tiles, eps,
    t2s_by_frame, t2s_by_patch, s2t_by_frame, s2t_by_patch,
    DIM: tl.constexpr, D: tl.constexpr, T2S: tl.constexpr, S2T: tl.constexpr, POSITIONS: tl.constexpr,
    WANT_X: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr, WIDEN_STAGES: tl.constexpr,
):  # fmt: skip
    """Programs below `spatial_tiles` take BM rows of the spatial stream, the others of the temporal.

    dq [B*T*N, D], dkv [B*T*N, 2D] and the four *_input [B*T*N, D] have no CLS rows; CLS receives its gradient from
    dh's last B*T rows. z, dz, grad_out and grad are in the streams' order. `partial` [tiles, 3D]: column sums for the
    LayerNorm's weight and bias, then of dz.
    """
    tile = tl.program_id(0)
    if tile < spatial_tiles:
        first = 1
        z_in, dq, dkv, dz_out, q_input, kv_input = (
            spatial_z, spatial_dq, spatial_dkv, spatial_dz, spatial_q_input, spatial_kv_input,
        )  # fmt: skip
        dq_input, dkv_input, partial, grad = spatial_dq_input, spatial_dkv_input, spatial_partial, spatial_grad
        grad_out, down, norm, norm_bias = spatial_grad_out, spatial_down, spatial_norm, spatial_norm_bias
        q_pos, kv_pos, q_weight, kv_weight = spatial_q_pos, spatial_kv_pos, spatial_q_weight, spatial_kv_weight
        q_by_frame, q_by_patch, kv_by_frame, kv_by_patch = t2s_by_frame, t2s_by_patch, s2t_by_frame, s2t_by_patch
        asks, answers = T2S, S2T
    else:
        first = 0
        tile -= spatial_tiles
        z_in, dq, dkv, dz_out, q_input, kv_input = (
            temporal_z, temporal_dq, temporal_dkv, temporal_dz, temporal_q_input, temporal_kv_input,
        )  # fmt: skip
        dq_input, dkv_input, partial, grad = temporal_dq_input, temporal_dkv_input, temporal_partial, temporal_grad
        grad_out, down, norm, norm_bias = temporal_grad_out, temporal_down, temporal_norm, temporal_norm_bias
        q_pos, kv_pos, q_weight, kv_weight = temporal_q_pos, temporal_kv_pos, temporal_q_weight, temporal_kv_weight
        q_by_frame, q_by_patch, kv_by_frame, kv_by_patch = s2t_by_frame, s2t_by_patch, t2s_by_frame, t2s_by_patch
        asks, answers = S2T, T2S
    COMPUTE: tl.constexpr = spatial_z.dtype.element_ty
    tokens = patches + first
    row = tile * BM + tl.arange(0, BM)
    mask = row < rows * tokens
    frame, patch = row // tokens, row % tokens - first
    is_patch, is_cls = mask & (patch >= 0), mask & (patch < 0)
    p_row, time = frame * patches + patch, frame % frames

    z_row = load_row(z_in, row, mask, D, CHUNK, CHUNKS)
    mean, rstd = statistics(z_row, eps, BM, D, CHUNK, CHUNKS)
    # A direction that is absent contributes masked rows, so zero: only ablations pay for multiplying them.
    asked, answered = is_patch & (asks != 0), is_patch & (answers != 0)
    for c in tl.static_range(CHUNKS):
        n = normalised(z_row[c], mean, rstd, norm, norm_bias, c, D, CHUNK)
        q_n, kv_n = n, n
        if POSITIONS:
            q_n += load_chunk(q_pos, time * q_by_frame + patch * q_by_patch, asked, c, D, CHUNK).to(tl.float32)
            kv_n += load_chunk(kv_pos, time * kv_by_frame + patch * kv_by_patch, answered, c, D, CHUNK).to(tl.float32)
        store_chunk(q_input, p_row, asked, q_n, c, D, CHUNK)
        store_chunk(kv_input, p_row, answered, kv_n, c, D, CHUNK)
    dn = zeros(BM, CHUNK, CHUNKS)
    dn = narrow(dn, dkv, p_row, answered, kv_weight, 2 * D, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    if POSITIONS:  # two sums were projected, and each has a gradient of its own
        store_row(dkv_input, p_row, answered, dn, D, CHUNK, CHUNKS)
        dn = zeros(BM, CHUNK, CHUNKS)
    dn = narrow(dn, dq, p_row, asked, q_weight, D, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    if POSITIONS:
        store_row(dq_input, p_row, asked, dn, D, CHUNK, CHUNKS)
        tl.debug_barrier()  # dkv_input is read back: two rows of d channels do not fit in registers
    total, product = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    both = ()
    for c in tl.static_range(CHUNKS):
        value = dn[c]
        if POSITIONS:
            value += load_chunk(dkv_input, p_row, answered, c, D, CHUNK).to(tl.float32)
        if T2S:
            value += load_chunk(dh, rows * patches + frame, is_cls, c, D, CHUNK).to(tl.float32)
        at = channels(c, CHUNK)
        z = load_chunk(z_in, row, mask, c, D, CHUNK)
        xhat = (z.to(tl.float32) - mean[:, None]) * rstd[:, None]
        column_sums(partial, tile, 0, 3 * D, at, value * xhat, mask, D)
        column_sums(partial, tile, D, 3 * D, at, value, mask, D)
        g = value * tl.load(norm + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
        total += tl.sum(g, 1)
        product += tl.sum(g * xhat, 1)
        both += (g,)
    a = ()
    for c in tl.static_range(CHUNKS):
        at = channels(c, CHUNK)
        xhat = (load_chunk(z_in, row, mask, c, D, CHUNK).to(tl.float32) - mean[:, None]) * rstd[:, None]
        dz = rstd[:, None] * (both[c] - (total / D)[:, None] - xhat * (product / D)[:, None])
        dz = tl.where((at < D)[None, :], dz, 0.0)
        column_sums(partial, tile, 2 * D, 3 * D, at, dz, mask, D)
        store_chunk(dz_out, row, mask, dz, c, D, CHUNK)
        a += (dz.to(COMPUTE),)
    if WANT_X:  # a stream that asks is one that receives: its residual carries a gradient
        for j in tl.range(0, DIM, BN, num_stages=WIDEN_STAGES):
            column = j + tl.arange(0, BN)
            here = mask[:, None] & (column < DIM)[None, :]
            more = widen(a, down, j, DIM, D, True, BM, BN, CHUNK, CHUNKS)
            received = here & (asks != 0)
            more += tl.load(grad_out + offset(row, DIM)[:, None] + column[None, :], mask=received, other=0.0)
            tl.store(grad + offset(row, DIM)[:, None] + column[None, :], more.to(grad.dtype.element_ty), mask=here)
