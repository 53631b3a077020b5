"""One expert's half block, for `cast-kernels compile` and `gpu-check`: norm, activation and adapter are our kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    seed: int = 0

    def __str__(self) -> str:
        sizes = f"FFN {self.rows} rows D{self.dim} F{self.hidden} A{self.adapter} {self.activation}"
        return f"{sizes}{', drop-path' if self.scaled else ''}, forward, backward, recompute {self.recompute}"


def run_expert(
    case: ExpertCase, dtype: torch.dtype, backend: str | None = "triton", exact: bool = False,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """The output and every gradient, in float64 on the CPU.

    `self_attention` and `adapter` launch the same two adapter kernels with the same things compiled in.

    Args:
        case: the problem.
        dtype: that the stream and the parameters are rounded to.
        backend: that must run it; None is the reference.
        exact: compute in float64 on the rounded numbers.
        device: where it runs. Inputs are drawn on the CPU, so they are the same everywhere.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int, around: float = 0.0) -> Tensor:
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        drawn = (around + spread * torch.randn(shape, generator=generator)).to(device, dtype)
        return (drawn.double() if exact else drawn).requires_grad_()

    d, f, a = case.dim, case.hidden, case.adapter
    parameters = cast_kernels.FFNParameters(
        random(d, around=1.0), random(d), random(f, d), random(f), random(d, f), random(d),
        random(a, d), random(a), random(d, a), random(d),
    )  # fmt: skip
    kind = torch.float64 if exact else dtype
    x = torch.randn(case.rows, d, generator=generator).to(device, dtype).to(kind).requires_grad_()
    kept = torch.bernoulli(torch.full((case.rows,), 0.7), generator=generator).to(device, dtype).to(kind)
    scale = kept / 0.7 if case.scaled else None
    if backend is None:
        y = cast_kernels.reference.ffn(x, parameters, activation=case.activation, eps=1e-5, row_scale=scale)
    else:
        y = cast_kernels.ffn(
            x, parameters, activation=case.activation, eps=1e-5, row_scale=scale, recompute=case.recompute,
            backend=backend,
        )  # fmt: skip
    y.backward(torch.randn(y.shape, generator=generator).to(device, dtype).to(kind))
    leaves = {"x": x, **parameters._asdict()}
    result = {"y": y} | {f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: tensor.detach().double().cpu() for name, tensor in result.items()}
