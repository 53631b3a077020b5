"""The adapter and its residual in PyTorch operators: what CAST's blocks ran before there was a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cast_kernels.problem import AdapterParameters, AdapterProblem, Verdict


def can_run(problem: AdapterProblem) -> Verdict:
    """Eager PyTorch runs every problem that passes the op's own checks."""
    return Verdict(True, "PyTorch operators run every shape, dtype and device")


def adapter(
    problem: AdapterProblem, x: Tensor, residual: Tensor, p: AdapterParameters, row_scale: Tensor | None, scale: float
) -> Tensor:
    """x and residual [..., D] -> the same; `row_scale` is [...] or None. What is kept is autograd's choice."""
    branch = F.linear(F.gelu(F.linear(x, p.down_weight, p.down_bias)), p.up_weight, p.up_bias)
    if row_scale is not None:
        branch = branch * row_scale[..., None].to(branch.dtype)
    y = torch.add(residual + x if problem.skip else residual, branch, alpha=scale)
    # Under autocast the branch has its dtype; the residual keeps the stream's.
    return y.to(residual.dtype)
