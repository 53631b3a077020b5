"""Problems for the tests of the adapter; the measure of correctness is that of `bcast_cases`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import cast_kernels
from cast_kernels import AdapterParameters


@dataclass(frozen=True)
class Case:
    """Sizes and structure of one adapter; the kernels take widths that are multiples of 16."""

    lead: tuple[int, ...] = (3, 15)
    dim: int = 48
    adapter: int = 16
    skip: bool = False
    scaled: bool = False
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead))
        return f"{lead}-D{self.dim}A{self.adapter}{'-skip' if self.skip else ''}{'-scaled' if self.scaled else ''}"

    def parameters(self, dtype: torch.dtype = torch.float32, grad: bool = False) -> AdapterParameters:
        """Every parameter random, nothing is zero. The same numbers in every dtype."""
        shapes = ((self.adapter, self.dim), (self.adapter,), (self.dim, self.adapter), (self.dim,))
        generator = torch.Generator().manual_seed(1000 + self.seed)
        noise = (torch.randn(s, generator=generator) * (s[1] if len(s) == 2 else 4) ** -0.5 for s in shapes)
        return AdapterParameters(*(n.to(torch.bfloat16).to(dtype).requires_grad_(grad) for n in noise))

    def stream(self, which: str, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        """`x`, `residual` or `grad_y`."""
        seed = self.seed + {"x": 0, "residual": 2000, "grad_y": 3000}[which]
        noise = torch.randn(*self.lead, self.dim, generator=torch.Generator().manual_seed(seed))
        return noise.to(torch.bfloat16).to(dtype).requires_grad_(grad)

    def row_scale(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """A drop-path factor a row, zeros among them."""
        if not self.scaled:
            return None
        generator = torch.Generator().manual_seed(4000 + self.seed)
        return (torch.bernoulli(torch.full(self.lead, 0.7), generator=generator) / 0.7).to(torch.bfloat16).to(dtype)


#: Rows around tiles of 16; chunks of the hidden row: one, three, five, three of 64, six; a stream that no step divides.
CASES = [
    Case(lead=(1,), skip=True, seed=1),
    Case(lead=(32,), adapter=48, scaled=True, seed=2),
    Case(lead=(3, 7), adapter=80, skip=True, scaled=True, seed=3),
    Case(lead=(17,), dim=48, adapter=192, seed=4),
    Case(lead=(5, 1, 2), dim=32, adapter=768, scaled=True, seed=5),
]


def run(
    case: Case,
    dtype: torch.dtype,
    backend: str | None,
    recompute: str = "cheap",
    autocast: torch.dtype | None = None,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """Output and gradients of one call in `dtype`, in float64. `backend=None` is the reference; `wanted` names the
    tensors that get a gradient, None means all."""
    parameters = case.parameters(dtype)
    inputs = {name: case.stream(name, dtype) for name in ("x", "residual")} | parameters._asdict()
    for name, tensor in inputs.items():
        tensor.requires_grad_(wanted is None or name in wanted)
    options = {"residual": inputs["residual"], "skip": case.skip, "scale": 0.5, "row_scale": case.row_scale(dtype)}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        if backend is None:
            y = cast_kernels.reference.adapter(inputs["x"], parameters, **options)  # type: ignore[arg-type]
        else:
            y = cast_kernels.adapter(inputs["x"], parameters, recompute=recompute, backend=backend, **options)  # type: ignore[arg-type]
    y.backward(case.stream("grad_y", y.dtype))
    result = {"y": y} | {f"grad.{name}": t.grad for name, t in inputs.items() if t.grad is not None}
    return {name: t.detach().double() for name, t in result.items()}
