"""Kernel `cast`: what products read in the compute dtype, and what comes in another, rounded in one launch."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from cast_kernels.triton.blocks import odd, unodd
from cast_kernels.triton.launch import Buffer, Planner, as_odd

#: Elements of a program: 16 for each of 128 threads.
_BLOCK = 2048
#: What numbers of elements are counted in: 2^31 of them fill no GPU, and every op's widths are multiples.
_UNIT = 16


class Cast(NamedTuple):
    """One tensor as the kernel takes it."""

    source: Any  # [16 * units]
    out: Any  # [16 * units], written
    units: Any  # odd
    end: Any  # odd: the program before which the tensor ends


@triton.jit
def cast(tensors, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """Every tensor's out = source, rounded to its dtype, one tensor behind the other."""
    tile = tl.program_id(0)
    own, start = tensors[0], odd(0)
    for i in tl.static_range(1, len(tensors)):
        if odd(tile) >= tensors[i - 1].end:
            own, start = tensors[i], tensors[i - 1].end
    at = (tile - unodd(start)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < unodd(own.units).to(tl.int64) * UNIT
    tl.store(own.out + at, tl.load(own.source + at, mask=inside).to(own.out.dtype.element_ty), mask=inside)


def add(planner: Planner, tensors: Mapping[Buffer, Buffer]) -> None:
    """Plan, before all other launches, that each key is rounded to its value; elements are multiples of 16."""
    for dtype in dict.fromkeys(source.dtype for source in tensors):
        pairs = [(source, out) for source, out in tensors.items() if source.dtype == dtype]
        counts = [torch.Size(source.shape).numel() for source, _ in pairs]
        ends = list(accumulate(triton.cdiv(count, _BLOCK) for count in counts))
        made = tuple(
            Cast(source, out, as_odd(count // _UNIT), as_odd(end))
            for (source, out), count, end in zip(pairs, counts, ends, strict=True)
        )
        planner.launch_first(cast, (ends[-1],), made, BLOCK=_BLOCK, UNIT=_UNIT, num_warps=4)
