"""Sums of products: one order of additions, and one rounding each, whatever BLAS NumPy has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from ptx_emulator.core import ordered

DEPTH = 16


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAS is tried anew."""
    monkeypatch.setattr(ordered, "_fused", {})


def operands(seed: int, low: int, high: int, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """left[count, 6, 16], right[count, 8, 16] of numbers of 11 bits with these exponents; every fifth is zero."""
    random = np.random.default_rng(seed)
    made = []
    for rows in (6, 8):
        shape = (count, rows, DEPTH)
        numbers = np.ldexp(random.integers(-2047, 2048, shape), random.integers(low, high, shape))
        made.append(np.where(random.random(shape) < 0.2, 0, numbers).astype(np.float32))
    return made[0], made[1]


def nearest(number: Fraction) -> Fraction:
    """The float32 that is nearest, the even one of two."""
    if not number:
        return number
    power = abs(number).numerator.bit_length() - number.denominator.bit_length()
    power -= abs(number) < Fraction(2) ** power
    unit = Fraction(2) ** (max(power, -126) - 23)
    return round(number / unit) * unit


def exact_chain(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Fused multiply-adds in the order of k, by rational numbers."""
    out = np.zeros((*left.shape[:2], right.shape[1]), np.float32)
    for n, i, j in np.ndindex(*out.shape):
        total = Fraction(0)
        for k in range(DEPTH):
            total = nearest(total + Fraction(float(left[n, i, k])) * Fraction(float(right[n, j, k])))
        out[n, i, j] = float(total)
    return out


#: Exponents of the last of 11 bits: usual ones; such that products lose bits as subnormal numbers, or lie below all.
RANGES = [(-12, 12), (-88, -70), (-90, 0), (-40, 50)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_a_chain_of_fused_multiply_adds(low: int, high: int) -> None:
    left, right = operands(1, low, high)
    want = exact_chain(left, right)
    assert want.any()
    np.testing.assert_array_equal(ordered.chained(left, right), want)
    np.testing.assert_array_equal(ordered.products_in_order(left, right), want)


def test_blocks_of_products_are_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = operands(2, -12, 12, count=7)
    whole = ordered.chained(left, right)
    monkeypatch.setattr(ordered, "BLOCK", 3 * 6 * 8)
    np.testing.assert_array_equal(ordered.chained(left, right), whole)


def test_overflow_and_what_is_no_number() -> None:
    """A product beyond float32 that the sum before it brings back; infinities and NaNs as IEEE 754 has them."""
    left, right = (np.zeros((1, rows, DEPTH), np.float32) for rows in (6, 8))
    left[0, 0, :2], right[0, 0, :2] = (-(2.0**63), 2.0**64), (1.5 * 2.0**64, 2.0**64)
    left[0, 1, 0], left[0, 2, 0] = np.inf, np.nan
    right[0, 1, 0] = 1
    with np.errstate(all="ignore"):
        made = ordered.products_in_order(left, right)[0]
    assert made[0, 0] == 2.0**126
    assert made[1, 1] == np.inf
    assert np.isnan(made[1, 2])
    assert np.isnan(made[2]).all()


def backwards(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return ordered.chained(left[..., ::-1], right.transpose(0, 2, 1)[..., ::-1])


def rounding_twice(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    total = np.zeros((*left.shape[:2], right.shape[2]), np.float32)
    for k in range(left.shape[2]):
        total = total + left[:, :, k, None] * right[:, k, None, :]
    return total


@pytest.mark.parametrize("other", [backwards, rounding_twice])
def test_a_blas_that_adds_otherwise_is_not_used(
    other: Callable[[np.ndarray, np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    matmul = lambda left, right: used.append(left) or other(left, right)  # noqa: E731
    monkeypatch.setattr(ordered, "np", type("NumPy", (), {**vars(np), "matmul": staticmethod(matmul)}))
    for low, high in RANGES:
        left, right = operands(3, low, high)
        np.testing.assert_array_equal(ordered.products_in_order(left, right), exact_chain(left, right))
    assert used
    assert not any(one is left for one in used)


def test_a_blas_that_adds_so_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layout of an operand is tried once."""
    left, right = operands(4, -12, 12)
    used = []
    matmul = lambda one, other: used.append(one) or ordered.chained(one, other.transpose(0, 2, 1))  # noqa: E731
    monkeypatch.setattr(ordered, "np", type("NumPy", (), {**vars(np), "matmul": staticmethod(matmul)}))
    across = np.ascontiguousarray(right.transpose(0, 2, 1)).transpose(0, 2, 1)
    for one in (right, across, right):
        np.testing.assert_array_equal(ordered.products_in_order(left, one), ordered.chained(left, right))
        assert used[-1] is left
    assert len(used) == 3 + 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["Haswell", "Zen", "Prescott", "SkylakeX"])
def test_every_kind_of_openblas(kernels: str) -> None:
    """In a process whose OpenBLAS has kernels for other processors: the engines agree in every bit of products."""
    folder = Path(__file__).parent
    files = [str(folder / f"test_ptx_{name}.py") for name in ("products", "matrix", "wgmma", "native")]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files]
    environment = os.environ | {"OPENBLAS_CORETYPE": kernels}
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
