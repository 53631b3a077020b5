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
    load_row,
    narrow,
    normalised,
    offset,
    rounded,
    statistics,
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

    # A direction that is absent contributes masked rows, so zero: only ablations pay for multiplying them.
    asked, answered = is_patch & (asks != 0), is_patch & (answers != 0)
    dn = zeros(BM, CHUNK, CHUNKS)
    dn = narrow(dn, dq, p_row, asked, q_weight, D, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    if POSITIONS:
        store_row(dq_input, p_row, asked, dn, D, CHUNK, CHUNKS)
        more = zeros(BM, CHUNK, CHUNKS)
        more = narrow(more, dkv, p_row, answered, kv_weight, 2 * D, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
        store_row(dkv_input, p_row, answered, more, D, CHUNK, CHUNKS)
        both = ()
        for c in tl.static_range(CHUNKS):
            both += (dn[c] + more[c],)
        dn = both
    else:
        dn = narrow(dn, dkv, p_row, answered, kv_weight, 2 * D, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    if T2S:
        cls = load_row(dh, rows * patches + frame, is_cls, D, CHUNK, CHUNKS)
        both = ()
        for c in tl.static_range(CHUNKS):
            both += (dn[c] + cls[c].to(tl.float32),)
        dn = both

    z = load_row(z_in, row, mask, D, CHUNK, CHUNKS)
    mean, rstd = statistics(z, eps, BM, D, CHUNK, CHUNKS)
    _attention_inputs(
        z, mean, rstd, norm, norm_bias, q_input, kv_input, q_pos, kv_pos, asks, answers, p_row, is_patch,
        time * q_by_frame + patch * q_by_patch, time * kv_by_frame + patch * kv_by_patch,
        D, POSITIONS, CHUNK, CHUNKS,
    )  # fmt: skip
    dz = _norm_backward(z, dn, mean, rstd, norm, partial, tile, mask, BM, D, CHUNK, CHUNKS)
    a = rounded(dz, COMPUTE, CHUNKS)
    store_row(dz_out, row, mask, a, D, CHUNK, CHUNKS)
    if WANT_X:
        receives = asks  # what asks is what receives, so its residual carries a gradient
        for j in tl.range(0, DIM, BN, num_stages=WIDEN_STAGES):
            at = j + tl.arange(0, BN)
            here = mask[:, None] & (at < DIM)[None, :]
            value = widen(a, down, j, DIM, D, True, BM, BN, CHUNK, CHUNKS)
            residual = tl.load(
                grad_out + offset(row, DIM)[:, None] + at[None, :], mask=here & (receives != 0), other=0.0
            )
            total = value + residual.to(tl.float32)
            tl.store(grad + offset(row, DIM)[:, None] + at[None, :], total.to(grad.dtype.element_ty), mask=here)


@triton.jit
def _attention_inputs(
    z, mean, rstd, norm, norm_bias, q_input, kv_input, q_pos, kv_pos, asks, answers, row, mask, q_at, kv_at,
    D: tl.constexpr, POSITIONS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """n + q_pos and n + kv_pos as `project` gave them to its products."""
    for c in tl.static_range(CHUNKS):
        at = channels(c, CHUNK)
        n = normalised(z[c], mean, rstd, norm, norm_bias, c, D, CHUNK)
        here = mask[:, None] & (at < D)[None, :]
        q_n, kv_n = n, n
        if POSITIONS:
            asked, answered = here & (asks != 0), here & (answers != 0)
            q_n += tl.load(q_pos + q_at[:, None] * D + at[None, :], mask=asked, other=0.0).to(tl.float32)
            kv_n += tl.load(kv_pos + kv_at[:, None] * D + at[None, :], mask=answered, other=0.0).to(tl.float32)
        out = offset(row, D)[:, None] + at[None, :]
        tl.store(q_input + out, q_n.to(q_input.dtype.element_ty), mask=here & (asks != 0))
        tl.store(kv_input + out, kv_n.to(kv_input.dtype.element_ty), mask=here & (answers != 0))


@triton.jit
def _norm_backward(
    z, dn, mean, rstd, norm, partial, tile, mask,
    BM: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dz = rstd * (g - mean(g) - xhat * mean(g * xhat)) with g = dn * weight; column sums of dn * xhat, dn and dz."""
    total, product = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    for c in tl.static_range(CHUNKS):
        at = channels(c, CHUNK)
        g = dn[c] * tl.load(norm + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
        xhat = (z[c].to(tl.float32) - mean[:, None]) * rstd[:, None]
        total += tl.sum(g, 1)
        product += tl.sum(g * xhat, 1)
        column_sums(partial, tile, 0, 3 * D, at, dn[c] * xhat, mask, D)
        column_sums(partial, tile, D, 3 * D, at, dn[c], mask, D)
    dz = ()
    for c in tl.static_range(CHUNKS):
        at = channels(c, CHUNK)
        g = dn[c] * tl.load(norm + at, mask=at < D, other=0.0).to(tl.float32)[None, :]
        xhat = (z[c].to(tl.float32) - mean[:, None]) * rstd[:, None]
        value = rstd[:, None] * (g - (total / D)[:, None] - xhat * (product / D)[:, None])
        value = tl.where((at < D)[None, :], value, 0.0)
        column_sums(partial, tile, 2 * D, 3 * D, at, value, mask, D)
        dz += (value,)
    return dz
