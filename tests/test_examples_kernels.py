"""The examples that check a kernel without a GPU: what they find, and that it goes with its cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton
from test_examples import example

from cast_kernels.versions import FENCED_TRITON, release


def test_the_forgotten_mask_is_found_and_the_mask_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    adding = example("check_a_triton_kernel")
    assert adding.main(["--target", "sm_80"]) == 1
    said = capsys.readouterr().out
    assert "1. MemoryFault in add" in said
    assert "(byte 4000 of 'y', which has 4000)" in said
    assert adding.main(["--fixed"]) == 0
    assert capsys.readouterr().out.endswith("ptx_emulator: nothing found\n")


FENCED = pytest.mark.skipif(
    release(triton.__version__) < FENCED_TRITON, reason="this Triton leaves out fences on sm_90, which is found as well"
)


@FENCED
def test_tritons_fault_is_found_and_goes_with_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    """If a newer Triton has mended it, the first assertion says so: then docs/triton_6691.md is history."""
    dotted = example("one_tile_for_sum_and_dot")
    assert dotted.main([]) == 1
    assert "write to an operand of a pending wgmma in product_and_sums" in capsys.readouterr().out
    assert dotted.main(["--without-sum"]) == 0
    assert dotted.main(["--target", "sm_80"]) == 0


@FENCED
def test_the_pages_show_what_the_examples_print(capsys: pytest.CaptureFixture[str]) -> None:
    """Line by line, but for seconds, registers and where the program was started."""
    root = Path(__file__).parent.parent
    for page, name in (
        ("tools/ptx_emulator/README.md", "check_a_triton_kernel"), ("docs/triton_6691.md", "one_tile_for_sum_and_dot"),
    ):  # fmt: skip
        example(name).main([])
        shown = (root / page).read_text()
        for line in capsys.readouterr().out.splitlines():
            if line.startswith(("1. ", "     grid", "     the launch", "  kernel ")):
                assert line in shown, page
            if "launched by" in line:
                assert line.partition(" from ")[0].strip() in shown, page
