"""Backend `cpu`: what the native core can run."""

from __future__ import annotations

from cast_kernels.problem import Problem, Verdict


def can_run(problem: Problem) -> Verdict:
    """Whether the native core can run the problem, and why not."""
    return Verdict(False, "the native core is not built")
