"""Problems for the tests of B-CAST, and the measure of correctness that all of them use."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import cast_kernels
from cast_kernels.evidence.cases import compare


@dataclass(frozen=True)
class Case:
    """Sizes and structure of one B-CAST; the defaults are small and awkward: no size divides another."""

    batch: int = 2
    frames: int = 3
    patches: int = 7
    dim: int = 40
    bottleneck: int = 24
    heads: int = 3
    windows: tuple[str, str] = ("time", "space")
    directions: tuple[str, ...] = ("t2s", "s2t")
    positions: bool = True
    scaled: bool = False
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        sizes = f"B{self.batch}T{self.frames}N{self.patches}D{self.dim}d{self.bottleneck}h{self.heads}"
        flags = ("" if self.positions else "-nopos") + ("-scaled" if self.scaled else "")
        return f"{sizes}-{'+'.join(self.windows)}-{'+'.join(self.directions)}{flags}"

    def module(self, dtype: torch.dtype = torch.float32, backend: str = "auto") -> cast_kernels.BCAST:
        """A module with every parameter random: nothing is zero, no LayerNorm weight is one."""
        module = cast_kernels.BCAST(
            self.dim, self.bottleneck, self.heads, self.frames, self.patches, self.windows, self.directions,
            self.positions, backend,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1000 + self.seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                fan_in = parameter.shape[-1] if parameter.ndim == 2 and not name.endswith("_pos") else 4
                parameter.copy_(noise * fan_in**-0.5 + (1.0 if "ln_" in name and "weight" in name else 0.0))
        return module.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.frames, self.patches, self.dim)
        spatial = torch.randn(shape[0], shape[1], shape[2] + 1, shape[3], generator=generator).to(dtype)
        temporal = torch.randn(shape, generator=generator).to(dtype)
        return spatial.requires_grad_(grad), temporal.requires_grad_(grad)

    def scales(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, Tensor | None]:
        """Drop-path factors with zeros among them: per token position on one stream, per clip on the other."""
        if not self.scaled:
            return None, None
        generator = torch.Generator().manual_seed(2000 + self.seed)
        tokens = torch.bernoulli(torch.full((self.batch, 1 + self.patches), 0.7), generator=generator) / 0.7
        clips = torch.bernoulli(torch.full((self.batch,), 0.7), generator=generator) / 0.7
        return tokens.to(dtype), clips.to(dtype)


WINDOWS = [(a, b) for a in cast_kernels.WINDOWS for b in cast_kernels.WINDOWS]
CASES = [
    *(Case(windows=windows, seed=i) for i, windows in enumerate(WINDOWS)),
    Case(directions=("t2s",), windows=("time", "space"), seed=20),
    Case(directions=("s2t",), windows=("time", "space"), seed=21),
    Case(directions=("t2s",), windows=("space-time", "time"), scaled=True, seed=22),
    Case(positions=False, seed=23),
    Case(scaled=True, seed=24),
    Case(windows=("space-time", "space"), positions=False, scaled=True, seed=25),
    Case(batch=1, frames=8, patches=49, dim=96, bottleneck=48, heads=4, seed=26),
    Case(batch=3, frames=5, patches=1, dim=16, bottleneck=16, heads=16, seed=27),
    Case(batch=1, frames=1, patches=19, dim=33, bottleneck=35, heads=5, seed=28),
    Case(batch=1, frames=8, patches=196, dim=64, bottleneck=64, heads=2, seed=29),
]
PAPER = Case(batch=1, frames=8, patches=196, dim=768, bottleneck=384, heads=12, seed=30)


def run(case: Case, dtype: torch.dtype, backend: str | None, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and every gradient of one call in `dtype`, in float64. `backend=None` is the reference."""
    module = case.module(torch.float32, backend or "auto").to(dtype)
    # Inputs are drawn in float32 whatever the dtype, so that all dtypes see the same numbers.
    spatial, temporal = (x.to(dtype).requires_grad_() for x in case.inputs())
    scales = case.scales(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        if backend is None:
            outputs = cast_kernels.reference.bcast(
                spatial, temporal, module.gathered(), num_heads=case.heads, windows=case.windows,
                spatial_scale=scales[0], temporal_scale=scales[1],
            )  # fmt: skip
        else:
            outputs = module(spatial, temporal, *scales)
    generator = torch.Generator().manual_seed(3000 + case.seed)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    torch.autograd.backward(outputs, grads)
    result = {"spatial_out": outputs[0], "temporal_out": outputs[1], "grad.spatial": spatial.grad}
    result |= {"grad.temporal": temporal.grad} | {f"grad.{n}": p.grad for n, p in module.named_parameters()}
    return {name: x.detach().double() for name, x in result.items() if x is not None}


def assert_at_most_twice_eager(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every tensor's error against fp64 is at most twice eager's in the same dtype.

    The error is the root mean square over the tensor: the largest single error of a 24-element gradient differs
    by more than a factor of two between two equally good summation orders (seen between two eager formulations).
    A single wrong element cannot hide: the largest error may be at most four times eager's. Below half a unit in
    the last place of the tensor's own size no arithmetic can be asked for more, so that is the floor.
    """
    errors = compare(ours, eager, exact)
    rows = [
        f"{'ok  ' if e.ok else 'FAIL'} {e.name:<32} rms {e.rms:.2e} (eager {e.eager_rms:.2e})  "
        f"max {e.worst:.2e} (eager {e.eager_worst:.2e})  floor {e.floor:.1e}"
        for e in errors
    ]
    assert all(e.ok for e in errors), "\n" + "\n".join(rows)
