"""Kernel `project`: down-projection, LayerNorm, positions, and the queries, keys and values of both directions.

One launch for both streams: z = x Wd^T + b, n = LayerNorm(z), Q = (n + q_pos) Wq^T + b, [K V] = (n + kv_pos) Wkv^T + b.
z is rounded to the compute dtype before its statistics, as a linear layer of that dtype would do: whoever has z can
compute n again. With FROM_Z the statistics' sums run over another layout of the row, so fp32's last bit may differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from cast_kernels.triton.blocks import (
    add_bias,
    load_chunk,
    load_row,
    narrow,
    normalised,
    offset,
    rounded,
    statistics,
    store_chunk,
    store_row,
    widen,
    zeros,
)

#: Arguments that are 1 or a multiple of 16 in some problems only: no kernels of their own for them.
_SIZES = ["rows", "frames", "patches", "spatial_tiles", "t2s_by_frame", "t2s_by_patch", "s2t_by_frame", "s2t_by_patch"]


class Projected(NamedTuple):
    """One stream's tensors. Of a role that the stream does not have, nothing is read that matters."""

    x: Any  # [rows, DIM]
    z: Any  # [rows, D] in the compute dtype; read with FROM_Z, else written
    q: Any  # [B*T*N, D], written
    kv: Any  # [B*T*N, 2D], written
    down: Any  # [D, DIM]
    down_bias: Any  # [D]
    norm: Any  # [D]
    norm_bias: Any  # [D]
    q_pos: Any  # [W, D], of the direction in which the stream asks
    kv_pos: Any  # [W, D], of the direction in which it answers
    q_weight: Any  # [D, D]
    q_bias: Any  # [D]
    kv_weight: Any  # [2D, D]
    kv_bias: Any  # [2D]


@triton.jit(do_not_specialize=_SIZES)
def project(
    spatial, temporal, cls, rows, frames, patches, spatial_tiles, eps,
    t2s_by_frame, t2s_by_patch, s2t_by_frame, s2t_by_patch,
    DIM: tl.constexpr, D: tl.constexpr, T2S: tl.constexpr, S2T: tl.constexpr, POSITIONS: tl.constexpr,
    FROM_Z: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr, WIDEN_STAGES: tl.constexpr,
):  # fmt: skip
    """Programs below `spatial_tiles` take BM rows of the spatial stream [rows, 1+N, DIM], the others of the temporal.

    `rows` counts frames of all clips (B * T). A patch's position in its window is frame * by_frame + patch * by_patch.
    Q [B*T*N, D] and KV [B*T*N, 2D] have no row for CLS; its n goes to `cls` [B*T, D] in fp32.
    """
    tile = tl.program_id(0)
    if tile < spatial_tiles:
        first = 1
        own = spatial
        q_by_frame, q_by_patch, kv_by_frame, kv_by_patch = t2s_by_frame, t2s_by_patch, s2t_by_frame, s2t_by_patch
        q_columns, kv_columns = D * T2S, 2 * D * S2T
    else:
        first = 0
        tile -= spatial_tiles
        own = temporal
        q_by_frame, q_by_patch, kv_by_frame, kv_by_patch = s2t_by_frame, s2t_by_patch, t2s_by_frame, t2s_by_patch
        q_columns, kv_columns = D * S2T, 2 * D * T2S
    COMPUTE: tl.constexpr = spatial.z.dtype.element_ty
    tokens = patches + first
    row = tile * BM + tl.arange(0, BM)
    mask = row < rows * tokens
    if FROM_Z:
        mean, rstd = statistics(load_row(own.z, row, mask, D, CHUNK, CHUNKS), eps, BM, D, CHUNK, CHUNKS)
    else:
        wide = zeros(BM, CHUNK, CHUNKS)
        wide = narrow(wide, own.x, row, mask, own.down, DIM, D, False, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
        z = rounded(add_bias(wide, own.down_bias, mask, D, CHUNK, CHUNKS), COMPUTE, CHUNKS)
        store_row(own.z, row, mask, z, D, CHUNK, CHUNKS)
        mean, rstd = statistics(z, eps, BM, D, CHUNK, CHUNKS)
    # From here on z is read from memory, chunk by chunk: beside the products' operand it would not fit in registers.
    tl.debug_barrier()
    frame, patch = row // tokens, row % tokens - first
    time = frame % frames
    out_row = frame * patches + patch
    kept = mask & (patch >= 0)
    q_at, kv_at = time * q_by_frame + patch * q_by_patch, time * kv_by_frame + patch * kv_by_patch
    a = _with_positions(
        own.z, row, mask, cls, frame, mask & (patch < 0), T2S, mean, rstd, own.norm, own.norm_bias, own.q_pos, q_at,
        kept & (q_columns > 0), D, POSITIONS, COMPUTE, CHUNK, CHUNKS,
    )  # fmt: skip
    _multiply(a, own.q, q_columns, D, kept, out_row, own.q_weight, own.q_bias, D, BM, BN, CHUNK, CHUNKS, WIDEN_STAGES)
    a = _with_positions(
        own.z, row, mask, cls, frame, mask, False, mean, rstd, own.norm, own.norm_bias, own.kv_pos, kv_at,
        kept & (kv_columns > 0), D, POSITIONS, COMPUTE, CHUNK, CHUNKS,
    )  # fmt: skip
    _multiply(
        a, own.kv, kv_columns, 2 * D, kept, out_row, own.kv_weight, own.kv_bias, D, BM, BN, CHUNK, CHUNKS, WIDEN_STAGES
    )


@triton.jit
def _with_positions(
    z, row, z_mask, cls, frame, is_cls, STORE_CLS: tl.constexpr, mean, rstd, norm, norm_bias, positions, position, mask,
    D: tl.constexpr, POSITIONS: tl.constexpr, COMPUTE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """n + positions[position] in the compute dtype; with STORE_CLS, cls[frame] = n for the rows that are CLS."""
    a = ()
    for c in tl.static_range(CHUNKS):
        n = normalised(load_chunk(z, row, z_mask, c, D, CHUNK), mean, rstd, norm, norm_bias, c, D, CHUNK)
        if STORE_CLS:
            store_chunk(cls, frame, is_cls, n, c, D, CHUNK)
        if POSITIONS:
            n += load_chunk(positions, position, mask, c, D, CHUNK).to(tl.float32)
        a += (n.to(COMPUTE),)
    return a


@triton.jit
def _multiply(
    a, out, columns, WIDTH: tl.constexpr, mask, row, weight, bias, D: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[row] = a @ weight^T + bias, the first `columns` of WIDTH (none or all)."""
    for j in tl.range(0, columns, BN, num_stages=STAGES):
        value = widen(a, weight, j, WIDTH, D, False, BM, BN, CHUNK, CHUNKS)
        at = j + tl.arange(0, BN)
        value += tl.load(bias + at, mask=at < WIDTH, other=0.0).to(tl.float32)[None, :]
        inside = mask[:, None] & (at < WIDTH)[None, :]
        tl.store(out + offset(row, WIDTH)[:, None] + at[None, :], value.to(out.dtype.element_ty), mask=inside)
