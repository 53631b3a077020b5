"""Kernel `exchange`: windowed cross-attention, its output projection, GELU, the up-projection and the residual.

One launch for both directions; the one with the longer windows comes first in the grid, so that short programs fill
the end. A program owns rows of one asking stream. It attends for them head by head, leaving O in global memory
(backward wants it anyway), and after a barrier reads its own rows of O back as the operand of the output projection:
d channels of O do not fit in registers beside the attention's tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from cast_kernels.triton.blocks import (
    add_bias,
    dot,
    gelu,
    gelu_to_round,
    load_chunk,
    narrow,
    offset,
    patch_row,
    store_chunk,
    widen,
    within,
    zeros,
)

#: Arguments that are 1 or a multiple of 16 in some problems only: no kernels of their own for them.
_SIZES = ["patch_rows", "cls_rows", "frames", "patches", "first_window", "second_window", "first_programs"]


class Asking(NamedTuple):
    """One direction's tensors; x, y and h have the asking stream's rows, the others one a patch."""

    x: Any  # [rows, DIM]
    y: Any  # [rows, DIM], written
    q: Any  # [B*T*N, D]
    kv: Any  # [B*T*N, 2D], keys first
    o: Any  # [B*T*N, D], written
    lse: Any  # [B*T*N, HEADS] in fp32 and base 2; written with STORE_LSE
    h: Any  # [rows, D]; written with STORE_H
    scale: Any  # [B, tokens] in fp32 with SCALE "token", [B] with "clip", unused with "none"
    proj: Any  # [D, D]
    proj_bias: Any  # [D]
    up: Any  # [DIM, D]
    up_bias: Any  # [DIM]


@triton.jit(do_not_specialize=_SIZES)
def exchange(
    first, second,
    cls, patch_rows, cls_rows, frames, patches, first_window, second_window, first_programs, softmax_scale,
    FIRST_CLS: tl.constexpr, FIRST_BY_PATCH: tl.constexpr, FIRST_ONE_BLOCK: tl.constexpr, FIRST_SCALE: tl.constexpr,
    FIRST_BM: tl.constexpr, FIRST_BQ: tl.constexpr,
    SECOND_CLS: tl.constexpr, SECOND_BY_PATCH: tl.constexpr, SECOND_ONE_BLOCK: tl.constexpr,
    SECOND_SCALE: tl.constexpr, SECOND_BM: tl.constexpr, SECOND_BQ: tl.constexpr,
    BOTH: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    ATTEND_ONLY: tl.constexpr, STORE_LSE: tl.constexpr, STORE_H: tl.constexpr,
    BKEY: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr, WIDEN_STAGES: tl.constexpr, KEY_STAGES: tl.constexpr,
):  # fmt: skip
    """Programs below `first_programs` take FIRST_BM rows of the first direction, with BOTH the others of the second.

    Rows in window order; after the `patch_rows` patches come `cls_rows`, if the asking stream has CLS. `cls` [B*T, D]
    is its LayerNorm's output in fp32. Tensors lie frame by frame.
    """
    tl.static_assert(
        FIRST_BM % FIRST_BQ == 0 and SECOND_BM % SECOND_BQ == 0,
        "a program's rows must be a multiple of the queries that attend together",
    )
    program = tl.program_id(0)
    if program < first_programs:
        _one_direction(
            program * FIRST_BM, first, cls, patch_rows, cls_rows, frames, patches, first_window, softmax_scale,
            FIRST_CLS, FIRST_BY_PATCH, FIRST_ONE_BLOCK, FIRST_SCALE, DIM, D, HEADS, HEAD,
            ATTEND_ONLY, STORE_LSE, STORE_H, FIRST_BM, FIRST_BQ, BKEY, BK, BN, CHUNK, CHUNKS,
            STAGES, WIDEN_STAGES, KEY_STAGES,
        )  # fmt: skip
    elif BOTH:
        _one_direction(
            (program - first_programs) * SECOND_BM, second, cls,
            patch_rows, cls_rows, frames, patches, second_window, softmax_scale,
            SECOND_CLS, SECOND_BY_PATCH, SECOND_ONE_BLOCK, SECOND_SCALE, DIM, D, HEADS, HEAD,
            ATTEND_ONLY, STORE_LSE, STORE_H, SECOND_BM, SECOND_BQ, BKEY, BK, BN, CHUNK, CHUNKS,
            STAGES, WIDEN_STAGES, KEY_STAGES,
        )  # fmt: skip


@triton.jit
def _one_direction(
    start, own, cls, patch_rows, cls_rows, frames, patches, window, softmax_scale,
    CLS: tl.constexpr, BY_PATCH: tl.constexpr, ONE_BLOCK: tl.constexpr, SCALE: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    ATTEND_ONLY: tl.constexpr, STORE_LSE: tl.constexpr, STORE_H: tl.constexpr,
    BM: tl.constexpr, BQ: tl.constexpr, BKEY: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr, WIDEN_STAGES: tl.constexpr,
    KEY_STAGES: tl.constexpr,
):  # fmt: skip
    """BM rows from `start` on, in window order, of the stream that asks."""
    if start < patch_rows:
        for part in tl.static_range(BM // BQ):
            _attend(
                own.q, own.kv, own.o, own.lse, start + part * BQ, patch_rows, frames, patches, window, softmax_scale,
                BY_PATCH, ONE_BLOCK, D, HEADS, HEAD, STORE_LSE, BQ, BKEY, KEY_STAGES,
            )  # fmt: skip
    if not ATTEND_ONLY:
        tl.debug_barrier()  # O was written by other threads of this program
        COMPUTE: tl.constexpr = own.q.dtype.element_ty
        i = start + tl.arange(0, BM)
        is_patch = i < patch_rows
        mask = i < patch_rows + cls_rows if CLS else is_patch
        p_row = patch_row(i, frames, patches, BY_PATCH)
        if CLS:
            frame = tl.where(is_patch, p_row // patches, i - patch_rows)
            token = tl.where(is_patch, p_row % patches + 1, 0)
            row = frame * (patches + 1) + token
        else:
            frame, token, row = p_row // patches, p_row % patches, p_row
        acc = zeros(BM, CHUNK, CHUNKS)
        acc = narrow(acc, own.o, p_row, is_patch, own.proj, D, D, False, COMPUTE, BK, CHUNK, CHUNKS, STAGES)
        hidden = add_bias(acc, own.proj_bias, is_patch, D, CHUNK, CHUNKS)
        g = ()
        for c in tl.static_range(CHUNKS):
            value = hidden[c]
            if CLS:  # CLS rows take n: they are neither queries nor keys and skip the output projection
                value += load_chunk(cls, i - patch_rows, mask & (i >= patch_rows), c, D, CHUNK)
            kept = value.to(COMPUTE)
            if STORE_H:
                store_chunk(own.h, row, mask, kept, c, D, CHUNK)
            wide = kept.to(tl.float32)
            g += ((gelu(wide) if kept.dtype == tl.float32 else gelu_to_round(wide)).to(COMPUTE),)
        factor = tl.zeros((BM,), tl.float32) + 1.0
        if SCALE == "token":
            factor = tl.load(own.scale + frame // frames * (patches + 1) + token, mask=mask, other=0.0)
        if SCALE == "clip":
            factor = tl.load(own.scale + frame // frames, mask=mask, other=0.0)
        for j in tl.range(0, DIM, BN, num_stages=WIDEN_STAGES):
            at = j + tl.arange(0, BN)
            here = mask[:, None] if DIM % BN == 0 else mask[:, None] & (at < DIM)[None, :]
            branch = widen(g, own.up, j, DIM, D, False, BM, BN, CHUNK, CHUNKS)
            branch += tl.load(own.up_bias + at, mask=at < DIM, other=0.0).to(tl.float32)[None, :]
            old = tl.load(own.x + offset(row, DIM)[:, None] + at[None, :], mask=here, other=0.0).to(tl.float32)
            new = old + factor[:, None] * branch
            tl.store(own.y + offset(row, DIM)[:, None] + at[None, :], new.to(own.y.dtype.element_ty), mask=here)


@triton.jit
def _attend(
    q, kv, o, lse, start, patch_rows, frames, patches, window, softmax_scale,
    BY_PATCH: tl.constexpr, ONE_BLOCK: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr,
    STORE_LSE: tl.constexpr, BQ: tl.constexpr, BKEY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BQ queries from `start` on, head by head, against the keys of every window that they touch; others are masked.

    Clip by clip: another window's key has probability zero, and zero times a NaN or an infinity is NaN, so one broken
    clip would spoil its neighbour in the batch. One loop for clips and heads, as two spill 12 words in a later loop.
    Windows lie one behind the other in window order, so the keys are one range; with ONE_BLOCK the tile holds whole
    windows, and the range is the queries' own. Otherwise online softmax, in base 2.
    """
    i = start + tl.arange(0, BQ)
    row = patch_row(i, frames, patches, BY_PATCH)
    # Where a row's window begins, once a row: dividing every key by its length took a sixth of the instructions.
    low = i // window * window
    clip_rows, clip = frames * patches, start // (frames * patches)
    clips = tl.cdiv(tl.minimum(start + BQ, patch_rows), clip_rows) - clip
    factor = softmax_scale * 1.4426950408889634  # log2(e): exp2 is the hardware's
    for step in range(HEADS * clips):
        head = step % HEADS
        own = (clip + step // HEADS) * clip_rows
        begin, stop = tl.maximum(start, own), tl.minimum(start + BQ, own + clip_rows)
        mask = (i >= begin) & (i < stop)
        first, end = begin // window * window, (stop - 1) // window * window + window
        lane = head * HEAD + tl.arange(0, HEAD)
        queries = tl.load(q + offset(row, D)[:, None] + lane[None, :], mask=mask[:, None], other=0.0)
        if ONE_BLOCK:
            at = offset(row, 2 * D)[:, None] + lane[None, :]
            k = tl.load(kv + at, mask=mask[:, None], other=0.0)
            v = tl.load(kv + at + D, mask=mask[:, None], other=0.0)
            s = dot(queries, tl.trans(k), tl.zeros((BQ, BQ), tl.float32))
            s = tl.where(within(i, low, window), s, -1e30)
            top = tl.max(s, 1) * factor
            p = tl.exp2(s * factor - top[:, None])  # one fused multiply-add an element
            total = tl.sum(p, 1)
            acc = dot(p.to(v.dtype), v, tl.zeros((BQ, HEAD), tl.float32))
        else:
            top = tl.full((BQ,), -1e30, tl.float32)
            total = tl.zeros((BQ,), tl.float32)
            acc = tl.zeros((BQ, HEAD), tl.float32)
            for j in tl.range(first, end, BKEY, num_stages=STAGES):
                key = j + tl.arange(0, BKEY)
                at = offset(patch_row(key, frames, patches, BY_PATCH), 2 * D)[:, None] + lane[None, :]
                k = tl.load(kv + at, mask=(key < end)[:, None], other=0.0)
                v = tl.load(kv + at + D, mask=(key < end)[:, None], other=0.0)
                s = dot(queries, tl.trans(k), tl.zeros((BQ, BKEY), tl.float32))
                s = tl.where(within(key, low, window), s, -1.2676506002282294e30)
                higher = tl.maximum(top, tl.max(s, 1) * factor)
                # A block may hold no key of a row's window. Its exp2(0) is multiplied away when one comes; it is 0 for
                # a power of two as mask, whose product is exact: a fused multiply-add keeps what rounding takes.
                p = tl.exp2(s * factor - higher[:, None])
                shrink = tl.exp2(top - higher)
                total = total * shrink + tl.sum(p, 1)
                acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
                top = higher
        total = tl.where(mask, total, 1.0)
        mixed = (acc * (1.0 / total)[:, None]).to(o.dtype.element_ty)  # a division a row, not an element
        tl.store(o + offset(row, D)[:, None] + lane[None, :], mixed, mask=mask[:, None])
        if STORE_LSE:
            tl.store(lse + offset(row, HEADS) + head, top + tl.log2(total), mask=mask)
