"""B-CAST's forward by the CUDA kernels, on problems of `cast_kernels.evidence.cases`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from cast_kernels import _native
from cast_kernels.cuda import bcast, common
from cast_kernels.evidence.cases import KINDS, Case, Error, Kind, compare, run

needs_kernels = pytest.mark.skipif(_native.CUDA is None, reason=f"nothing to test: {_native.CUDA_REASON}")

#: Small and odd: no count of rows is a multiple of a tile's, no width of a unit's.
ODD = Case(batch=2, frames=3, patches=23, dim=72, bottleneck=192, heads=6, backward=False)

#: As `KINDS`, and autocast to fp16.
ALL_KINDS = KINDS | {"amp_fp16": Kind(torch.float32, torch.float16)}
NUMBERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WINDOWS = {"time": 0, "space": 1, "space-time": 2}
#: What backward computes again, in csrc/cuda/bcast.h; None: there is none.
RECOMPUTE = {"nothing": 0, "cheap": 1, "all": 2, None: 3}


@contextmanager
def multiprocessors(number: int) -> Iterator[None]:
    """Launches inside are made for a GPU of so many; a plan is kept by its GPU's number, so none outlives this."""
    bcast._plan.cache_clear()
    try:
        with mock.patch.object(common, "RECORDED_MULTIPROCESSORS", number):
            yield
    finally:
        bcast._plan.cache_clear()


class Call(NamedTuple):
    """Everything that one call names, kept alive."""

    problem: object
    given: list[Tensor]  # inputs, factors and parameters: nothing writes them
    x: tuple[Tensor, Tensor]
    parameters: list[Tensor | None]
    scales: tuple[Tensor | None, Tensor | None]
    y: tuple[Tensor, Tensor]
    saved: Tensor
    scratch: Tensor
    recompute: int

    def forward(self, multiprocessors: int = common.RECORDED_MULTIPROCESSORS) -> None:
        _native.cuda().forward(
            self.problem, _addresses(self.x), _addresses(self.parameters), _addresses(self.scales),
            _addresses(self.y), self.recompute, self.saved.data_ptr(), self.scratch.data_ptr(),
            multiprocessors, 0,
        )  # fmt: skip

    def outputs(self) -> dict[str, Tensor]:
        return {"spatial": self.y[0].double(), "temporal": self.y[1].double()}


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def call(case: Case, kind: str = "bf16", recompute: str | None = None) -> Call:
    """A call whose outputs, saved and scratch memory hold NaN in every type."""
    cuda, dtypes = _native.cuda(), ALL_KINDS[kind]
    made = case.module(dtypes.dtype)
    x = case.inputs(dtypes.streams or dtypes.dtype)
    parameters = [None if one is None else one.detach().contiguous() for one in made.gathered().flat()]
    spatial, temporal = (None if one is None else one.float().contiguous() for one in case.scales())
    t2s, s2t = (
        WINDOWS[window] if way in case.directions else -1
        for way, window in zip(("t2s", "s2t"), case.windows, strict=True)
    )
    problem = cuda.Problem(
        case.batch, case.frames, case.patches, case.dim, case.bottleneck, case.heads, t2s, s2t,
        NUMBERS[dtypes.compute], NUMBERS[x[0].dtype], NUMBERS[dtypes.dtype], 1e-6,
    )  # fmt: skip
    number = RECOMPUTE[recompute]
    sizes = (cuda.saved_bytes(problem, number), cuda.forward_scratch_bytes(problem, number))
    saved, scratch = (torch.full((max(1, size),), 255, dtype=torch.uint8) for size in sizes)
    y = tuple(torch.full_like(one, float("nan")) for one in x)
    given = [*x, *(one for one in (*parameters, spatial, temporal) if one is not None)]
    return Call(problem, given, x, parameters, (spatial, temporal), y, saved, scratch, number)


def errors(case: Case, kind: str, made: Call) -> list[Error]:
    """Those of the outputs that this problem has, beside eager's."""
    kinds = ALL_KINDS[kind]._asdict()
    exact, eager = run(case, None, exact=True, **kinds), run(case, "eager", **kinds)
    ours = made.outputs()
    for name, way in (("spatial", "t2s"), ("temporal", "s2t")):
        if way not in case.directions:  # the stream receives nothing: the caller hands it on
            assert ours[name].isnan().all()
            del ours[name], exact[name], eager[name]
    return compare(ours, eager, exact)
