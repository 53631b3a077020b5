"""`run.deterministic`: PyTorch's operators add up in one order, or say that they have none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Attention that may run where the order of additions counts. The packages' backward passes add as they finish.
ATTENTIONS = ("auto", "sdpa", "math")


class NondeterministicError(RuntimeError):
    """An operator has no deterministic way; the message names it."""


def ask_cublas() -> None:
    """Ask cuBLAS for workspaces that keep the order of additions; it reads this once, when it begins.

    What the user asked of it stays. PyTorch says so if that is not enough.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Inside, if `on`, operators run deterministically; afterwards PyTorch's switches are as they were.

    Of SDPA's kernels (PyTorch 2.14) flash and memory-efficient attention then have a backward pass with a fixed order,
    and cuDNN's is left out, whose order changes.

    Raises:
        NondeterministicError: an operator that cannot; PyTorch's message names it.
    """
    if not on:
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # which picks kernels by their time
    try:
        yield
    except RuntimeError as error:
        if "eterministic" not in str(error):
            raise
        raise NondeterministicError(
            f"run.deterministic=true was asked for, and PyTorch says: {error} run.deterministic=false trains without"
        ) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
