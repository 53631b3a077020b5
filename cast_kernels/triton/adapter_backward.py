"""Kernel `adapter_backward`: back through scale, up-projection, GELU and down-projection, row by row, in one launch.

From dY it makes the gradient of the adapter's input, added to the gradient that reaches this input on another way
(`addend`: through the FFN beside the adapter, or through a skip): the sum of both costs no pass of its own. For the
weight gradients it leaves g = factor * gelu(h) and dh, and its rows' share of both bias gradients.
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
    load_row,
    narrow,
    offset,
    rounded,
    store_chunk,
    widen,
    zeros,
)


@triton.jit(do_not_specialize=["rows"])
def adapter_backward(
    grad_y, x, h, addend, grad_x, g, dh, partial, row_scale, down, down_bias, up, rows, scale,
    ADDEND: tl.constexpr, SCALED: tl.constexpr, RECOMPUTE_H: tl.constexpr, WANT_X: tl.constexpr,
    WANT_PARAMETERS: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr, WIDEN_STAGES: tl.constexpr,
):  # fmt: skip
    """BM rows. grad_y, x, addend, grad_x [rows, DIM] (grad_x may be addend itself); h, g, dh [rows, D].

    `partial` [programs, DIM + D] in fp32: column sums of factor * dY, then of dh.
    """
    COMPUTE: tl.constexpr = down.dtype.element_ty
    tile = tl.program_id(0)
    row = tile * BM + tl.arange(0, BM)
    mask = row < rows
    if RECOMPUTE_H:
        acc = zeros(BM, CHUNK, CHUNKS)
        acc = narrow(acc, x, row, mask, down, DIM, D, False, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
        hidden = rounded(add_bias(acc, down_bias, mask, D, CHUNK, CHUNKS), COMPUTE, CHUNKS)
    else:
        hidden = load_row(h, row, mask, D, CHUNK, CHUNKS)
    factor = tl.zeros((BM,), tl.float32) + scale
    if SCALED:
        factor *= tl.load(row_scale + row, mask=mask, other=0.0)
    dg = zeros(BM, CHUNK, CHUNKS)
    dg = narrow(dg, grad_y, row, mask, up, DIM, D, True, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
    a = ()
    for c in tl.static_range(CHUNKS):  # all of one chunk before the next: fewer registers live
        value = hidden[c].to(tl.float32)
        gradient = factor[:, None] * dg[c] * gelu_gradient(value)
        a += (gradient.to(COMPUTE),)
        if WANT_PARAMETERS:
            column_sums(partial, tile, DIM, DIM + D, channels(c, CHUNK), gradient, mask, D)
            store_chunk(g, row, mask, factor[:, None] * gelu(value), c, D, CHUNK)
            store_chunk(dh, row, mask, a[c], c, D, CHUNK)
    for j in tl.range(0, DIM, BN, num_stages=WIDEN_STAGES):
        column = j + tl.arange(0, BN)
        here = mask[:, None] & (column < DIM)[None, :]
        at = offset(row, DIM)[:, None] + column[None, :]
        if WANT_PARAMETERS:
            dy = tl.load(grad_y + at, mask=here, other=0.0).to(tl.float32)
            column_sums(partial, tile, 0, DIM + D, column, factor[:, None] * dy, mask, DIM)
        if WANT_X:
            total = widen(a, down, j, DIM, D, True, BM, BN, CHUNK, CHUNKS)
            if ADDEND:
                total += tl.load(addend + at, mask=here, other=0.0).to(tl.float32)
            tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=here)
