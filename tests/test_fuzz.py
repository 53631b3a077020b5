"""Random problems, layouts and dtypes through the public `bcast` on the native core, against the fp64 reference."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from bcast_cases import Case, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cast_kernels
from cast_kernels import _native

pytestmark = pytest.mark.skipif(_native.CORE is None, reason=f"nothing to test: {_native.REASON}")

#: Examples drawn; the same ones in every run. For a longer search: CAST_KERNELS_FUZZ=2000 pytest tests/test_fuzz.py
EXAMPLES = int(os.environ.get("CAST_KERNELS_FUZZ", "40"))


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: the order of its dimensions, a gap after each row, a start off the line."""

    order: tuple[int, ...]
    gap: int
    offset: int

    def of(self, x: Tensor) -> Tensor:
        """The same values in this layout, NaN between and around them."""
        shape = [x.shape[i] for i in self.order]
        wide = [*shape[:-1], shape[-1] + self.gap]
        memory = torch.full((self.offset + int(torch.tensor(wide).prod()),), torch.nan, dtype=x.dtype)
        inner = memory[self.offset :].view(wide)[..., : shape[-1]]
        inner.copy_(x.permute(self.order))
        return inner.permute([self.order.index(i) for i in range(x.ndim)])


def layouts(dimensions: int) -> st.SearchStrategy[Layout]:
    order = st.permutations(range(dimensions)).map(tuple)
    return st.builds(Layout, order, st.integers(0, 3), st.integers(0, 5))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any windows and directions over sizes around the tiles' edges; windows of up to a few hundred tokens."""
    heads = draw(st.integers(1, 5))
    windows = st.sampled_from(list(cast_kernels.WINDOWS))
    frames, patches = draw(st.sampled_from([(1, 1), (2, 3), (3, 7), (5, 19), (1, 130), (130, 1), (2, 140), (9, 33)]))
    return small(
        batch=draw(st.integers(1, 3)) if frames * patches < 100 else 1,
        frames=frames,
        patches=patches,
        dim=draw(st.integers(1, 50)),
        # LayerNorm over one or two channels has no gradient but rounding times 1 / sqrt(eps).
        bottleneck=heads * draw(st.integers(-(-4 // heads), 20)),
        heads=heads,
        windows=(draw(windows), draw(windows)),
        directions=draw(st.sampled_from([("t2s", "s2t"), ("t2s",), ("s2t",)])),
        positions=draw(st.booleans()),
        scaled=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def results(
    case: Case, inputs: tuple[Tensor, Tensor], dtype: torch.dtype, layout: Layout | None, trained: set[int]
) -> dict[str, Tensor]:
    """Outputs and gradients in `dtype`; on the native core with output gradients in `layout`, or the reference."""
    module = case.module(torch.float32, "cpu" if layout else "auto").to(dtype)
    for i, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(i in trained)
    spatial, temporal = (x.detach().requires_grad_() for x in inputs)
    scales = case.scales(dtype)
    if layout:
        outputs = module(spatial, temporal, *scales)
    else:
        outputs = cast_kernels.reference.bcast(
            spatial, temporal, module.gathered(), num_heads=case.heads, windows=case.windows,
            spatial_scale=scales[0], temporal_scale=scales[1],
        )  # fmt: skip
    grads = case.output_grads(dtype)
    torch.autograd.backward(outputs, [layout.of(x) for x in grads] if layout else grads)
    values = {"spatial_out": outputs[0], "temporal_out": outputs[1], "spatial": spatial.grad, "temporal": temporal.grad}
    values |= {name: p.grad for name, p in module.named_parameters()}
    return {name: x.detach().double() for name, x in values.items() if x is not None}


@settings(
    max_examples=EXAMPLES,
    derandomize="CAST_KERNELS_FUZZ" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(case=cases(), spatial=layouts(4), temporal=layouts(4), grads=layouts(4), data=st.data())
def test_any_problem_in_any_layout_agrees_with_fp64(
    case: Case, spatial: Layout, temporal: Layout, grads: Layout, data: st.DataObject
) -> None:
    names = len(list(case.module().parameters()))
    trained = set(range(names)) - set(data.draw(st.lists(st.integers(0, names - 1), max_size=5), label="frozen"))
    inputs = case.inputs()
    placed = (spatial.of(inputs[0]), temporal.of(inputs[1]))
    ours = results(case, placed, torch.float32, grads, trained)
    exact = results(case, tuple(x.double() for x in inputs), torch.float64, None, trained)
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        # Float32 over sums of up to a few thousand terms whose result may be smaller than the terms by cancellation.
        # A wrong formula is off by the tensor's own size; ours over eager's error is judged in test_bcast.py.
        size = float(truth.abs().max())
        error = float((ours[name] - truth).abs().max())
        assert error <= 2e-5 * max(size, 0.1), f"{name} is off by {error:.1e}, its size is {size:.1e}"
