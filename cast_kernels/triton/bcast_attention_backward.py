"""Kernel `attention_backward`: dQ, dK and dV of one direction's windowed cross-attention.

One launch. Where windows fit a tile a program owns the queries and the keys of as many as fit. Elsewhere programs below
`query_tiles` own query rows and walk over keys, the others own key rows and walk over queries: scores are computed
twice. No gradient is ever added to by two programs, so no atomics are needed.

No tile reaches into another clip: what is masked is multiplied by zero, and zero times a NaN or an infinity is NaN, so
one broken clip would spoil its neighbour. It costs nothing: 128 rows of windows of 196 walk over 73 blocks of 64 keys a
clip either way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cast_kernels.triton.blocks import dot, offset, patch_row, within


@triton.jit(do_not_specialize=["clip_tiles", "frames", "patches", "window", "query_tiles"])
def attention_backward(
    q, kv, o, lse, do, dq, dkv, partial, clip_tiles, frames, patches, window, query_tiles, softmax_scale,
    BY_PATCH: tl.constexpr, ONE_BLOCK: tl.constexpr, BIASES: tl.constexpr,
    D: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BM rows of one head (the grid's second axis), in window order; ONE_BLOCK: the BM // window windows in them.

    A clip has `clip_tiles` of them, of which the last may be partial.

    q, o, do, dq [B*T*N, D], kv, dkv [B*T*N, 2D], lse [B*T*N, HEADS] in base 2, all frame by frame. `partial`
    [tiles of rows, 3D], written with BIASES: column sums of dQ, dK and dV over a program's rows, the first stage of the
    biases' gradients.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    if ONE_BLOCK:
        _windows(
            q, kv, lse, do, dq, dkv, partial, tile, head, clip_tiles, frames, patches, window, softmax_scale,
            BY_PATCH, BIASES, D, HEADS, HEAD, BM,
        )  # fmt: skip
    elif tile < query_tiles:
        _queries(
            q, kv, o, lse, do, dq, partial, tile, head, clip_tiles, frames, patches, window, softmax_scale,
            BY_PATCH, BIASES, D, HEADS, HEAD, BM, BLOCK, STAGES,
        )  # fmt: skip
    else:
        _keys(
            q, kv, o, lse, do, dkv, partial, tile - query_tiles, head, clip_tiles, frames, patches, window,
            softmax_scale, BY_PATCH, BIASES, D, HEADS, HEAD, BM, BLOCK, STAGES,
        )  # fmt: skip


@triton.jit
def _windows(
    q, kv, lse, do, dq, dkv, partial, tile, head, clip_tiles, frames, patches, window, softmax_scale,
    BY_PATCH: tl.constexpr, BIASES: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    start, stop = _rows(tile, BM // window * window, clip_tiles, frames, patches)
    i = start + tl.arange(0, BM)
    mask = i < stop
    row = patch_row(i, frames, patches, BY_PATCH)
    lane = head * HEAD + tl.arange(0, HEAD)
    mine, theirs = offset(row, D)[:, None] + lane[None, :], offset(row, 2 * D)[:, None] + lane[None, :]
    queries = tl.load(q + mine, mask=mask[:, None], other=0.0)
    k = tl.load(kv + theirs, mask=mask[:, None], other=0.0)
    v = tl.load(kv + theirs + D, mask=mask[:, None], other=0.0)
    d_out = tl.load(do + mine, mask=mask[:, None], other=0.0)
    level = tl.load(lse + offset(row, HEADS) + head, mask=mask, other=0.0)
    s = dot(queries, tl.trans(k), tl.zeros((BM, BM), tl.float32))
    s = s * (softmax_scale * 1.4426950408889634) - level[:, None]
    p = tl.where(within(i, i // window * window, window) & mask[:, None], tl.exp2(s), 0.0)
    # What log-sum-exp was rounded by is the same for a whole row, and would not cancel in the bias gradients.
    p /= tl.where(mask, tl.sum(p, 1), 1.0)[:, None]
    dp = dot(d_out, tl.trans(v), tl.zeros((BM, BM), tl.float32))
    # delta as it is defined, from P: O, which other programs take it from, was rounded.
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(k.dtype)
    d_queries = dot(ds, k, tl.zeros((BM, HEAD), tl.float32)) * softmax_scale
    dk = dot(tl.trans(ds), queries, tl.zeros((BM, HEAD), tl.float32)) * softmax_scale
    dv = dot(tl.trans(p.to(k.dtype)), d_out, tl.zeros((BM, HEAD), tl.float32))
    tl.store(dq + mine, d_queries.to(dq.dtype.element_ty), mask=mask[:, None])
    tl.store(dkv + theirs, dk.to(dkv.dtype.element_ty), mask=mask[:, None])
    tl.store(dkv + theirs + D, dv.to(dkv.dtype.element_ty), mask=mask[:, None])
    if BIASES:
        sums = partial + tile * (3 * D) + lane
        tl.store(sums, tl.sum(d_queries, 0))
        tl.store(sums + D, tl.sum(dk, 0))
        tl.store(sums + 2 * D, tl.sum(dv, 0))


@triton.jit
def _rows(tile, held, clip_tiles, frames, patches):
    """Where the tile's rows begin and end: `held`, or what is left of its clip."""
    clip = tile // clip_tiles
    start = clip * (frames * patches) + tile % clip_tiles * held
    return start, tl.minimum(start + held, (clip + 1) * (frames * patches))


@triton.jit
def _range(start, stop, window):
    """The first row and the end of all windows that rows from `start` to `stop`, of one clip, touch."""
    return start // window * window, (stop - 1) // window * window + window


@triton.jit
def _queries(
    q, kv, o, lse, do, dq, partial, tile, head, clip_tiles, frames, patches, window, softmax_scale,
    BY_PATCH: tl.constexpr, BIASES: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start, stop = _rows(tile, BM, clip_tiles, frames, patches)
    i = start + tl.arange(0, BM)
    mask = i < stop
    low = i // window * window  # once a row, or every opposite row would be divided by the length
    row = patch_row(i, frames, patches, BY_PATCH)
    lane = head * HEAD + tl.arange(0, HEAD)
    mine = offset(row, D)[:, None] + lane[None, :]
    queries = tl.load(q + mine, mask=mask[:, None], other=0.0)
    d_out = tl.load(do + mine, mask=mask[:, None], other=0.0)
    delta = tl.sum(d_out.to(tl.float32) * tl.load(o + mine, mask=mask[:, None], other=0.0).to(tl.float32), 1)
    level = tl.load(lse + offset(row, HEADS) + head, mask=mask, other=0.0)
    factor = softmax_scale * 1.4426950408889634
    first, end = _range(start, stop, window)
    acc = tl.zeros((BM, HEAD), tl.float32)
    for j in tl.range(0, end - first, BLOCK, num_stages=STAGES):
        key = first + j + tl.arange(0, BLOCK)
        inside = key < end
        at = offset(patch_row(key, frames, patches, BY_PATCH), 2 * D)[:, None] + lane[None, :]
        k = tl.load(kv + at, mask=inside[:, None], other=0.0)
        v = tl.load(kv + at + D, mask=inside[:, None], other=0.0)
        s = dot(queries, tl.trans(k), tl.zeros((BM, BLOCK), tl.float32))
        p = tl.where(within(key, low, window), tl.exp2(s * factor - level[:, None]), 0.0)
        dp = dot(d_out, tl.trans(v), tl.zeros((BM, BLOCK), tl.float32))
        ds = p * (dp - delta[:, None])
        acc = dot(ds.to(k.dtype), k, acc)
    acc *= softmax_scale
    tl.store(dq + mine, acc.to(dq.dtype.element_ty), mask=mask[:, None])
    if BIASES:
        tl.store(partial + tile * (3 * D) + lane, tl.sum(acc, 0))


@triton.jit
def _keys(
    q, kv, o, lse, do, dkv, partial, tile, head, clip_tiles, frames, patches, window, softmax_scale,
    BY_PATCH: tl.constexpr, BIASES: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start, stop = _rows(tile, BM, clip_tiles, frames, patches)
    i = start + tl.arange(0, BM)
    mask = i < stop
    low = i // window * window  # once a row, or every opposite row would be divided by the length
    row = patch_row(i, frames, patches, BY_PATCH)
    lane = head * HEAD + tl.arange(0, HEAD)
    mine = offset(row, 2 * D)[:, None] + lane[None, :]
    k = tl.load(kv + mine, mask=mask[:, None], other=0.0)
    v = tl.load(kv + mine + D, mask=mask[:, None], other=0.0)
    factor = softmax_scale * 1.4426950408889634
    first, end = _range(start, stop, window)
    dk = tl.zeros((BM, HEAD), tl.float32)
    dv = tl.zeros((BM, HEAD), tl.float32)
    for j in tl.range(0, end - first, BLOCK, num_stages=STAGES):
        asking = first + j + tl.arange(0, BLOCK)
        inside = asking < end
        asking_row = patch_row(asking, frames, patches, BY_PATCH)
        at = offset(asking_row, D)[:, None] + lane[None, :]
        queries = tl.load(q + at, mask=inside[:, None], other=0.0)
        d_out = tl.load(do + at, mask=inside[:, None], other=0.0)
        out = tl.load(o + at, mask=inside[:, None], other=0.0)
        delta = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
        level = tl.load(lse + offset(asking_row, HEADS) + head, mask=inside, other=0.0)
        s = dot(k, tl.trans(queries), tl.zeros((BM, BLOCK), tl.float32))
        p = tl.where(within(asking, low, window), tl.exp2(s * factor - level[None, :]), 0.0)
        dv = dot(p.to(d_out.dtype), d_out, dv)
        dp = dot(v, tl.trans(d_out), tl.zeros((BM, BLOCK), tl.float32))
        ds = p * (dp - delta[None, :])
        dk = dot(ds.to(queries.dtype), queries, dk)
    dk *= softmax_scale
    tl.store(dkv + mine, dk.to(dkv.dtype.element_ty), mask=mask[:, None])
    tl.store(dkv + mine + D, dv.to(dkv.dtype.element_ty), mask=mask[:, None])
    if BIASES:
        sums = partial + tile * (3 * D) + lane
        tl.store(sums + D, tl.sum(dk, 0))
        tl.store(sums + 2 * D, tl.sum(dv, 0))
