"""Triton's floating-point sanitizer in the emulator, as a second opinion on which numbers a kernel combines.

FpSan replaces numbers by codes that keep what algebra says and drop what rounding adds: sums in any order have the same
code, and every operand is in it. docs/ptxas.md says what of Triton's sanitizers runs here, and what does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import offline_driver
from ptx_emulator.triton.launcher import Emulator
from torch import Tensor
from triton_kernels import product

from cast_kernels.versions import release

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(release(triton.__version__) < (3, 8), reason="FpSan is part of Triton from 3.8 on"),
]


@pytest.fixture
def codes() -> Iterator[None]:
    """Kernels are compiled with numbers replaced."""
    before = triton.knobs.compilation.instrumentation_mode
    triton.knobs.compilation.instrumentation_mode = "fpsan"
    yield
    triton.knobs.compilation.instrumentation_mode = before


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator).bfloat16() for size in ((64, 128), (128, 64)))
    return a, b


def computed(a: Tensor, b: Tensor, **options: int) -> Tensor:
    """The bits of a @ b on sm_80."""
    with offline_driver(target("sm_80"), Emulator(engine="native")):
        return product(a, b, **options).view(torch.int32)


def test_the_order_of_a_sum_does_not_matter(codes: None) -> None:
    """Steps of 32 and of 64 channels, and the channels in another order: exactly the same products are added."""
    a, b = operands()
    expected = computed(a, b, bk=32)
    assert torch.equal(computed(a, b, bk=64), expected)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(computed(a[:, order].contiguous(), b[order].contiguous(), bk=32), expected)


def test_every_operand_matters(codes: None) -> None:
    """What rounding would hide: one more unit in the last place of one number changes its whole row, and no other."""
    a, b = operands()
    changed = a.clone()
    changed.view(torch.int16)[3, 5] += 1
    differs = computed(a, b) != computed(changed, b)
    assert bool(differs[3].all())
    assert not bool(differs[torch.arange(64) != 3].any())


def test_the_order_matters_without_it() -> None:
    """Of rounded numbers: the first test is of the codes."""
    a, b = operands()
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(computed(a[:, order].contiguous(), b[order].contiguous(), bk=32), computed(a, b, bk=32))
