"""One expert's half block as `cast-kernels compile` launches it: LayerNorm, activation and adapter are our kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import cast_kernels


@dataclass(frozen=True)
class ExpertCase:
    """Sizes and structure of one `ffn` call. The defaults are ViT-B/16's with the paper's adapter."""

    rows: int = 197
    dim: int = 768
    hidden: int = 3072
    adapter: int = 192
    activation: str = "gelu"  # CLIP's expert has "quick_gelu"
    scaled: bool = False  # whether the adapter's branch has drop-path factors
    recompute: str = "cheap"

    def __str__(self) -> str:
        sizes = f"FFN {self.rows} rows D{self.dim} F{self.hidden} A{self.adapter} {self.activation}"
        return f"{sizes}{', drop-path' if self.scaled else ''}, forward, backward, recompute {self.recompute}"


def run_expert(case: ExpertCase, dtype: torch.dtype) -> None:
    """Forward and backward on backend `triton`, parameters and stream in this dtype, for what it launches.

    `self_attention` and `adapter` launch the same two adapter kernels with the same things compiled in.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    d, f, a = case.dim, case.hidden, case.adapter
    parameters = cast_kernels.FFNParameters(
        random(d), random(d), random(f, d), random(f), random(d, f), random(d),
        random(a, d), random(a), random(d, a), random(d),
    )  # fmt: skip
    y = cast_kernels.ffn(
        random(case.rows, d), parameters, activation=case.activation, eps=1e-5, recompute=case.recompute,
        row_scale=torch.ones(case.rows) if case.scaled else None, backend="triton",
    )  # fmt: skip
    y.backward(torch.zeros_like(y))
