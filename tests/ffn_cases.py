"""Problems for the tests of the FFN; the measure of correctness is that of `bcast_cases`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import cast_kernels
from cast_kernels import FFNParameters


@dataclass(frozen=True)
class Case:
    """Sizes and structure of one FFN; the defaults are small and odd: no size divides another."""

    lead: tuple[int, ...] = (7,)
    dim: int = 33
    hidden: int = 35
    adapter: int = 5
    activation: str = "gelu"
    scaled: bool = False
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead))
        return f"{lead}-D{self.dim}F{self.hidden}A{self.adapter}-{self.activation}{'-scaled' if self.scaled else ''}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        dim, hidden, adapter = self.dim, self.hidden, self.adapter
        shapes: dict[str, tuple[int, ...]] = {"norm_weight": (dim,), "norm_bias": (dim,), "fc1_weight": (hidden, dim)}
        shapes |= {"fc1_bias": (hidden,), "fc2_weight": (dim, hidden), "fc2_bias": (dim,)}
        if adapter:
            shapes |= {"down_weight": (adapter, dim), "down_bias": (adapter,)}
            shapes |= {"up_weight": (dim, adapter), "up_bias": (dim,)}
        return shapes

    def parameters(self, dtype: torch.dtype = torch.float32, grad: bool = False) -> FFNParameters:
        """Every parameter random: nothing is zero, no LayerNorm weight is one. The same numbers in every dtype."""
        generator = torch.Generator().manual_seed(1000 + self.seed)
        tensors: dict[str, Tensor] = {}
        for name, shape in self.shapes().items():
            noise = torch.randn(shape, generator=generator) * (shape[1] if len(shape) == 2 else 4) ** -0.5
            value = (noise + (1.0 if name == "norm_weight" else 0.0)).to(torch.bfloat16).to(dtype)
            tensors[name] = value.requires_grad_(grad)
        return FFNParameters(**tensors)

    def x(self, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(*self.lead, self.dim, generator=generator)
        return x.to(torch.bfloat16).to(dtype).requires_grad_(grad)

    def row_scale(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """A drop-path factor a row, zeros among them."""
        if not self.scaled:
            return None
        generator = torch.Generator().manual_seed(2000 + self.seed)
        return (torch.bernoulli(torch.full(self.lead, 0.7), generator=generator) / 0.7).to(torch.bfloat16).to(dtype)

    def grad_y(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(3000 + self.seed)
        return torch.randn(*self.lead, self.dim, generator=generator).to(torch.bfloat16).to(dtype)


CASES = [
    *(
        Case(lead=(rows,), activation=activation, scaled=rows % 2 == 1, seed=10 * rows + i)
        for i, activation in enumerate(cast_kernels.ACTIVATIONS)
        for rows in (1, 7, 97)
    ),
    Case(lead=(2, 3, 5), adapter=0, seed=1),
    Case(lead=(4, 13), adapter=0, activation="quick_gelu", seed=2),
    Case(lead=(3, 50), dim=64, hidden=800, adapter=400, scaled=True, seed=3),  # chunks that are not whole vectors
    Case(lead=(130,), dim=800, hidden=70, adapter=33, activation="quick_gelu", scaled=True, seed=4),  # two depth chains
    Case(lead=(2, 1001), dim=24, hidden=40, adapter=12, scaled=True, seed=5),  # two groups of rows in backward
    Case(lead=(2, 98), dim=192, hidden=768, adapter=48, activation="quick_gelu", seed=7),
]
PAPER = Case(lead=(8, 196), dim=768, hidden=3072, adapter=192, scaled=True, seed=30)


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
    x, parameters = case.x(dtype), case.parameters(dtype)
    inputs = {"x": x} | {name: p for name, p in parameters._asdict().items() if p is not None}
    for name, tensor in inputs.items():
        tensor.requires_grad_(wanted is None or name in wanted)
    scale = case.row_scale(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        if backend is None:
            y = cast_kernels.reference.ffn(x, parameters, activation=case.activation, eps=1e-5, row_scale=scale)
        else:
            y = cast_kernels.ffn(
                x, parameters, activation=case.activation, eps=1e-5, row_scale=scale, recompute=recompute,
                backend=backend,
            )  # fmt: skip
    y.backward(case.grad_y(y.dtype))
    result = {"y": y} | {f"grad.{name}": t.grad for name, t in inputs.items() if t.grad is not None}
    return {name: t.detach().double() for name, t in result.items()}
