"""Backend `triton`: self-attention on a GPU, around PyTorch's attention.

    norm -> queries, keys, values -> attention -> output projection -> adapter with skip and residual

Both projections are cuBLAS, attention is `cast_kernels.attention` (flash kernels) under its own autograd. What lies
between them is bound by memory, and that is what our kernels cut: docs/ops/self_attention.md counts the bytes.
"""

from __future__ import annotations

from cast_kernels import attention
from cast_kernels.problem import SelfAttentionProblem, Verdict
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
