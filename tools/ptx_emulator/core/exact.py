"""Sums and fused products of floats that are rounded once, whatever the distance of their exponents."""

from fractions import Fraction

import numpy as np

from ptx_emulator.core.spaces import Array

_SPLIT = float((1 << 27) + 1)  # Veltkamp: cuts a float64 into halves of at most 26 bits
_LEAST, _MOST = 2.0**-480, 2.0**480  # between these no step of `fma_f64` leaves the range of float64


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """(float64 sum, what its rounding has cut off). Source: Knuth, The Art of Computer Programming, 4.2.2."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def sum_to_odd(a: Array, b: Array) -> Array:
    """a + b of float64 rounded to odd: to any narrower type a further rounding is then the only one.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".
    """
    total, cut = two_sum(np.asarray(a, np.float64), np.asarray(b, np.float64))
    inexact = (cut != 0) & np.isfinite(total)
    if not inexact.any():
        return total
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    return np.where(inexact & even, np.nextafter(total, np.where(cut > 0, np.inf, -np.inf)), total)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """a*b + c of float32, rounded once.

    The product is exact in float64. Only a sum that float64 has rounded onto the midpoint of two float32 numbers would
    be rounded twice; those few are rounded to odd first.
    """
    product = a.astype(np.float64) * b
    total = product + c
    middle = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if middle.any():
        total = np.where(middle, sum_to_odd(product, np.broadcast_to(c, total.shape).astype(np.float64)), total)
    return total.astype(np.float32)


def _halves(a: Array) -> tuple[Array, Array]:
    scaled = a * _SPLIT
    high = scaled - (scaled - a)
    return high, a - high


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """a*b + c of float64, rounded once: by sums of float64, and by fractions where these could leave the range."""
    a, b, c = np.broadcast_arrays(a, b, c)
    plain = a * b + c
    product = a * b
    (a1, a0), (b1, b0) = _halves(a), _halves(b)
    rest = ((a1 * b1 - product) + a1 * b0 + a0 * b1) + a0 * b0
    inner, lost = two_sum(c, rest)
    total, cut = two_sum(product, inner)
    once = total + sum_to_odd(lost, cut)
    factors = np.isfinite(a) & np.isfinite(b)
    plain = np.where(factors & np.isinf(c), c, plain)
    trivial = ~(factors & np.isfinite(c)) | (a == 0) | (b == 0)  # a sum, or no number
    wide = np.zeros(a.shape, bool)
    for size in (np.abs(a), np.abs(b), np.abs(product), np.abs(total)):
        wide |= (size < _LEAST) | (size > _MOST)
    wide |= np.abs(c) > _MOST
    wide &= ~trivial
    result = np.where(trivial, plain, once)
    for place in np.argwhere(wide):
        at = tuple(place)
        result[at] = _by_fractions(float(a[at]), float(b[at]), float(c[at]), float(plain[at]))
    return result


def _by_fractions(a: float, b: float, c: float, plain: float) -> float:
    """a*b + c of numbers. plain: of floats, which has the sign of a zero."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact) if exact else plain
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")
