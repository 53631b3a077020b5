"""Branches, loops and barriers, together and apart."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, run

LANES = np.arange(64, dtype=np.uint32)
STORE = "mad.wide.u32 %d1, %tid0, 4, %ptr0; st.global.b32 [%d1], %r1;"


def go(code: str, threads: int = 64, **options: object) -> tuple[np.ndarray, ptx_emulator.Report]:
    out = np.zeros(threads, np.uint32)
    report = run(entry(code, 1, **options), [out], threads=threads)
    return out, report


def test_uniform_loop() -> None:
    code = (
        "mov.b32 %r1, 0; mov.b32 %r2, 0;\n$L: add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1; "
        "setp.lt.u32 %p1, %r2, 10; @%p1 bra $L;" + STORE
    )
    out, report = go(code)
    assert (out == 45).all()
    assert report.counters.warp_instructions == 2 * (4 + 10 * 4 + 3), (
        "two warps; ld.param, mov tid and two moves, the loop, two to store, ret"
    )


def test_loops_of_different_length() -> None:
    code = (
        """mov.b32 %r1, 0; mov.b32 %r2, 0; setp.eq.u32 %p1, %tid0, 0; @%p1 bra $END;
    $L: add.u32 %r1, %r1, 3; add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, %tid0; @%p2 bra.uni $L;
    $END: """
        + STORE
    )
    out, _ = go(code)
    np.testing.assert_array_equal(out, 3 * LANES)


def test_if_else_with_loops_inside() -> None:
    code = (
        """and.b32 %r2, %tid0, 1; setp.eq.u32 %p1, %r2, 0; mov.b32 %r1, 0; mov.b32 %r3, 0; @!%p1 bra $ODD;
    $EVEN: add.u32 %r1, %r1, 2; add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, %tid0; @%p2 bra $EVEN;
    bra $JOIN;
    $ODD: add.u32 %r1, %r1, 100; add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 3; @%p2 bra $ODD;
    $JOIN: add.u32 %r1, %r1, 1;"""
        + STORE
    )
    out, _ = go(code)
    np.testing.assert_array_equal(out, np.where(LANES % 2 == 0, 2 * np.maximum(LANES, 1), 300) + 1)


def test_early_exit() -> None:
    code = (
        "mov.b32 %r1, 1; setp.lt.u32 %p1, %tid0, 10; @%p1 ret; mov.b32 %r1, 2; setp.gt.u32 %p2, %tid0, 50; @%p2 exit;"
        + STORE
    )
    out, report = go(code)
    np.testing.assert_array_equal(out, np.where((LANES < 10) | (LANES > 50), 0, 2))
    assert report.counters.global_store_bytes == 41 * 4


def test_ctas_leave_at_different_times() -> None:
    code = """mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 1; @%p1 ret;
    mad.lo.u32 %r3, %r2, 32, %tid0; mad.wide.u32 %d1, %r3, 4, %ptr0; st.global.b32 [%d1], %r3; bar.sync 0;"""
    out = np.full(96, 7, np.uint32)
    run(entry(code, 1), [out], grid=3)
    np.testing.assert_array_equal(out, np.where(np.arange(96) // 32 == 1, 7, np.arange(96)))


SHARED = ".shared .align 16 .b8 tile[1024];\n"
NEIGHBOUR = "mov.b32 %r9, tile; mad.lo.u32 %r8, %tid0, 4, %r9; xor.b32 %r7, %tid0, 32; mad.lo.u32 %r7, %r7, 4, %r9;"


def test_barrier_reached_along_two_ways() -> None:
    """The warps arrive at one barrier from two branches; afterwards each reads what the other wrote."""
    code = (
        NEIGHBOUR
        + """setp.lt.u32 %p1, %tid0, 32; @%p1 bra $A;
    st.shared.b32 [%r8], 5; bar.sync 0; bra $J;
    $A: st.shared.b32 [%r8], 6; bar.sync 0;
    $J: ld.shared.b32 %r1, [%r7];"""
        + STORE
    )
    out, report = go(code, outside=SHARED)
    np.testing.assert_array_equal(out, np.where(LANES < 32, 5, 6))
    assert not report.faults
    assert report.counters.barriers == 1


def test_exited_threads_do_not_hold_a_barrier() -> None:
    code = "mov.b32 %r1, 4; setp.lt.u32 %p1, %tid0, 32; @%p1 ret; bar.sync 0;" + STORE
    out, _ = go(code)
    np.testing.assert_array_equal(out, np.where(LANES < 32, 0, 4))


def test_named_barrier_between_producer_and_consumer() -> None:
    """Warp 0 arrives and goes on, warp 1 waits for it: barrier 1, 64 threads. Both share no other barrier."""
    code = (
        NEIGHBOUR
        + """mov.b32 %r1, 0; setp.lt.u32 %p1, %tid0, 32; @%p1 bra $PRODUCER;
    bar.sync 1, 64; ld.shared.b32 %r1, [%r7]; bra $J;
    $PRODUCER: st.shared.b32 [%r8], 9; bar.arrive 1, 64;
    $J: """
        + STORE
    )
    out, report = go(code, outside=SHARED)
    np.testing.assert_array_equal(out, np.where(LANES < 32, 0, 9))
    assert not report.faults


def test_barriers_of_disjoint_warps() -> None:
    """Each warp its own barrier number: no deadlock, and no order between the warps."""
    code = (
        NEIGHBOUR
        + "shr.u32 %r2, %tid0, 5; st.shared.b32 [%r8], %tid0; bar.sync %r2, 32; ld.shared.b32 %r1, [%r7];"
        + STORE
    )
    _, report = go(code, outside=SHARED)
    assert {f.kind for f in report.faults} == {"write-read"}


@pytest.mark.parametrize("code", ["bar.sync 0, 96;", "setp.lt.u32 %p1, %tid0, 32; @%p1 bar.sync 1; @!%p1 bar.sync 2;"])
def test_deadlock(code: str) -> None:
    with pytest.raises(ptx_emulator.Deadlock, match=r"bar\.sync.*threads at barrier"):
        go(code)


def test_barrier_count_per_cta() -> None:
    _, report = go("bar.sync 0; barrier.sync.aligned 0; barrier.cta.sync 3;")
    assert report.counters.barriers == 3


@pytest.mark.parametrize("code", ["bar.sync 1, {0}; bar.sync 1, {0};", "mov.b32 %r2, {0}; bar.sync 1, %r2;"])
def test_more_threads_than_a_barrier_waits_for(code: str) -> None:
    """Three warps of four may pass first, and the fourth waits for others: which one that is, nobody says."""
    assert go(code.format(128), threads=128)[1].faults == []
    told = r"128 threads of CTA 0 come to one phase of barrier 1, in which 96 take part: bar\.sync 1"
    with pytest.raises(ptx_emulator.EmulationError, match=told):
        go(code.format(96), threads=128)


def test_each_warp_may_pass_a_barrier_of_its_own_under_one_name() -> None:
    """A warp is all that takes part, so none waits for another, and none is ordered with another."""
    for count, kinds in ((64, set()), (32, {"write-read"})):
        code = NEIGHBOUR + f"st.shared.b32 [%r8], %tid0; bar.sync 1, {count}; ld.shared.b32 %r1, [%r7];" + STORE
        assert {fault.kind for fault in go(code, outside=SHARED)[1].faults} == kinds


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("bar.sync 1, 64;", ""),
        ("bar.arrive 1, 64;", ""),
        ("bar.sync 1, 96;", "at barrier 1, where others wait for"),
        ("bar.arrive 1, 128;", "at barrier 1, where others wait for"),
        ("bar.sync 1;", ""),  # all threads of the CTA: 64
        ("bar.red.popc.u32 %r1, 1, 64, %p1;", "a reduction and a plain arrival meet at barrier 1"),
        ("bar.sync 1, 48;", r"barrier 1 takes one multiple of 32 threads, not \[48\]"),
        ("bar.sync 1, 0;", r"barrier 1 takes one multiple of 32 threads, not \[0\]"),
        ("mad.lo.u32 %r2, %tid0, 32, 32; bar.sync 1, %r2;", r"takes one multiple of 32 threads, not \[1056, 1088"),
    ],
)
def test_all_who_take_part_agree_about_a_barrier(other: str, told: str) -> None:
    """Warp 0 waits for 64 threads at barrier 1; what warp 1 does there."""
    code = f"setp.lt.u32 %p1, %tid0, 32; @%p1 bra $A; {other} bra $J; $A: bar.sync 1, 64; $J: "
    if not told:
        assert go(code)[1].faults == []
        return
    with pytest.raises(ptx_emulator.EmulationError, match=told):
        go(code)


def test_a_barrier_number_above_15_is_refused() -> None:
    with pytest.raises(ptx_emulator.EmulationError, match="barrier 16"):
        go("mov.b32 %r1, 16; bar.sync %r1, 64;")


def test_an_aligned_barrier_reached_by_halves_of_a_warp() -> None:
    """From two branches inside of a warp: what the plain form allows, the aligned one does not."""
    code = """and.b32 %r2, %tid0, 1; setp.eq.u32 %p1, %r2, 0; mov.b32 %r1, 5; @%p1 bra $A; {0} bra $J;
    $A: {0} $J: """
    for form in ("bar.sync 0;", "barrier.sync.aligned 0;"):
        with pytest.raises(ptx_emulator.Divergence, match="some lanes of a warp only, the others wait elsewhere"):
            go(code.replace("{0}", form))
    assert (go(code.replace("{0}", "barrier.sync 0;") + STORE)[0] == 5).all()
