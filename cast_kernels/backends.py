"""Chooses the backend that runs a problem, and says why not the others. No other module decides this, for any op.

Selection reads only the problem, so a call runs as :func:`explain` prints it. The problem's type determines the op.

A backend is a folder with a module for each op, `cast_kernels/<backend>/<op>.py`, which is :class:`Backend`. It is
imported at its first use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from cast_kernels import _native
from cast_kernels.cuda.common import recorded
from cast_kernels.problem import (
    AdapterProblem,
    BackendError,
    FFNProblem,
    Problem,
    SelfAttentionProblem,
    Verdict,
)
from cast_kernels.triton.common import emulating

__all__ = ["BACKENDS", "AnyProblem", "Backend", "BackendError", "can_run", "check_name", "explain", "load", "select"]

#: The problem of any op.
AnyProblem = Problem | FFNProblem | SelfAttentionProblem | AdapterProblem

#: The problem's type -> the op's stem.
_OPS: dict[type, str] = {
    Problem: "bcast",
    FFNProblem: "ffn",
    SelfAttentionProblem: "self_attention",
    AdapterProblem: "adapter",
}


class Backend(Protocol):
    """A backend's functions for an op. A backend that composes PyTorch's operators has `can_run` and the op itself
    instead.

    `problem` is the op's.
    """

    def can_run(self, problem: Any) -> Verdict:
        """Whether it can run the problem here, and why or why not."""

    def saved_words(self, problem: Any, *recompute: str) -> int:
        """4-byte words that forward keeps of a unit: a clip (`bcast`), a row (`ffn`, `adapter`), or the call."""

    def forward(self, problem: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """The outputs, and one opaque tensor of 4-byte words that its own backward reads."""

    def backward(self, problem: Any, *arguments: Any) -> Sequence[Tensor | None]:
        """Gradients of the streams and each parameter in their dtypes, None where not wanted."""


# Import statements, because torch.compile can trace no other import.


def _triton() -> dict[str, Any]:
    from cast_kernels.triton import adapter, bcast, ffn, self_attention

    return {"bcast": bcast, "ffn": ffn, "self_attention": self_attention, "adapter": adapter}


def _cuda() -> dict[str, Any]:
    from cast_kernels.cuda import bcast

    return {"bcast": bcast}


def _cpu() -> dict[str, Any]:
    from cast_kernels.cpu import adapter, bcast, ffn, self_attention

    return {"bcast": bcast, "ffn": ffn, "self_attention": self_attention, "adapter": adapter}


def _eager() -> dict[str, Any]:
    from cast_kernels.eager import adapter, bcast, ffn, self_attention

    return {"bcast": bcast, "ffn": ffn, "self_attention": self_attention, "adapter": adapter}


#: Backends in order of preference, with functions that import their ops. "auto" takes the first that can run the
#: problem. Triton comes before CUDA C++ until both have been timed on a GPU.
_LOADERS: dict[str, Callable[[], dict[str, Any]]] = {
    "triton": _triton, "cuda": _cuda, "cpu": _cpu, "eager": _eager,
}  # fmt: skip
#: (backend, op that it has no kernels of) -> the backend whose kernels run in its place. `explain` says so.
_LEFT_TO: dict[tuple[str, str], str] = {("cuda", op): "triton" for op in ("ffn", "self_attention", "adapter")}
#: Their names, in order of preference.
BACKENDS: tuple[str, ...] = tuple(_LOADERS)


def load(backend: str, op: str) -> Backend:
    """The backend's module for the op, imported at its first use.

    Raises:
        ImportError: it does not import; a backend that lacks a package says so in `can_run` instead.
    """
    return _LOADERS[left_to(backend, op) or backend]()[op]


def left_to(backend: str, op: str) -> str | None:
    """The backend whose kernels of the op run where this one is asked for; None if its own do."""
    return _LEFT_TO.get((backend, op))


def circumstances() -> tuple[Any, ...]:
    """The state of this process on which verdicts depend besides the problem; tests and the emulator change it.

    Triton's interpreter is not part of it: it is chosen when the kernels are defined.
    """
    return _native.CORE, _native.ISA_ERROR, emulating(), recorded()


def check_name(backend: str) -> str:
    """Return the name, or raise ValueError naming the allowed ones."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: 'auto', {', '.join(map(repr, BACKENDS))}")
    return backend


def can_run(backend: str, problem: AnyProblem) -> Verdict:
    """Whether `backend` can run `problem`, and why or why not.

    Raises:
        ValueError: no such backend.
    """
    if check_name(backend) == "auto":
        raise ValueError(f"'auto' is a choice among backends, not one; ask for one of {', '.join(map(repr, BACKENDS))}")
    op = _OPS[type(problem)]
    verdict, other = load(backend, op).can_run(problem), left_to(backend, op)
    return verdict if other is None else Verdict(verdict.ok, f"{op} is left to {other}: {verdict.reason}")


def select(backend: str, problem: AnyProblem) -> str:
    """The name of the backend that runs `problem`.

    "auto" means the first of :data:`BACKENDS` that can. A named backend is taken or refused, never replaced. For an op
    that it leaves to another backend, the result is the other's name.

    Raises:
        ValueError: no such backend.
        BackendError: the named backend, or none where "auto" was asked, can run the problem; the message says why.
    """
    if check_name(backend) == "auto":
        chosen = _first(problem)
        if chosen is None:
            reasons = "; ".join(f"{name}: {can_run(name, problem).reason}" for name in BACKENDS)
            raise BackendError(f"no backend can run this problem: {reasons}")
        return chosen
    verdict = can_run(backend, problem)
    if not verdict.ok:
        other = _first(problem)
        advice = "Nor can any other backend" if other is None else f"Use backend='auto', which takes {other!r} here"
        raise BackendError(
            f"backend={backend!r} cannot run this problem: {verdict.reason}. {advice}; "
            "cast_kernels.explain(...) says of each whether and why."
        )
    return left_to(backend, _OPS[type(problem)]) or backend


def _first(problem: AnyProblem) -> str | None:
    """What "auto" means for the problem."""
    return next((name for name in BACKENDS if can_run(name, problem).ok), None)


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
