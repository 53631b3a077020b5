"""The interpreter's bfloat16 after its correction, and that without the correction it is wrong."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(c + i * N + j, tl.dot(tl.load(a + i * N + j), tl.load(b + i * N + j)))


@pytest.fixture
def uncorrected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cast_impl", "create_dot"):
        monkeypatch.setattr(InterpreterBuilder, name, getattr(InterpreterBuilder, name).uncorrected)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, y, N=x.numel())
    return y


def dot_error(kinds: tuple[torch.dtype, torch.dtype]) -> float:
    """Largest error of a 32 x 32 product against float64, relative to its largest value."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(32, 32, generator=generator).to(kind) for kind in kinds)
    c = torch.zeros(32, 32)
    dot_kernel[(1,)](a, b, c, N=32)
    exact = a.double() @ b.double()
    return float((c - exact).abs().max() / exact.abs().max())


def values() -> torch.Tensor:
    """Random ones, ties both ways, subnormals, zeros, infinities, NaN, and what rounds up to infinity."""
    words = [0x3F808000, 0x3F818000, 0x3F808001, 0x00000001, 0x00018000, 0, 0x7F800000, 0x7FC00000, 0x7F7FFFFF]
    special = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[: len(words)], x[len(words) : 2 * len(words)] = special, -special
    return x


def test_casts_are_bit_equal_to_torch() -> None:
    x = values()
    ours, theirs = cast(x, torch.bfloat16), x.to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()].view(torch.int16), theirs[~theirs.isnan()].view(torch.int16))
    assert torch.equal(cast(theirs, torch.float32).view(torch.int32), theirs.to(torch.float32).view(torch.int32))


def test_other_casts_are_untouched() -> None:
    x = values()
    x = x[x.abs() < 60000][:1024]
    assert torch.equal(cast(x, torch.float16), x.to(torch.float16))
    assert torch.equal(cast(x.to(torch.float16), torch.float32), x.to(torch.float16).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_are_right(dtype: torch.dtype) -> None:
    assert dot_error((dtype, dtype)) < 1e-6


@pytest.mark.usefixtures("uncorrected")
def test_without_the_correction_casts_truncate() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    wrong = cast(x, torch.bfloat16) != x.to(torch.bfloat16)
    assert 0.4 < wrong.double().mean() < 0.6


@pytest.mark.usefixtures("uncorrected")
def test_without_the_correction_products_are_nonsense() -> None:
    assert dot_error((torch.bfloat16, torch.bfloat16)) > 1000
    assert dot_error((torch.float16, torch.float16)) < 1e-6
