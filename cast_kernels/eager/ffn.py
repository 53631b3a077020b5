"""The FFN beside its adapter in PyTorch operators: the formulation that CAST's blocks ran before there was a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cast_kernels.problem import FFNParameters, FFNProblem, Verdict


def can_run(problem: FFNProblem) -> Verdict:
    """Eager PyTorch runs every problem that passes the op's own checks."""
    return Verdict(True, "PyTorch operators run every shape, dtype and device")


def ffn(
    problem: FFNProblem, x: Tensor, p: FFNParameters, row_scale: Tensor | None, eps: float, adapter_scale: float
) -> Tensor:
    """x [..., D] -> the same; `row_scale` is [...] or None. What is kept for backward is autograd's choice."""
    normed = F.layer_norm(x, p.norm_weight.shape, p.norm_weight, p.norm_bias, eps)
    y = x + F.linear(
        _activate(F.linear(normed, p.fc1_weight, p.fc1_bias), problem.activation), p.fc2_weight, p.fc2_bias
    )
    if p.down_weight is not None and p.up_weight is not None:
        branch = F.linear(F.gelu(F.linear(normed, p.down_weight, p.down_bias)), p.up_weight, p.up_bias)
        if row_scale is not None:
            branch = branch * row_scale[..., None].to(branch.dtype)
        y = torch.add(y, branch, alpha=adapter_scale)
    # Under autocast the branches have its dtype; the residual keeps the stream's.
    return y.to(x.dtype)


def _activate(x: Tensor, activation: str) -> Tensor:
    # silu(1.702 x) / 1.702 is QuickGELU; it keeps one tensor for backward where the product keeps two.
    return F.gelu(x) if activation == "gelu" else F.silu(1.702 * x) / 1.702
