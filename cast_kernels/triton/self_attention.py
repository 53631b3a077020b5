"""Backend `triton`: self-attention on a GPU, around PyTorch's attention.

    norm -> queries, keys, values -> attention -> output projection -> adapter with skip and residual

Both projections are cuBLAS, attention is `cast_kernels.attention` (flash kernels) under its own autograd. What lies
between them is bound by memory, and that is what our kernels cut: docs/ops/self_attention.md counts the bytes.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from cast_kernels import attention
from cast_kernels.problem import (
    AdapterParameters,
    ProjectionParameters,
    SelfAttentionParameters,
    SelfAttentionProblem,
    Verdict,
)
from cast_kernels.triton import adapter
from cast_kernels.triton.common import WIDEST_STREAM, verdict

#: Parameters that the products read in the compute dtype; the adapter has its own.
CAST = ("qkv_weight", "qkv_bias", "proj_weight", "proj_bias")


def can_run(problem: SelfAttentionProblem) -> Verdict:
    """Whether Triton can run the problem here, and the reason in words either way."""
    if not problem.adapter:
        return Verdict(False, "there is no adapter, and attention alone is PyTorch's operators in any backend")
    if problem.dim > WIDEST_STREAM:
        return Verdict(False, f"the stream has {problem.dim} channels; up to {WIDEST_STREAM} are possible")
    refused = adapter.sizes_verdict(problem.dim, problem.adapter)
    if refused:
        return refused
    asked = attention.requested(problem)
    return verdict(problem.device, problem.gpu, problem.dtype, problem.compute) if asked.ok else asked


class Parts(Protocol):
    """The ops that autograd sees on both sides of attention."""

    def project(self, x: Tensor, p: ProjectionParameters, packed: bool) -> tuple[list[Tensor], Tensor]:
        """(queries, keys, values, or all in one tensor), and x for its other readers."""

    def adapt(self, a: Tensor, p: AdapterParameters, residual: Tensor) -> Tensor:
        """residual + a + Adapter(a)."""


def self_attention(problem: SelfAttentionProblem, x: Tensor, p: SelfAttentionParameters, parts: Parts) -> Tensor:
    """x [batch, tokens, D] -> the same.

    Args:
        problem: the sizes.
        x: the stream, any strides.
        p: with an adapter.
        parts: what runs before and after attention.
    """
    name = attention.select(problem)
    heads, x = parts.project(x, ProjectionParameters(*p[:4]), name in attention.PACKED)
    mixed = attention.attend(name, heads[0]) if len(heads) == 1 else attention.attend_apart(name, *heads)
    a = F.linear(mixed.flatten(2), p.proj_weight, p.proj_bias)
    return parts.adapt(a, AdapterParameters(*p[6:]), x)  # type: ignore[arg-type]
