"""A mark that torch.compile reads, set without importing torch.compile.

PyTorch's own decorator imports the compiler, which takes longer than all of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`: a compiler calls the function once, and keeps its result."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
