"""Bit patterns of bf16, f16 and tf32 as float32 arrays and back, with the roundings PTX names."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator.core.spaces import Array

CANONICAL_NAN: dict[int, Any] = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF)}


def canonical(value: Array) -> Array:
    """The bits of float32 results as a GPU's arithmetic leaves them: every NaN is 0x7FFFFFFF.

    Source: CUDA C++ Programming Guide, "Floating-Point Standard". NumPy keeps sign and payload of one of the operands,
    of which one depends on their order. So two warps that add up the same numbers would differ.
    """
    bits = value.view(np.uint32)
    if not np.isnan(np.vdot(value, value)):  # squares add up to NaN only if one is NaN; this is the fastest look
        return bits
    return np.where(value != value, CANONICAL_NAN[4], bits)


def bf16_to_f32(bits: Array) -> Array:
    """Exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_to_f32(bits: Array) -> Array:
    """Exact."""
    return bits.view(np.float16).astype(np.float32)


def f32_to_bf16(value: Array, rounding: str = "rn") -> Array:
    """Round to nearest even ("rn") or towards zero ("rz"); NaN becomes 0x7FFF."""
    bits = value.view(np.uint32)
    if rounding == "rn":
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    else:
        rounded = bits >> np.uint32(16)
    rounded = rounded.astype(np.uint16)
    nan = value != value
    return np.where(nan, CANONICAL_NAN[2], rounded) if nan.any() else rounded


def f32_to_f16(value: Array, rounding: str = "rn") -> Array:
    """Round to nearest even ("rn") or towards zero ("rz"); NaN becomes 0x7FFF."""
    half = value.astype(np.float16)
    bits = half.view(np.uint16)
    if rounding == "rz":
        away = np.abs(half.astype(np.float32)) > np.abs(value)
        away &= np.isfinite(value)
        bits = np.where(away, bits - np.uint16(1), bits)
    nan = value != value
    return np.where(nan, CANONICAL_NAN[2], bits) if nan.any() else bits


def f32_to_tf32(value: Array, rounding: str = "rna", finite: bool = False) -> Array:
    """float32 bits with 10 mantissa bits: to nearest, ties away ("rna") or to even ("rn"), or towards zero ("rz").
    finite: what is beyond the largest number becomes that number."""
    bits = value.view(np.uint32)
    if rounding == "rna":
        rounded = bits + np.uint32(0x1000)
    elif rounding == "rn":
        rounded = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    else:
        rounded = bits
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    rounded = np.where(special, bits, rounded & np.uint32(0xFFFFE000))
    if finite:
        sign = rounded & np.uint32(0x80000000)
        rounded = sign | np.minimum(rounded ^ sign, np.uint32(0x7F7FE000))
    return np.where(value != value, CANONICAL_NAN[4], rounded)


def sticky(value: Array) -> Array:
    """Any number as float32 cut towards zero with its last bit set where something was cut, so that a further rounding
    to 16 bits is the only one."""
    exact = (
        value.astype(np.float64) if value.dtype.itemsize < 8 or value.dtype.kind == "f" else value.astype(np.longdouble)
    )
    near = exact.astype(np.float32)
    bits = near.view(np.uint32)
    cut = np.where(np.abs(near) > np.abs(exact), bits - np.uint32(1), bits)
    return np.where((near != exact) & np.isfinite(near), cut | np.uint32(1), bits).view(np.float32)


TO_F32: dict[str, Callable[[Array], Array]] = {"bf16": bf16_to_f32, "f16": f16_to_f32}
FROM_F32: dict[str, Callable[..., Array]] = {"bf16": f32_to_bf16, "f16": f32_to_f16}
