"""Registers of wgmmas that machine code touches too early: what ptxas before 13.3 does, on PTX that is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from ptx_emulator.predict.resources import listing
from ptx_emulator.predict.wgmma_registers import Touched, touched_early
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, Recorder, offline_driver
from ptx_emulator.triton.launcher import Emulator
from torch import Tensor

from cast_kernels.assemblers import DEFECTS, release, version_of
from cast_kernels.evidence.defects import shown
from cast_kernels.evidence.reassemble import assemble

DEFECT = DEFECTS[0]
TOOLS = [triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.ptxas_blackwell.path, "/usr/local/cuda-13.0/bin/ptxas"]


@triton.jit
def widened_product(a, b, c, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c [BM, BN] = a [BM, k] @ b [k, BN], a in float32: it is rounded in registers, from which wgmma takes it."""
    row, column, inner = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, k, BK, num_stages=3):
        left = tl.load(a + row[:, None] * k + (start + inner)[None, :])
        right = tl.load(b + (start + inner)[:, None] * BN + column[None, :])
        total = tl.dot(left.to(tl.bfloat16), right, total)
    tl.store(c + row[:, None] * BN + column[None, :], total)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-4, 5, (128, 256), generator=generator).float()
    b = torch.randint(-4, 5, (256, 128), generator=generator).bfloat16()
    return a, b, torch.zeros(128, 128)


def compute(a: Tensor, b: Tensor, c: Tensor) -> None:
    widened_product[(1,)](a, b, c, a.shape[1], BM=128, BN=128, BK=64, num_warps=4)


@pytest.fixture(scope="module")
def launch() -> Launch:
    with offline_driver(target("sm_90"), Recorder()) as recorder:
        compute(*operands())
    (record,) = recorder.records.values()
    return record.first


def test_the_ptx_is_right() -> None:
    """The emulator checks in PTX what is checked here in machine code, and the products are exact."""
    a, b, c = operands()
    with offline_driver(target("sm_90"), Emulator(engine="native")):
        compute(a, b, c)
    assert torch.equal(c, a @ b.float())


@pytest.mark.parametrize("path", TOOLS)
def test_releases_that_are_known_to_be_bad_are_bad(path: str, launch: Launch) -> None:
    if not Path(path).exists():
        pytest.skip(f"there is no {path}")
    word = DEFECT.judge(release(version_of(path)))
    if word == "unknown":
        pytest.skip(f"nothing is said of ptxas {version_of(path)}")
    found = touched_early(listing(assemble(launch.asm["ptx"], path)[0]))
    assert bool(found) == (word == "bad")
    assert {touch.role for touch in found} <= {"operand"}


def test_the_gate_names_it(launch: Launch) -> None:
    cubin, _ = assemble(launch.asm["ptx"], triton.knobs.nvidia.ptxas.path)
    failures = list(shown(launch.asm["ptx"], cubin, 90))
    if DEFECT.judge(release(version_of(triton.knobs.nvidia.ptxas.path))) == "bad":
        assert len(failures) == 4
        assert "operand of a wgmma that may still be under way, is written" in failures[0]
        assert failures[-1].endswith("more registers of wgmmas are touched too early")
    else:
        assert failures == []


def sass(*lines: str) -> str:
    """A listing: instructions, and labels by their colon."""
    return "\n".join(line if line.endswith(":") else f"        /*0000*/  {line} ;" for line in lines)


FIRST = "HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR4], R24"
LAST = f"{FIRST}, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([LAST, "MOV R56, R1"], ("operand", 56)),
        ([LAST, "MOV R60, R1"], None),  # a fragment has four registers
        ([LAST, f"{WAIT}0", "MOV R56, R1"], None),
        ([LAST, f"{WAIT}1", "MOV R56, R1"], ("operand", 56)),
        ([LAST, LAST, f"{WAIT}1", "MOV R56, R1"], ("operand", 56)),
        ([LAST, LAST.replace("R56", "R64"), f"{WAIT}1", "MOV R56, R1"], None),
        ([LAST, LAST.replace("R56", "R64"), f"{WAIT}1", "MOV R64, R1"], ("operand", 64)),
        ([FIRST, f"{WAIT}0", "MOV R56, R1"], ("operand", 56)),  # its group was not closed: nothing waited for it
        ([LAST, "MOV R1, R56"], None),  # reading it is allowed
        ([LAST, "MOV R1, R24"], ("accumulator", 24)),
        ([LAST, "MOV R1, R39"], ("accumulator", 39)),  # 64 x 32 in float32 by 128 threads: 16 registers
        ([LAST, "MOV R1, R40"], None),
        ([LAST, "MOV R1, R23"], None),
        ([LAST, LAST], None),  # adds to the same
        ([LAST, "HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR4], R88, gsb0"], ("accumulator", 24)),
        ([LAST, "@P0 MOV R57, R1"], ("operand", 57)),
        ([LAST, "LDS.128 R53, [R1]"], ("operand", 56)),
        ([LAST, "LDS.64 R54, [R1]"], None),
        ([LAST, "LDS.64 R55, [R1]"], ("operand", 56)),
        ([LAST, "LDSM.16.M88.4 R59, [R1]"], ("operand", 59)),
        ([LAST, "IMAD.WIDE R58, R1, R2, R3"], ("operand", 58)),
        ([LAST, "SHFL.BFLY PT, R57, R1, 0x1, 0x1f"], ("operand", 57)),
        ([LAST, "STS [R1], R56"], None),
        ([LAST, "ISETP.GT.AND P0, PT, R56, R1, PT"], None),
        ([LAST, "LDGSTS.E.128 [R56], desc[UR4][R2.64]"], None),
        ([LAST, "R2UR UR4, R56"], None),
        # Around a loop, and on one of two ways.
        ([".L_x_0:", "MOV R56, R1", LAST, "@P0 BRA `(.L_x_0)"], ("operand", 56)),
        ([".L_x_0:", f"{WAIT}0", "MOV R56, R1", LAST, "@P0 BRA `(.L_x_0)"], None),
        ([LAST, "BRA.U UP0, `(.L_x_0)", f"{WAIT}0", ".L_x_0:", "MOV R56, R1"], ("operand", 56)),
        ([LAST, "BRA `(.L_x_0)", "MOV R56, R1", ".L_x_0:", f"{WAIT}0"], None),
        ([LAST, "EXIT", "MOV R56, R1"], None),
        ([LAST, "@P0 EXIT", "MOV R56, R1"], ("operand", 56)),
    ],
)
def test_registers_under_way(lines: list[str], found: tuple[str, int] | None) -> None:
    touched = [(touch.role, touch.register) for touch in touched_early(sass(*lines, "EXIT"))]
    assert touched == ([found] if found else [])


def test_what_cannot_be_followed_is_no_pass() -> None:
    with pytest.raises(RuntimeError, match="the goal of BRX R4 -0x10 is not known"):
        touched_early(sass("BRX R4 -0x10"))
    with pytest.raises(RuntimeError, match="while a wgmma is under way"):
        touched_early(sass(LAST, "CALL.REL.NOINC `(k)"))
    assert touched_early(sass("CALL.REL.NOINC `(k)", "EXIT")) == []


def test_what_was_found_is_told_with_its_instruction() -> None:
    assert str(Touched("MOV R56, R1", 56, "operand")) == (
        "R56, operand of a wgmma that may still be under way, is written: MOV R56, R1"
    )
