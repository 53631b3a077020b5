"""The FFN's activation between two cuBLAS products, forward and backward, one pass each.

PyTorch's operators take three passes for QuickGELU, and round to 16 bits after each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels.triton.blocks import gelu, gelu_gradient
from cast_kernels.triton.launch import Plan, Planner, planned

#: Elements of a program: eight 16-byte words a lane of four warps, in bfloat16.
BLOCK = 4096


@triton.jit
def activate(h, out, count, QUICK: tl.constexpr, BLOCK: tl.constexpr):
    """out = act(h), `count` elements; out may be h."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(h + at, mask=at < count, other=0.0).to(tl.float32)
    value = value * tl.sigmoid(1.702 * value) if QUICK else gelu(value)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def activate_backward(h, grad, count, QUICK: tl.constexpr, BLOCK: tl.constexpr):
    """grad *= act'(h), `count` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(h + at, mask=at < count, other=0.0).to(tl.float32)
    if QUICK:
        s = tl.sigmoid(1.702 * value)
        slope = s + 1.702 * value * s * (1.0 - s)
    else:
        slope = gelu_gradient(value)
    change = tl.load(grad + at, mask=at < count, other=0.0).to(tl.float32) * slope
    tl.store(grad + at, change.to(grad.dtype.element_ty), mask=at < count)


@planned
def _plan(count: int, dtype: torch.dtype, quick: bool, backward: bool) -> Plan:
    planner = Planner()
    kernel = activate_backward if backward else activate
    h, other = planner.given(count, dtype=dtype), planner.given(count, dtype=dtype)
    planner.launch(kernel, (triton.cdiv(count, BLOCK),), h, other, count, QUICK=quick, BLOCK=BLOCK, num_warps=4)
    return planner.plan()


def launch_activate(h: Tensor, activation: str, in_place: bool) -> Tensor:
    """act(h) for h contiguous and not empty, over h itself if `in_place`."""
    out = h if in_place else torch.empty_like(h)
    _plan(h.numel(), h.dtype, activation == "quick_gelu", False).run([h, out], inputs=0 if in_place else 1)
    return out


def launch_activate_backward(h: Tensor, grad: Tensor, activation: str) -> None:
    """grad *= act'(h), both contiguous, of one shape and not empty."""
    _plan(h.numel(), h.dtype, activation == "quick_gelu", True).run([h, grad], inputs=1)
