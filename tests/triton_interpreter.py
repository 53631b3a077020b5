"""Correct arithmetic in bfloat16 for Triton's interpreter, which multiplies the bit patterns and truncates casts.

Corrected are what kernels need that widen right after the load and narrow once at the store: `tl.dot` with bfloat16
operands, and casts between bfloat16 and float32. Any other arithmetic on bfloat16 tensors stays wrong there.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

#: Parameters of the methods that are replaced; a release of Triton with others must be looked at first.
_EXPECTED = {
    "create_dot": ["self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"],
    "cast_impl": ["self", "src", "dst_type"],
}


def widen(words: np.ndarray) -> np.ndarray:
    """bfloat16 as 16-bit words -> the same values in float32."""
    return np.asarray(words.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16, ties to even, as 16-bit words."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(np.shape(values))
    nearest = np.asarray((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def correct_bf16() -> None:
    """Replace the two faulty methods; the originals stay reachable as their `uncorrected`.

    Raises:
        RuntimeError: TRITON_INTERPRET is not set, or this Triton has other methods.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    for name, parameters in _EXPECTED.items():
        method = getattr(InterpreterBuilder, name, None)
        found = list(inspect.signature(method).parameters) if method else None
        if found != parameters:
            raise RuntimeError(f"triton {triton.__version__} has InterpreterBuilder.{name}{found}; not {parameters}")
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        assert d.dtype.scalar == tl.float32, "a bfloat16 tl.dot accumulates in float32"
        a, b = (widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        return TensorHandle(np.matmul(a, b, dtype=np.float32) + d.data, tl.float32)

    cast_impl.uncorrected, create_dot.uncorrected = cast, dot  # type: ignore[attr-defined]
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
