"""Products of float32 matrices as chains of fused multiply-adds in the order of k, on every machine.

The operands of `mma` and `wgmma` are bf16, f16 or tf32 numbers, of which two have a product that float32 holds exactly,
unless it is tiny or huge; then a product and a sum are one fused multiply-add. NumPy's BLAS is faster, and some of its
kernels add in this order, others do not: OpenBLAS 0.3.31's for AVX-512 do, those for AVX2 do not. So each kind of
operands is tried once, and where the last bits come out otherwise a loop over k adds.
"""

import numpy as np

from ptx_emulator.core.spaces import Array

BLOCK = 1 << 15  #: float32 sums that a loop works on at a time: a few copies of them stay in a core's cache
SAFE = (63, 189)  #: biased exponents: two numbers of 11 bits in between have a product that float32 holds
TRIALS = 8  #: products that BLAS is tried with
_fused: dict[tuple[object, ...], bool] = {}  # kind of operands -> whether BLAS is such a chain for them


def products_in_order(left: Array, right: Array) -> Array:
    """left[n, i, k] right[n, j, k] -> [n, i, j], each a chain of fused multiply-adds from zero, k ascending.

    Args:
        left, right: float32, each number one that bf16, f16 or tf32 can hold.
    """
    kind = (*left.shape[1:], right.shape[1], left.strides[1:], right.strides[1:])
    if kind not in _fused:
        _fused[kind] = _blas_is_fused(left, right)
    if _fused[kind]:
        return np.matmul(left, right.transpose(0, 2, 1))
    return chained(left, right)


def chained(left: Array, right: Array) -> Array:
    """The same by a loop over k."""
    (count, rows, depth), columns = left.shape, right.shape[1]
    out = np.empty((count, rows, columns), np.float32)
    add = _add if _is_safe(left) and _is_safe(right) else _add_widely
    several = max(1, BLOCK // (rows * columns))
    for first in range(0, count, several):
        part = slice(first, first + several)
        total = np.zeros((min(several, count - first), rows, columns), np.float32)
        one, other = left[part].transpose(2, 0, 1), right[part].transpose(2, 0, 1)
        room = np.empty_like(total)
        for k in range(depth):
            add(total, one[k, :, :, None], other[k, :, None, :], room)
        out[part] = total
    return out


def _is_safe(numbers: Array) -> bool:
    """Whether every number is zero or of an exponent in between."""
    exponents = numbers.view(np.uint32) >> np.uint32(23) & np.uint32(255)
    low, high = SAFE
    return bool((((exponents >= low) & (exponents <= high)) | (numbers == 0)).all())


def _add(total: Array, one: Array, other: Array, room: Array) -> None:
    """Products that float32 holds."""
    np.add(total, np.multiply(one, other, out=room), out=total)


def _add_widely(total: Array, one: Array, other: Array, room: Array) -> None:
    """Any products: float64 holds them, and their sum with a float32 so far that rounding it twice changes nothing."""
    total[:] = total + one.astype(np.float64) * other


def _blas_is_fused(left: Array, right: Array) -> bool:
    """Whether `np.matmul` gives the bits of the chain for operands of these shapes, that lie in memory as these do."""
    random = np.random.default_rng(0)
    for middle, spread in ((0, 12), (-75, 3)):  # of the second's products float32 holds a part of the bits
        trial = [np.empty_like(one, shape=(TRIALS, *one.shape[1:])) for one in (left, right)]  # the order of axes stays
        for one in trial:
            exponents = random.integers(middle - spread, middle + spread, one.shape)
            one[:] = np.ldexp(random.integers(-128, 128, one.shape), exponents)
        if not np.array_equal(np.matmul(trial[0], trial[1].transpose(0, 2, 1)), chained(*trial)):
            return False
    return True
