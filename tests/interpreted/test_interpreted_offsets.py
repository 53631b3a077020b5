"""Past 2^31 elements: every buffer with a row per token is that large here, and its last rows are right.

Memory is taken but hardly touched, since only the programs of the last rows run. An offset of 32 bits would wrap and
end this process, or read zeros. Kernels that walk over all rows are not run; tests/test_triton_launches.py reads the
width of their offsets in compiled code.
"""

from __future__ import annotations

import inspect
import mmap
from dataclasses import replace
from typing import Any

import pytest
import torch
from bcast_cases import small
from torch import Tensor
from triton.runtime import interpreter

import cast_kernels
from cast_kernels.triton import bcast as triton_bcast
from cast_kernels.triton import launch

#: 8 patches and 10 tokens a clip; 128 channels: the smallest batch past 2^31 elements.
CASE = small(batch=2**31 // (8 * 128) + 3, frames=2, patches=4, dim=128, bottleneck=128, heads=2)
WALK_OVER_ALL_ROWS = ("weight_gradient", "sum_parts", "reduce_rows", "position_sums", "position_products")
#: The default tiles have 32 rows or more, so two tiles hold the last clip wherever it begins.
TILES = 2
LAST = 2  # clips that are compared


def run_last_programs(self: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of GridExecutor.__call__: the last programs of each range of rows, without copying storages."""
    if self.fn.__name__ in WALK_OVER_ALL_ROWS:
        return
    names = inspect.getfullargspec(self.fn).args
    values = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
    grid = (*self.grid, 1, 1)[:3]
    ends = {grid[0], values.get("spatial_tiles"), values.get("query_tiles"), values.get("first_programs")}
    if self.fn.__name__ == "exchange":  # CLS rows follow the patches, of one direction or the other
        for before, rows in ((0, values["FIRST_BM"]), (values["first_programs"], values["SECOND_BM"])):
            ends.add(before - (-values["patch_rows"] // rows))
    programs = sorted({end - back for end in ends if end for back in range(1, TILES + 1) if end >= back})
    patched = interpreter._patch_lang(self.fn)
    try:
        converted = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in values.items()}
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for program in programs:
            for second in range(grid[1]):
                interpreter.interpreter_builder.set_grid_idx(program, second, 0)
                self.fn(**converted)
    finally:
        patched.restore()


def grown(last: Tensor) -> Tensor:
    """A batch of CASE whose last clips are these; the others are untouched memory."""
    large = torch.empty((CASE.batch, *last.shape[1:]), dtype=last.dtype)
    assert large.numel() > 2**31
    large[-len(last) :] = last
    return large


def untouched(size: int) -> Tensor:
    """So many bytes, more than there is memory: only pages that are touched are taken."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)


def test_the_last_rows_of_a_batch_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16
    few = replace(CASE, batch=8)
    module, inputs = few.module(dtype, "eager"), few.inputs(dtype, grad=True)
    outputs = module(*inputs)
    given = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for x in outputs]
    wanted_grads = torch.autograd.grad(outputs, inputs, given)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_last_programs)
    monkeypatch.setattr(launch, "_scratch", lambda _, size: untouched(size))
    parameters = cast_kernels.Parameters.from_flat([p if p is None else p.detach() for p in module.gathered().flat()])
    large = [grown(x.detach()) for x in inputs]
    problem = module.problem(CASE.batch)
    y_s, y_t, saved = triton_bcast.forward(problem, *large, parameters, None, None, 1e-6, "all")
    wanted = (True,) * (2 + len(parameters.flat()))
    grads = triton_bcast.backward(
        problem, *large, parameters, saved, None, None, 1e-6, "all", *map(grown, given), wanted
    )
    for found, want in zip((y_s, y_t, *grads[:2]), (*outputs, *wanted_grads), strict=True):
        assert found is not None
        assert found.numel() > 2**31
        ours, eager = found[-LAST:].float(), want[-LAST:].detach().float()
        # bfloat16 rounds at 2^-9, about ten times on the way.
        assert float((ours - eager).norm()) <= 0.03 * float(eager.norm())
