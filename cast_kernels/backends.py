"""Which backend runs a problem, and why not the others: the one place that decides, for every op.

Selection never looks at anything but the problem, so what :func:`explain` prints is what happens. The problem's type
says which op is asked about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cast_kernels.cpu.bcast as cpu_bcast
import cast_kernels.cpu.ffn as cpu_ffn
import cast_kernels.cpu.self_attention as cpu_self_attention
import cast_kernels.eager.adapter as eager_adapter
import cast_kernels.eager.bcast as eager_bcast
import cast_kernels.eager.ffn as eager_ffn
import cast_kernels.eager.self_attention as eager_self_attention
import cast_kernels.triton.adapter as triton_adapter
import cast_kernels.triton.bcast as triton_bcast
import cast_kernels.triton.ffn as triton_ffn
import cast_kernels.triton.self_attention as triton_self_attention
from cast_kernels.problem import AdapterProblem, BackendError, FFNProblem, Problem, SelfAttentionProblem, Verdict

__all__ = ["BACKENDS", "AnyProblem", "BackendError", "can_run", "check_name", "explain", "select"]

#: Backends in order of preference; "auto" takes the first that can run the problem.
BACKENDS: tuple[str, ...] = ("triton", "cpu", "eager")

#: The problem of any op.
AnyProblem = Problem | FFNProblem | SelfAttentionProblem | AdapterProblem


def _inside_its_neighbours(problem: AdapterProblem) -> Verdict:
    return Verdict(False, "the native core has no kernel of the adapter alone: its ffn and self_attention contain it")


#: Type of the problem -> backend -> its `can_run`. Every op has every backend: one that cannot run it says so.
_CAN_RUN: dict[type, dict[str, Callable[[Any], Verdict]]] = {
    Problem: {"triton": triton_bcast.can_run, "cpu": cpu_bcast.can_run, "eager": eager_bcast.can_run},
    FFNProblem: {"triton": triton_ffn.can_run, "cpu": cpu_ffn.can_run, "eager": eager_ffn.can_run},
    SelfAttentionProblem: {
        "triton": triton_self_attention.can_run,
        "cpu": cpu_self_attention.can_run,
        "eager": eager_self_attention.can_run,
    },
    AdapterProblem: {
        "triton": triton_adapter.can_run,
        "cpu": _inside_its_neighbours,
        "eager": eager_adapter.can_run,
    },
}


def check_name(backend: str) -> str:
    """Return the name, or raise ValueError naming the allowed ones."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: 'auto', {', '.join(map(repr, BACKENDS))}")
    return backend


def can_run(backend: str, problem: AnyProblem) -> Verdict:
    """Whether `backend` can run `problem`, and the reason in words.

    Raises:
        ValueError: no such backend.
    """
    if check_name(backend) == "auto":
        raise ValueError(f"'auto' is a choice among backends, not one; ask for one of {', '.join(map(repr, BACKENDS))}")
    return _CAN_RUN[type(problem)][backend](problem)


def select(backend: str, problem: AnyProblem) -> str:
    """The name of the backend that runs `problem`.

    "auto" means the first of :data:`BACKENDS` that can. A named backend is taken or refused, never replaced.

    Raises:
        ValueError: no such backend.
        BackendError: the named backend, or none where "auto" was asked, can run the problem; the message says why.
    """
    if check_name(backend) == "auto":
        verdicts = {name: can_run(name, problem) for name in BACKENDS}
        chosen = next((name for name, verdict in verdicts.items() if verdict.ok), None)
        if chosen is None:
            reasons = "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items())
            raise BackendError(f"no backend can run this problem: {reasons}")
        return chosen
    verdict = can_run(backend, problem)
    if not verdict.ok:
        raise BackendError(
            f"backend={backend!r} cannot run this problem: {verdict.reason}. "
            "Use backend='auto' to take the fastest one that can, or cast_kernels.explain(...) to see all of them."
        )
    return backend


def explain(backend: str, problem: AnyProblem) -> str:
    """Every backend with yes or no and its reason, and which one `backend` selects, as text."""
    lines = [str(problem)]
    for name in BACKENDS:
        verdict = can_run(name, problem)
        lines.append(f"  {name:<6} {'yes' if verdict.ok else 'no '}  {verdict.reason}")
    try:
        lines.append(f"backend={backend!r} runs: {select(backend, problem)}")
    except BackendError as error:
        lines.append(str(error))
    return "\n".join(lines)
