"""Problems for the tests of self-attention; the measure of correctness is that of `bcast_cases`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import cast_kernels
from cast_kernels import SelfAttentionParameters


@dataclass(frozen=True)
class Case:
    """Sizes and structure of one self-attention; the defaults are small and odd: no size divides another."""

    batch: int = 3
    tokens: int = 19
    dim: int = 40
    heads: int = 5
    adapter: int = 27
    qkv_bias: bool = True
    seed: int = field(default=0, compare=False)

    def __str__(self) -> str:
        bias = "" if self.qkv_bias else "-nobias"
        return f"{self.batch}x{self.tokens}-D{self.dim}h{self.heads}A{self.adapter}{bias}"

    def parameters(self, dtype: torch.dtype = torch.float32) -> SelfAttentionParameters:
        """Every parameter random: nothing is zero, no LayerNorm weight is one. The same numbers in every dtype."""
        dim, adapter = self.dim, self.adapter
        shapes: dict[str, tuple[int, ...]] = {"norm_weight": (dim,), "norm_bias": (dim,), "qkv_weight": (3 * dim, dim)}
        shapes |= {"qkv_bias": (3 * dim,)} if self.qkv_bias else {}
        shapes |= {"proj_weight": (dim, dim), "proj_bias": (dim,)}
        if adapter:
            shapes |= {"down_weight": (adapter, dim), "down_bias": (adapter,)}
            shapes |= {"up_weight": (dim, adapter), "up_bias": (dim,)}
        generator = torch.Generator().manual_seed(1000 + self.seed)
        tensors: dict[str, Tensor | None] = {"qkv_bias": None}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator) * (shape[1] if len(shape) == 2 else 4) ** -0.5
            tensors[name] = (noise + (1.0 if name == "norm_weight" else 0.0)).to(torch.bfloat16).to(dtype)
        return SelfAttentionParameters(**tensors)  # type: ignore[arg-type]

    def x(self, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return self._noise(self.seed, dtype).requires_grad_(grad)

    def grad_y(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._noise(3000 + self.seed, dtype)

    def _noise(self, seed: int, dtype: torch.dtype) -> Tensor:
        noise = torch.randn(self.batch, self.tokens, self.dim, generator=torch.Generator().manual_seed(seed))
        return noise.to(torch.bfloat16).to(dtype)

    def problem(self, recompute: str = "cheap") -> cast_kernels.SelfAttentionProblem:
        return cast_kernels.ops.self_attention.pose(self.x(), self.parameters(), self.heads, recompute)


#: Tokens around tiles, blocks of keys (128) and query groups (192); head widths 8, 5, 64, 13, one; entries in one group
#: and in several (1600 rows); more than one chain of products (256).
CASES = [
    Case(seed=1),
    Case(qkv_bias=False, seed=2),
    Case(adapter=0, seed=3),
    Case(batch=5, tokens=1, dim=30, heads=6, adapter=16, seed=4),
    Case(batch=4, tokens=2, dim=35, heads=7, adapter=0, qkv_bias=False, seed=5),
    Case(batch=2, tokens=197, dim=128, heads=2, adapter=32, seed=6),
    Case(batch=1, tokens=300, dim=64, heads=1, adapter=48, seed=7),
    Case(batch=2, tokens=129, dim=39, heads=3, adapter=33, seed=8),
    Case(batch=9, tokens=197, dim=48, heads=6, adapter=20, seed=9),
    Case(batch=60, tokens=30, dim=32, heads=2, adapter=24, seed=10),
    Case(batch=1, tokens=20, dim=400, heads=4, adapter=390, seed=11),
    Case(batch=1, tokens=611, dim=80, heads=1, adapter=16, seed=12),
]
PAPER = Case(batch=1, tokens=1568, dim=768, heads=12, adapter=192, seed=30)


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
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        if backend is None:
            y = cast_kernels.reference.self_attention(x, parameters, num_heads=case.heads, eps=1e-5)
        else:
            y = cast_kernels.self_attention(
                x, parameters, num_heads=case.heads, eps=1e-5, recompute=recompute, backend=backend
            )
    y.backward(case.grad_y(y.dtype))
    result = {"y": y} | {f"grad.{name}": t.grad for name, t in inputs.items() if t.grad is not None}
    return {name: t.detach().double() for name, t in result.items()}
