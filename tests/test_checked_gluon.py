"""A Gluon kernel through the checker: clusters, multicast, tensor maps in scratch memory, launched by a program."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.8", reason="Gluon has clusters since Triton 3.8")
from ptx_emulator.triton import Checker, checking  # noqa: E402
from torch import Tensor  # noqa: E402

ROWS, DEPTH = 200, 200  # no multiple of a tile


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, DEPTH, generator=generator).bfloat16() for rows in (ROWS, 128))
    return x, w, torch.full((ROWS, 128), float("nan"), dtype=torch.bfloat16)


def multiply(told: bool, freed: bool) -> tuple[Checker, Tensor, Tensor]:
    """(what was found, the product, the exact one)."""
    from gluon_kernels import layouts, product

    x, w, y = tensors()
    with checking("sm_90") as checker:
        product[(1,)](x, w, y, DEPTH, ROWS, *layouts().values(), told, freed, num_warps=4, num_ctas=2)
    return checker, y.double(), x.double() @ w.double().T


def test_with_its_barriers_it_is_right() -> None:
    checker, found, exact = multiply(told=True, freed=True)
    assert checker.findings == []
    assert (found - exact).norm() < 2e-3 * exact.norm()
    assert checker.runs["product"].ctas == 2


def test_without_the_barriers_of_the_cluster_there_is_a_report() -> None:
    checker, _, _ = multiply(told=False, freed=False)
    assert "read-write" in {finding.kind for finding in checker.findings}
    assert "gluon_kernels.py:" in checker.findings[0].message
    assert "num_ctas=2" in checker.text()


def test_a_kernel_that_was_compiled_by_hand_is_launched_too() -> None:
    import gluon_kernels
    from triton.backends.compiler import GPUTarget

    x, w, y = tensors()
    with checking("sm_90") as checker:
        made = triton.compile(
            gluon_kernels.source(True, True), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_ctas": 2}
        )
        made[(1, 1, 1)](x, w, y, DEPTH, ROWS, *gluon_kernels.layouts().values(), True, True)
    assert checker.findings == []
    assert (y.double() - x.double() @ w.double().T).norm() < 3e-3 * (x.double() @ w.double().T).norm()
