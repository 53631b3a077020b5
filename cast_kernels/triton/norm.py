"""LayerNorm of the stream's width, forward and backward, one pass each.

PyTorch's own costs more passes here: under autocast it returns float32, which the next product has rounded in a pass
of its own, and the residual's gradient is added to its input gradient in another. Backward takes the statistics of the
row again, which it reads anyway: nothing is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cast_kernels.triton import sums
from cast_kernels.triton.blocks import offset
from cast_kernels.triton.launch import Plan, Planner, planned

#: Rows of a program at a time: with four warps, a warp has a row of 768 channels in 24 registers a lane.
ROWS = 4
#: Times that many rows where a program leaves sums over its rows: fewer partial sums to add up.
PARTS = 16


@triton.jit
def _statistics(value, here, eps, DIM: tl.constexpr):
    """value - mean and 1 / deviation of each row of an fp32 tile that is zero outside. Centred squares."""
    centred = tl.where(here, value - (tl.sum(value, 1) / DIM)[:, None], 0.0)
    return centred, tl.rsqrt(tl.sum(centred * centred, 1) / DIM + eps)


@triton.jit(do_not_specialize=["rows"])
def norm(x, n, weight, bias, rows, eps, DIM: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr):
    """n = LayerNorm(x), [rows, DIM], BM rows."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, BLOCK)
    here = (row < rows)[:, None] & (column < DIM)[None, :]
    at = offset(row, DIM)[:, None] + column[None, :]
    centred, rstd = _statistics(tl.load(x + at, mask=here, other=0.0).to(tl.float32), here, eps, DIM)
    w = tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < DIM, other=0.0).to(tl.float32)
    tl.store(n + at, (centred * rstd[:, None] * w[None, :] + b[None, :]).to(n.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    x, dn, grad_y, grad_x, partial, weight, rows, eps,
    RESIDUAL: tl.constexpr, WANT_X: tl.constexpr, WANT_PARAMETERS: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """grad_x = [grad_y +] the gradient of LayerNorm's input; PARTS times BM rows, all [rows, DIM].

    `partial` [programs, 2 * DIM] in fp32: column sums of dn * xhat, then of dn.
    """
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    scaled, plain = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        row = (tl.program_id(0) * PARTS + part) * BM + tl.arange(0, BM)
        here = (row < rows)[:, None] & (column < DIM)[None, :]
        at = offset(row, DIM)[:, None] + column[None, :]
        centred, rstd = _statistics(tl.load(x + at, mask=here, other=0.0).to(tl.float32), here, eps, DIM)
        xhat = centred * rstd[:, None]
        gradient = tl.load(dn + at, mask=here, other=0.0).to(tl.float32)
        if WANT_PARAMETERS:
            scaled += tl.sum(gradient * xhat, 0)
            plain += tl.sum(gradient, 0)
        if WANT_X:
            g = gradient * w[None, :]
            mean, along = tl.sum(g, 1) / DIM, tl.sum(g * xhat, 1) / DIM
            value = rstd[:, None] * (g - mean[:, None] - xhat * along[:, None])
            if RESIDUAL:
                value += tl.load(grad_y + at, mask=here, other=0.0).to(tl.float32)
            tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=here)
    if WANT_PARAMETERS:
        first = partial + tl.program_id(0) * 2 * DIM
        tl.store(first + column, scaled, mask=column < DIM)
        tl.store(first + DIM + column, plain, mask=column < DIM)


@planned
def _forward_plan(
    rows: int, dim: int, stream: torch.dtype, compute: torch.dtype, parameters: tuple[torch.dtype, torch.dtype],
    eps: float,
) -> Plan:  # fmt: skip
    planner = Planner()
    x, weight, bias = planner.given(rows, dim, dtype=stream), *(planner.given(dim, dtype=kind) for kind in parameters)
    n = planner.given(rows, dim, dtype=compute)
    planner.launch(
        norm, (triton.cdiv(rows, ROWS),), x, n, weight, bias, rows, eps, DIM=dim, BLOCK=triton.next_power_of_2(dim),
        BM=ROWS, num_warps=4,
    )  # fmt: skip
    return planner.plan()


def launch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, compute: torch.dtype) -> Tensor:
    """LayerNorm of x [..., D], contiguous, with at least one row -> the same in the compute dtype."""
    n, dim = torch.empty_like(x, dtype=compute), x.shape[-1]
    plan = _forward_plan(x.numel() // dim, dim, x.dtype, compute, (weight.dtype, bias.dtype), eps)
    plan.run([x, weight.contiguous(), bias.contiguous(), n], inputs=3)
    return n


class _Kind(NamedTuple):
    """What a backward's plan depends on besides sizes."""

    stream: torch.dtype
    compute: torch.dtype
    residual: torch.dtype | None  # None: there is none
    weight: torch.dtype
    bias: torch.dtype
    eps: float
    wanted: tuple[bool, ...]  # x, weight, bias


@planned
def _backward_plan(rows: int, dim: int, kind: _Kind) -> Plan:
    planner, train = Planner(), any(kind.wanted[1:])
    x, dn = planner.given(rows, dim, dtype=kind.stream), planner.given(rows, dim, dtype=kind.compute)
    weight = planner.given(dim, dtype=kind.weight)
    grad_y = dn if kind.residual is None else planner.given(rows, dim, dtype=kind.residual)
    grad_x = planner.given(rows, dim, dtype=kind.stream) if kind.wanted[0] else x
    parts = PARTS if train else 1
    programs = triton.cdiv(rows, ROWS * parts)
    partial = planner.scratch(programs, 2 * dim, dtype=torch.float32) if train else x
    planner.launch(
        norm_backward, (programs,), x, dn, grad_y, grad_x, partial, weight, rows, kind.eps,
        RESIDUAL=kind.residual is not None, WANT_X=kind.wanted[0], WANT_PARAMETERS=train, DIM=dim,
        BLOCK=triton.next_power_of_2(dim), BM=ROWS, PARTS=parts, num_warps=4,
    )  # fmt: skip
    if train:
        vectors = [planner.given(dim, dtype=dtype) for dtype in (kind.weight, kind.bias)]
        sums.add(planner, [sums.Reduction(partial, vectors)])
    return planner.plan()


def launch_norm_backward(
    x: Tensor, dn: Tensor, grad_y: Tensor | None, weight: Tensor, bias: Tensor, eps: float, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of x (with `grad_y`, the residual's, added if there is one), weight and bias, None where not wanted.

    Args:
        x, dn, grad_y: [..., D], contiguous, with at least one row.
        weight, bias: [D].
        eps: of forward.
        wanted: for x, weight and bias.
    """
    dim, train = x.shape[-1], any(wanted[1:])
    residual = None if grad_y is None else grad_y.dtype
    kind = _Kind(x.dtype, dn.dtype, residual, weight.dtype, bias.dtype, eps, wanted)
    plan = _backward_plan(x.numel() // dim, dim, kind)
    read = [x, dn, weight.contiguous()] + ([] if grad_y is None else [grad_y])
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else None
        for t, needed in zip((x, weight, bias), (wanted[0], train, train), strict=True)
    ]
    plan.run([*read, *(grad for grad in grads if grad is not None)], inputs=len(read))
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
