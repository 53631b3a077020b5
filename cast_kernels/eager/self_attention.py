"""Self-attention with its serial adapter in PyTorch operators: what CAST's blocks ran before there was a kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cast_kernels import attention
from cast_kernels.problem import SelfAttentionParameters, SelfAttentionProblem, Verdict


def can_run(problem: SelfAttentionProblem) -> Verdict:
    """Eager PyTorch runs every problem that passes the op's own checks, if what is to attend can."""
    asked = attention.requested(problem)
    return Verdict(True, "PyTorch operators run every shape, dtype and device") if asked.ok else asked


def self_attention(problem: SelfAttentionProblem, x: Tensor, p: SelfAttentionParameters, eps: float) -> Tensor:
    """x [batch, tokens, D] -> the same; scores are never stored. What is kept for backward is autograd's choice."""
    normed = F.layer_norm(x, p.norm_weight.shape, p.norm_weight, p.norm_bias, eps)
    qkv = F.linear(normed, p.qkv_weight, p.qkv_bias)
    heads = qkv.unflatten(-1, (3, problem.num_heads, problem.head_dim))
    mixed = attention.attend(attention.select(problem), heads).flatten(2)
    a = F.linear(mixed, p.proj_weight, p.proj_bias)
    y = x + a
    if p.down_weight is not None and p.up_weight is not None:
        y = y + F.linear(F.gelu(F.linear(a, p.down_weight, p.down_bias)), p.up_weight, p.up_bias)
    # Under autocast the branches have its dtype; the residual keeps the stream's.
    return y.to(x.dtype)
