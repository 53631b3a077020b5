"""An expert's half block for `cast-kernels compile` and `gpu-check`: norm, activation and adapter are our kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cast_kernels
from cast_kernels.backends import AnyProblem
from cast_kernels.evidence.autocast import cuda_rules

_EPS = 1e-5


@dataclass(frozen=True)
class ExpertCase:
    """Sizes and structure of one call. The defaults are ViT-B/16's with the paper's adapter."""

    rows: int = 197
    dim: int = 768
    hidden: int = 3072  # of `ffn`
    adapter: int = 192
    activation: str = "gelu"  # of `ffn`; CLIP's expert has "quick_gelu"
    scaled: bool = False  # whether the adapter's branch has drop-path factors; `self_attention` has none
    recompute: str = "cheap"
    seed: int = 0
    op: str = "ffn"  # or "self_attention", "adapter"
    heads: int = 12  # of `self_attention`

    def __str__(self) -> str:
        what = {"ffn": "FFN", "self_attention": "self-attention", "adapter": "adapter"}[self.op]
        own = {"ffn": f" F{self.hidden}", "self_attention": f" h{self.heads}"}.get(self.op, "")
        sizes = f"{what} {self.rows} rows D{self.dim}{own} A{self.adapter}"
        parts = [f"{sizes} {self.activation}" if self.op == "ffn" else sizes]
        parts += ["drop-path"] if self.scaled and self.op != "self_attention" else []
        return ", ".join([*parts, f"forward, backward, recompute {self.recompute}"])


def expert_problem(case: ExpertCase, dtype: torch.dtype, device: torch.device) -> AnyProblem:
    """The problem in the form that backends take."""
    recompute = cast_kernels.Recompute(case.recompute)
    if case.op == "ffn":
        return cast_kernels.FFNProblem(
            case.rows, case.dim, case.hidden, case.adapter, case.activation, recompute, dtype, device.type
        )
    if case.op == "self_attention":
        return cast_kernels.SelfAttentionProblem(
            1, case.rows, case.dim, case.heads, case.adapter, recompute, dtype, device.type
        )
    return cast_kernels.AdapterProblem(case.rows, case.dim, case.adapter, False, recompute, dtype, device.type)


def run_expert(
    case: ExpertCase, dtype: torch.dtype, backend: str | None = "triton", exact: bool = False,
    device: str | torch.device = "cpu", autocast: torch.dtype | None = None, streams: torch.dtype | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The output and every gradient, in float64 on the CPU.

    Args:
        case: the problem.
        dtype: the stream and the parameters are rounded to it.
        backend: runs the problem; None is the reference.
        exact: compute in float64 on the rounded numbers.
        device: of the computation. Inputs are drawn on the CPU, so they are the same everywhere.
        autocast: dtype of the products under CUDA's autocast rules, or None for no autocast.
        streams: the stream is rounded to it, if given.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int, around: float = 0.0) -> Tensor:
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        return given(around + spread * torch.randn(shape, generator=generator)).requires_grad_()

    def given(drawn: Tensor, kind: torch.dtype = dtype) -> Tensor:
        rounded = drawn.to(device, kind)
        return rounded.double() if exact else rounded

    parameters = _parameters(case, random)
    stream = streams or dtype
    own = autocast or dtype if case.op == "adapter" else stream  # the adapter's input is the result of a product
    x = given(torch.randn(case.rows, case.dim, generator=generator), own).requires_grad_()
    kept = given(torch.bernoulli(torch.full((case.rows,), 0.7), generator=generator), stream)
    leaves = {"x": x, **parameters._asdict()}
    options: dict[str, Any] = {} if backend is None else {"backend": backend, "recompute": case.recompute}
    ops: Any = cast_kernels.reference if backend is None else cast_kernels
    with cuda_rules(None if exact else autocast, torch.device(device).type):
        if case.op == "self_attention":
            y = ops.self_attention(x.unsqueeze(0), parameters, num_heads=case.heads, eps=_EPS, **options).squeeze(0)
        else:
            options["row_scale"] = kept / 0.7 if case.scaled else None
            if case.op == "ffn":
                y = ops.ffn(x, parameters, activation=case.activation, eps=_EPS, **options)
            else:
                residual = given(torch.randn(case.rows, case.dim, generator=generator), stream).requires_grad_()
                leaves["residual"] = residual
                y = ops.adapter(x, parameters, residual=residual, **options)
    y.backward(given(torch.randn(y.shape, generator=generator), y.dtype if not exact else stream))
    result = {"y": y} | {f"grad.{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: tensor.detach().double().cpu() for name, tensor in result.items()}


def _parameters(case: ExpertCase, random: Any) -> Any:
    d, f, a = case.dim, case.hidden, case.adapter
    norm = {"norm_weight": random(d, around=1.0), "norm_bias": random(d)} if case.op != "adapter" else {}
    adapter = {"down_weight": random(a, d), "down_bias": random(a), "up_weight": random(d, a), "up_bias": random(d)}
    if case.op == "ffn":
        return cast_kernels.FFNParameters(
            **norm, fc1_weight=random(f, d), fc1_bias=random(f), fc2_weight=random(d, f), fc2_bias=random(d), **adapter
        )
    if case.op == "self_attention":
        return cast_kernels.SelfAttentionParameters(
            **norm, qkv_weight=random(3 * d, d), qkv_bias=random(3 * d), proj_weight=random(d, d), proj_bias=random(d),
            **adapter,
        )  # fmt: skip
    return cast_kernels.AdapterParameters(**adapter)
