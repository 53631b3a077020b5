"""Kernel `exchange_backward`: back through residual scale, up-projection, GELU and output projection, row by row.

One launch a direction. From dY it makes scale * gelu(h), the right operand of the up-projection's weight gradient;
dh, the left operand of the output projection's; dO for the attention; and its rows' share of both bias gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cast_kernels.triton.blocks import (
    add_bias,
    channels,
    column_sums,
    gelu,
    gelu_gradient,
    load_chunk,
    narrow,
    offset,
    store_chunk,
    widen,
    zeros,
)


@triton.jit(do_not_specialize=["rows", "frames", "patches"])
def exchange_backward(
    grad_y, h, o, cls, scale, g, dh, do, partial, proj, proj_bias, up,
    rows, frames, patches,
    CLS: tl.constexpr, SCALE: tl.constexpr, RECOMPUTE_H: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr, WIDEN_STAGES: tl.constexpr,
):  # fmt: skip
    """BM rows of the asking stream, in its own order.

    `rows` counts frames of all clips. h, g [rows, D] are in the stream's order, h written first if RECOMPUTE_H;
    o, do [B*T*N, D] have no CLS rows; dh has them at the end, [B*T*N + B*T, D]. `partial` [programs, DIM + D]: column
    sums of scale * dY, then of dh.
    """
    COMPUTE: tl.constexpr = g.dtype.element_ty
    first: tl.constexpr = 1 if CLS else 0
    tile = tl.program_id(0)
    tokens = patches + first
    row = tile * BM + tl.arange(0, BM)
    mask = row < rows * tokens
    frame, token = row // tokens, row % tokens
    is_patch = mask & (token >= first)
    is_cls = mask & (token < first)
    p_row = frame * patches + token - first
    factor = tl.where(mask, 1.0, 0.0)
    if SCALE == "token":
        factor = tl.load(scale + frame // frames * tokens + token, mask=mask, other=0.0)
    if SCALE == "clip":
        factor = tl.load(scale + frame // frames, mask=mask, other=0.0)
    if RECOMPUTE_H:
        acc = zeros(BM, CHUNK, CHUNKS)
        acc = narrow(acc, o, p_row, is_patch, proj, D, D, False, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
        again = add_bias(acc, proj_bias, is_patch, D, CHUNK, CHUNKS)
    for c in tl.static_range(CHUNKS):
        if RECOMPUTE_H:
            hidden = again[c]
            if CLS:
                hidden += load_chunk(cls, frame, is_cls, c, D, CHUNK)
            hidden = hidden.to(COMPUTE).to(tl.float32)
            store_chunk(h, row, mask, hidden, c, D, CHUNK)
        else:
            hidden = load_chunk(h, row, mask, c, D, CHUNK).to(tl.float32)
        store_chunk(g, row, mask, factor[:, None] * gelu(hidden), c, D, CHUNK)
    tl.debug_barrier()  # h is read back below: beside dg it would not fit in registers
    dg = zeros(BM, CHUNK, CHUNKS)
    dg = narrow(dg, grad_y, row, mask, up, DIM, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    dh_row = tl.where(is_patch, p_row, rows * patches + frame)
    a = ()
    for c in tl.static_range(CHUNKS):
        kept = load_chunk(h, row, mask, c, D, CHUNK).to(tl.float32)
        gradient = factor[:, None] * dg[c] * gelu_gradient(kept)
        column_sums(partial, tile, DIM, DIM + D, channels(c, CHUNK), gradient, is_patch, D)
        store_chunk(dh, dh_row, mask, gradient, c, D, CHUNK)
        a += (gradient.to(COMPUTE),)
    for j in tl.range(0, D, BN, num_stages=WIDEN_STAGES):
        at = j + tl.arange(0, BN)
        value = widen(a, proj, j, D, D, True, BM, BN, CHUNK, CHUNKS)
        here = is_patch[:, None] & (at < D)[None, :]
        tl.store(do + offset(p_row, D)[:, None] + at[None, :], value.to(COMPUTE), mask=here)
    for j in range(0, DIM, BN):
        at = j + tl.arange(0, BN)
        here = mask[:, None] & (at < DIM)[None, :]
        value = tl.load(grad_y + offset(row, DIM)[:, None] + at[None, :], mask=here, other=0.0).to(tl.float32)
        total = tl.sum(factor[:, None] * value, 0)
        tl.store(partial + tile * (DIM + D) + at, total, mask=at < DIM)
