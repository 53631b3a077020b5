"""The interface that kernel backends' plans share: their knowledge of a call before it runs."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Plan(Protocol):
    """All of a call except its addresses, computed once for a problem, its dtypes and its device.

    Triton's plans (`triton/launch.py`) make their launches in Python. A backend with launches in C++ reports the same
    facts.
    """

    #: 4-byte words of the one allocation that is kept for backward; its layout is the backend's.
    saved_shape: tuple[int, ...]
    #: Bytes of it that are used.
    saved_bytes: int
    #: Bytes of the one allocation that lives as long as a call.
    scratch_bytes: int

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels in their order, one for each launch of the host."""
        ...
