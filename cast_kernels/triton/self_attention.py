"""Backend `triton`: self-attention on a GPU from PyTorch's operators; adapter, skip and residual as one kernel.

LayerNorm, both projections (cuBLAS) and attention (`cast_kernels.attention`: flash kernels) stay PyTorch's, and so does
their autograd, which does no work for what is frozen. The adapter's kernel takes what eager runs as five operators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from cast_kernels import attention
from cast_kernels.problem import AdapterParameters, SelfAttentionParameters, SelfAttentionProblem, Verdict
from cast_kernels.triton import adapter
from cast_kernels.triton.common import verdict


def can_run(problem: SelfAttentionProblem) -> Verdict:
    """Whether Triton can run the problem here, and the reason in words either way."""
    if not problem.adapter:
        return Verdict(False, "there is no adapter, and attention alone is PyTorch's operators in any backend")
    refused = adapter.sizes_verdict(problem.dim, problem.adapter)
    if refused:
        return refused
    asked = attention.requested(problem)
    return verdict(problem.device, problem.dtype, problem.compute) if asked.ok else asked


def self_attention(
    problem: SelfAttentionProblem,
    x: Tensor,
    p: SelfAttentionParameters,
    eps: float,
    run_adapter: Callable[[Tensor, AdapterParameters, Tensor], Tensor],
) -> Tensor:
    """x [batch, tokens, D] -> the same.

    Args:
        problem: the sizes.
        x: the stream, any strides.
        p: with an adapter.
        eps: LayerNorm epsilon.
        run_adapter: (a, parameters, x) -> x + a + Adapter(a): the op, which autograd sees.
    """
    qkv = F.linear(F.layer_norm(x, p.norm_weight.shape, p.norm_weight, p.norm_bias, eps), p.qkv_weight, p.qkv_bias)
    heads = qkv.unflatten(-1, (3, problem.num_heads, problem.head_dim))
    mixed = attention.attend(attention.select(problem), heads).flatten(2)
    a = F.linear(mixed, p.proj_weight, p.proj_bias)
    return run_adapter(a, AdapterParameters(*p[6:]), x)  # type: ignore[arg-type]
