"""Small Triton kernels for the tests of the tools around Triton."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator.triton.launcher import EmulationFault
from torch import Tensor

from cast_kernels.versions import FENCED_TRITON, release

_UNFENCED = pytest.mark.xfail(
    release(triton.__version__) < FENCED_TRITON,
    reason=f"Triton {triton.__version__} leaves out fences on sm_90, and the emulator must say so",
    raises=EmulationFault,
    strict=True,
)
#: What the emulator runs, for tests whose products read what was copied asynchronously.
EMULATED = ("sm_80", pytest.param("sm_90", marks=_UNFENCED))


@triton.jit
def scale_kernel(x, y, factor, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, (tl.load(x + at, mask=at < n).to(tl.float32) * factor).to(y.dtype.element_ty), mask=at < n)


@triton.jit
def strayed_kernel(x, y, z, off, BLOCK: tl.constexpr):
    """y = x, from a wrong place; z is not meant."""
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + off + at))


@triton.jit
def product_kernel(a, b, c, m, k, N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """c [m, N] = a [m, k] @ b [k, N], k a multiple of BK."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, N)
    total = tl.zeros((BM, N), tl.float32)
    for start in tl.range(0, k, BK, num_stages=STAGES):
        inner = start + tl.arange(0, BK)
        left = tl.load(a + row[:, None] * k + inner[None, :], mask=(row < m)[:, None], other=0.0)
        total = tl.dot(left, tl.load(b + inner[:, None] * N + column[None, :]), total)
    tl.store(c + row[:, None] * N + column[None, :], total.to(c.dtype.element_ty), mask=(row < m)[:, None])


@triton.jit
def tuple_kernel(x, sizes, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < sizes[0]) + sizes[1], mask=at < sizes[0])


@triton.jit
def reverse_kernel(scratch, y, BLOCK: tl.constexpr):
    """By way of global memory, with a barrier between the accesses to it."""
    at = tl.arange(0, BLOCK)
    tl.store(scratch + at, at * 1.0)
    tl.debug_barrier()
    tl.store(y + at, tl.load(scratch + BLOCK - 1 - at))


@triton.jit
def pieces_kernel(x, y, length, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    place = tl.program_id(0) * length + i
    tl.store(y + place, tl.load(x + place, mask=i < length) * 2, mask=i < length)


def scale(x: Tensor, factor: float, block: int = 128) -> Tensor:
    """x * factor in float32, for x of one dimension."""
    y = torch.empty(x.shape, dtype=torch.float32)
    scale_kernel[(triton.cdiv(x.numel(), block),)](x, y, factor, x.numel(), BLOCK=block)
    return y


def product(a: Tensor, b: Tensor, bm: int = 64, bk: int = 32, warps: int = 4, stages: int = 3) -> Tensor:
    """a @ b in float32."""
    c = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32)
    product_kernel[(triton.cdiv(a.shape[0], bm),)](
        a, b, c, a.shape[0], a.shape[1], N=b.shape[1], BM=bm, BK=bk, STAGES=stages, num_warps=warps
    )
    return c
