"""liger-kernel's operations in emulation: the committed table holds for every operation, and one runs where it can."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import check_liger
import pytest
import torch
from liger_ops import OPS, differentiated, inputs
from ptx_emulator.targets import EMULATED

EVIDENCE = Path(__file__).parent.parent / "benchmarks/evidence"
MADE = json.loads((EVIDENCE / "liger.json").read_text())
#: Operations with `tl.dot` in float32, of which Triton makes tf32: 10 bits.
TF32 = {"fused_neighborhood_attention", "mhc_coeffs", "fused_moe"}


def test_every_operation_has_its_rows_and_none_a_finding() -> None:
    assert {(row["op"], row["target"]) for row in MADE["rows"]} == {(op, t) for op in OPS for t in EMULATED}
    for row in MADE["rows"]:
        assert row["refused"] == "", row
        assert row["findings"] == [], row
        assert row["error"] < (5e-3 if row["op"] in TF32 else 5e-6), row


def test_what_rounding_decides_is_a_note() -> None:
    """Warps add the same squares in orders of their own: triton-lang/triton#7264."""
    noted = {row["op"] for row in MADE["rows"] if any(check_liger.ROUNDED in note for note in row["notes"])}
    assert noted == {"group_norm", "attn_res"}


def test_the_page_is_made_of_the_rows() -> None:
    assert (EVIDENCE / "liger.md").read_text() == check_liger.page(MADE)


@pytest.mark.parametrize("name", OPS)
def test_the_plain_operation_differentiates(name: str) -> None:
    op = OPS[name]
    made = differentiated(op.plain, op, torch.float64)
    assert all(one.isfinite().all() for one in made)
    assert [one.shape for one in made[-len(op.shapes) :]] == [inputs(op)[n].shape for n in op.shapes] or not op.backward


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="pip install --no-deps liger-kernel==0.8.5")
@pytest.mark.parametrize("name", ["group_norm", "rope"])
def test_an_operation_is_checked(name: str) -> None:
    row = check_liger.check(name, "sm_90")
    assert row["error"] < 1e-6
    assert (row["findings"], row["refused"]) == ([], "")
