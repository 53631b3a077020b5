"""Backend `cpu` has no kernel of the adapter alone."""

from __future__ import annotations

from cast_kernels.problem import AdapterProblem, Verdict


def can_run(problem: AdapterProblem) -> Verdict:
    """Never: the native core's FFN and self-attention contain the adapter."""
    return Verdict(False, "the native core has no kernel of the adapter alone: its ffn and self_attention contain it")
