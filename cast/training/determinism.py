"""`run.deterministic`: PyTorch's operators add in a fixed order, or raise if they cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Attention kernels with a deterministic mode. The packages' backward passes add in the order in which parts finish.
ATTENTIONS = ("auto", "sdpa", "math")


class NondeterministicError(RuntimeError):
    """An operator has no deterministic version; the message names it."""


def ask_cublas() -> None:
    """Ask cuBLAS for workspaces that fix the order of additions. cuBLAS reads this once, when it starts.

    A value that the user set stays. PyTorch raises an error if that value is not enough.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """While active, if `on`, operators run deterministically. Afterwards PyTorch's switches have their old values.

    In PyTorch 2.14 this gives SDPA's flash and memory-efficient attention a backward pass with a fixed order, and
    excludes cuDNN's kernel, which has none.

    Raises:
        NondeterministicError: an operator without a deterministic version; PyTorch's message names it.
    """
    if not on:
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # the benchmark picks kernels by their time
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
