"""The options of `pytest --ptx-target`, and nothing else: pytest imports this in every run of every suite.

The emulator, torch and Triton are imported only with the option; see `ptx_emulator.triton.suite`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; pytest calls this."""
    group = parser.getgroup("ptx_emulator", "Triton's kernels, executed and checked without a GPU")
    group.addoption(
        "--ptx-target", choices=("sm_80", "sm_90"),
        help="compile Triton and Gluon kernels for this architecture and execute them on CPU tensors; a test that "
        "launches one which races or leaves its tensors fails",
    )  # fmt: skip
    group.addoption(
        "--ptx-landing", choices=("early", "late", "random"), default="late", help="when copies land (late)"
    )
    group.addoption("--ptx-seed", type=int, metavar="N", help="draw the order of warps; without: program order")
    group.addoption(
        "--ptx-lane-order", action="store_true", help="also find lanes of a warp that exchange without meeting"
    )
    group.addoption("--ptx-all-configs", action="store_true", help="execute each configuration of an autotuned kernel")


def pytest_configure(config: pytest.Config) -> None:
    """Start the emulator if the option is given; pytest calls this."""
    if config.getoption("ptx_target") is not None:
        from ptx_emulator.triton.suite import begin

        begin(config)
