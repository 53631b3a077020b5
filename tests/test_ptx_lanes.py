"""Order between the lanes of a warp: what they exchange through shared memory without having met."""

from __future__ import annotations

import re
from dataclasses import replace

import ptx_emulator
import pytest
import torch
from kernel_cache import offline
from mutant_subjects import forward
from ptx_emulator import cuda
from ptx_emulator.targets import target
from ptx_emulator.triton.launcher import Emulator
from ptx_snippets import entry

from cast_kernels.evidence.cases import Case, poisoned_memory, run

OUTSIDE = ".shared .align 8 .b8 tile[512];\n.shared .align 8 .b8 bar[8];\n"
#: %r8: the thread's word, %r7: its neighbour's, %r9: word 0, %r10: an mbarrier; %p1 to %p3: threads 0, 16 and 31
SETUP = """mov.b32 %r9, tile; mov.b32 %r10, bar; mad.lo.u32 %r8, %tid0, 4, %r9; xor.b32 %r7, %tid0, 1;
mad.lo.u32 %r7, %r7, 4, %r9; setp.eq.u32 %p1, %tid0, 0; setp.eq.u32 %p2, %tid0, 16; setp.eq.u32 %p3, %tid0, 31;"""
MINE, READ, OTHER = "st.shared.b32 [%r8], %tid0;", "ld.shared.b32 %r1, [%r7];", "st.shared.b32 [%r7], %tid0;"
ALL = f"{MINE} bar.sync 0; ld.shared.b32 %r1, [%r9];"  # every lane reads word 0
CLUSTER = ".explicitcluster\n.reqnctapercluster 2\n"
BETWEEN = " between lanes of a warp that have not met"


def found(code: str, *, threads: int = 32, lane_order: bool = True, directives: str = "") -> set[str]:
    """Kinds of findings of two CTAs."""
    (kernel,) = ptx_emulator.parse(entry(SETUP + code, 0, outside=OUTSIDE, directives=directives)).kernels.values()
    report = ptx_emulator.launch(
        kernel, grid=(2, 1, 1), threads=threads, arguments=[], memory=ptx_emulator.Memory(), target="sm_90",
        lane_order=lane_order,
    )  # fmt: skip
    return {fault.kind for fault in report.faults}


@pytest.mark.parametrize("directives", ["", CLUSTER])
@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (MINE, READ, "write-read"),
        (MINE, OTHER, "write-write"),
        (MINE + "ld.shared.b32 %r1, [%r8];", OTHER, "write-write, read-write"),
        (ALL, "@%p1 st.shared.b32 [%r9], 0;", "read-write"),
        (ALL, "@%p2 st.shared.b32 [%r9], 0;", "read-write"),
        (ALL, "@%p3 st.shared.b32 [%r9], 0;", "read-write"),
        ("mad.lo.u32 %r4, %tid0, 8, %r9; st.shared.v2.b32 [%r4], {1, 2};", "ld.shared.b32 %r1, [%r8];", "write-read"),
        (MINE, "ld.shared.b32 %r1, [%r8]; st.shared.b32 [%r8], 1;", ""),  # each lane its own word
    ],
)
def test_lanes_must_meet_between_two_accesses(before: str, after: str, kind: str, directives: str) -> None:
    kinds = {one + BETWEEN for one in kind.split(", ") if one}
    assert found(before + after, directives=directives) == kinds
    assert found(before + "shfl.sync.idx.b32 %r2, %r8, 0, 31, -1;" + after, directives=directives) == kinds
    for meeting in ("bar.warp.sync -1;", "bar.sync 0;", "bar.sync 1, 32;", "barrier.sync 0;"):
        assert found(before + meeting + after, directives=directives) == set(), meeting
    assert found(before + after, directives=directives, lane_order=False) == set()


def test_what_orders_lanes_in_a_cluster() -> None:
    """Its barrier, and an mbarrier at which every lane arrives and for which every lane waits."""
    made = "@%p1 mbarrier.init.shared::cta.b64 [%r10], {0}; fence.mbarrier_init.release.cluster;"
    meet = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    assert found(MINE + meet + READ, directives=CLUSTER) == set()
    wait = "$W: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r10], 0; @!%p5 bra $W;"
    arrive = "mbarrier.arrive{0}.shared::cta.b64 _, [%r10];"
    code = made.format(32) + meet + MINE + arrive + wait + READ
    assert found(code.format(""), directives=CLUSTER) == set()
    assert found(code.format(".relaxed.cta"), directives=CLUSTER) == {"write-read" + BETWEEN}


def test_warps_are_looked_at_apart() -> None:
    """Two warps, each with its own words; one of them meets, the other does not."""
    half = "setp.lt.u32 %p4, %tid0, 32; @{0}%p4 bra $A; bar.warp.sync -1; $A: "
    for sign in ("", "!"):
        assert found(MINE + half.format(sign) + READ, threads=64) == {"write-read" + BETWEEN}
    assert found(MINE + "bar.warp.sync -1;" + READ, threads=64) == set()
    assert found(MINE + "xor.b32 %r6, %r8, 128;" + "ld.shared.b32 %r1, [%r6];", threads=64) == {"write-read"}


def test_the_interpreter_alone_looks_at_lanes() -> None:
    (kernel,) = ptx_emulator.parse(entry("mov.b32 %r1, 0;", 0)).kernels.values()
    with pytest.raises(ValueError, match="engine='native' does not look at the order of lanes: use 'interpreter'"):
        ptx_emulator.launch(
            kernel, grid=(1, 1, 1), threads=32, arguments=[], memory=ptx_emulator.Memory(), engine="native",
            lane_order=True,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("goal", ["sm_80", "sm_90"])
def test_the_lanes_of_our_kernels_meet(goal: str, dtype: torch.dtype) -> None:
    """Forward and backward of B-CAST; a finding raises."""
    emulator = Emulator(lane_order=True)
    with offline(target(goal), emulator), poisoned_memory():
        run(Case(1, 2, 5, 96, 32, 2, backward=True), "triton", dtype)
    assert len(emulator.runs) == 10


@pytest.mark.slow
@pytest.mark.parametrize("goal", ["sm_80", "sm_90"])
def test_each_meeting_of_our_kernels_lanes_is_needed(goal: str) -> None:
    """The exchange has two `bar.warp.sync`; without either one lanes read what others may not have written."""
    record = forward(goal)["exchange"].record
    meetings = list(re.finditer(r"bar\.warp\.sync[^;]*;", record.ptx))
    assert len(meetings) == 2
    for cut in (None, *meetings):
        ptx = record.ptx if cut is None else record.ptx[: cut.start()] + record.ptx[cut.end() :]
        buffers = {name: array.copy() for name, array in record.buffers.items()}
        report = cuda.run(replace(record, ptx=ptx, buffers=buffers), lane_order=True)
        assert {fault.kind for fault in report.faults} == (set() if cut is None else {"write-read" + BETWEEN})
