"""Kernel `adapter_forward`: down, GELU, up, scale and residual in one launch; the hidden row stays in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from cast_kernels.triton.blocks import add_bias, gelu, narrow, offset, rounded, store_row, widen, zeros


@triton.jit(do_not_specialize=["rows"])
def adapter_forward(
    x, residual, other, y, h, row_scale, down, down_bias, up, up_bias, rows, scale,
    OTHER: tl.constexpr, SCALED: tl.constexpr, STORE_H: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr, WIDEN_STAGES: tl.constexpr,
):  # fmt: skip
    """y = residual [+ other] + scale * row_scale * (gelu(h) up^T + up_bias), h = x down^T + down_bias, BM rows.

    x, residual, other, y [rows, DIM]; h [rows, D] is written with STORE_H; row_scale [rows] is fp32, read with SCALED.
    """
    COMPUTE: tl.constexpr = down.dtype.element_ty
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = row < rows
    acc = zeros(BM, CHUNK, CHUNKS)
    acc = narrow(acc, x, row, mask, down, DIM, D, False, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    hidden = rounded(add_bias(acc, down_bias, mask, D, CHUNK, CHUNKS), COMPUTE, CHUNKS)
    if STORE_H:
        store_row(h, row, mask, hidden, D, CHUNK, CHUNKS)
    g = ()
    for c in tl.static_range(CHUNKS):
        g += (gelu(hidden[c].to(tl.float32)).to(COMPUTE),)
    factor = tl.zeros((BM,), tl.float32) + scale
    if SCALED:
        factor *= tl.load(row_scale + row, mask=mask, other=0.0)
    for j in tl.range(0, DIM, BN, num_stages=WIDEN_STAGES):
        column = j + tl.arange(0, BN)
        here = mask[:, None] & (column < DIM)[None, :]
        at = offset(row, DIM)[:, None] + column[None, :]
        branch = widen(g, up, j, DIM, D, False, BM, BN, CHUNK, CHUNKS)
        branch += tl.load(up_bias + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
        value = tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
        if OTHER:
            value += tl.load(other + at, mask=here, other=0.0).to(tl.float32)
        tl.store(y + at, (value + factor[:, None] * branch).to(y.dtype.element_ty), mask=here)
