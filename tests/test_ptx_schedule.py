"""Schedules from a seed: a program without races gives the same under all of them, one with a race under some not."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, run

SHARED = ".shared .align 16 .b8 tile[1024];\n"
#: thread t writes its word in the tile and reads that of the warp beside it; {0}: what stands between
NEIGHBOUR = """mov.b32 %r9, tile; mad.lo.u32 %r8, %tid0, 4, %r9; xor.b32 %r7, %tid0, 32; mad.lo.u32 %r7, %r7, 4, %r9;
st.shared.b32 [%r8], %tid0; {0} mov.b32 %r2, 0;
$L: add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 4; @%p1 bra $L; ld.shared.b32 %r1, [%r7];
mad.wide.u32 %d1, %tid0, 4, %ptr0; st.global.b32 [%d1], %r1;"""
LANES = np.arange(64, dtype=np.uint32)
SEEDS = range(8)


def go(between: str, seed: int | None, **options: object) -> np.ndarray:
    out = np.zeros(64, np.uint32)
    run(entry(NEIGHBOUR.replace("{0}", between), 1, outside=SHARED), [out], threads=64, seed=seed, **options)
    return out


def test_values_show_a_race_under_some_schedule() -> None:
    """Without the barrier both warps run together in program order, and the values come right by luck."""
    assert (go("", None) == LANES ^ 32).all()
    right = [bool((go("", seed) == LANES ^ 32).all()) for seed in SEEDS]
    assert not all(right)
    for seed in SEEDS:
        assert (go("bar.sync 0;", seed) == LANES ^ 32).all()


def test_a_seed_names_one_schedule() -> None:
    """Two warps draw tickets in the order in which they run."""
    code = """mov.b32 %r2, 0; mov.b32 %r1, 0; $L: atom.global.add.u32 %r3, [%ptr1], 1; add.u32 %r1, %r1, %r3;
    add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 6; @%p1 bra $L; mad.wide.u32 %d1, %tid0, 4, %ptr0;
    st.global.b32 [%d1], %r1;"""

    def tickets(seed: int | None) -> tuple[int, ...]:
        out = np.zeros(64, np.uint32)
        run(entry(code, 2), [out, np.zeros(1, np.uint32)], threads=64, seed=seed)
        return tuple(out.tolist())

    assert tickets(3) == tickets(3)
    assert len({tickets(seed) for seed in SEEDS}) > 2


def test_copies_that_land_at_random() -> None:
    """Four copies at one barrier each: the order of their landing differs by seed, what is waited for is there."""
    code = """mov.b32 %r9, tile; mov.b32 %r10, bar; mov.b32 %r20, 0; setp.eq.u32 %p2, %tid0, 0;
    $I: mad.lo.u32 %r11, %r20, 8, %r10; @%p2 mbarrier.init.shared::cta.b64 [%r11], 1; add.u32 %r20, %r20, 1;
    setp.lt.u32 %p1, %r20, 4; @%p1 bra $I; bar.sync 0; @!%p2 bra $W; mov.b32 %r20, 0;
    $C: mad.lo.u32 %r11, %r20, 8, %r10; mad.lo.u32 %r12, %r20, 16, %r9; mad.wide.u32 %d1, %r20, 16, %ptr0;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 16;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r12], [%d1], 16, [%r11];
    add.u32 %r20, %r20, 1; setp.lt.u32 %p1, %r20, 4; @%p1 bra $C;
    $W: and.b32 %r20, %tid0, 3; mad.lo.u32 %r11, %r20, 8, %r10;
    $T: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r11], 0; @!%p5 bra $T;
    mad.lo.u32 %r12, %r20, 16, %r9; ld.shared.b32 %r1, [%r12]; atom.shared.add.u32 %r3, [%r10+32], 1;
    mad.wide.u32 %d1, %tid0, 8, %ptr1; st.global.v2.b32 [%d1], {%r1, %r3};"""
    orders = set()
    for seed in SEEDS:
        x, out = np.arange(16, dtype=np.uint32), np.zeros((32, 2), np.uint32)
        report = run(
            entry(code, 2, outside=SHARED + ".shared .align 8 .b8 bar[40];\n"), [x, out], seed=seed, landing="random"
        )
        np.testing.assert_array_equal(out[:, 0], 4 * (np.arange(32) % 4))
        assert not report.faults
        orders.add(tuple(np.argsort(out[:4, 1]).tolist()))
    assert len(orders) > 2


def test_a_copy_may_land_before_anybody_waits() -> None:
    """What one test finds some blocks after the issue: true for a copy that landed early, false for a late one."""
    code = """mov.b32 %r9, tile; setp.eq.u32 %p2, %tid0, 0; @%p2 mbarrier.init.shared::cta.b64 [%r9+512], 1; bar.sync 0;
    @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9+512], 16; mov.b32 %r2, 0;
    @%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%ptr0], 16, [%r9+512];
    $L: add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 6; @%p1 bra $L;
    mbarrier.test_wait.parity.shared::cta.b64 %p5, [%r9+512], 0; selp.b32 %r1, 1, 0, %p5;
    $W: mbarrier.try_wait.parity.shared::cta.b64 %p6, [%r9+512], 0; @!%p6 bra $W;
    mad.wide.u32 %d1, %tid0, 4, %ptr1; st.global.b32 [%d1], %r1;"""

    def found(landing: str, seed: int | None) -> int:
        x, out = np.zeros(4, np.uint32), np.zeros(32, np.uint32)
        run(entry(code, 2, outside=SHARED), [x, out], landing=landing, seed=seed)
        return int(out[0])

    assert (found("early", None), found("late", None)) == (1, 0)
    assert {found("random", seed) for seed in SEEDS} == {0, 1}


def test_bad_schedules() -> None:
    with pytest.raises(ValueError, match="draws from a seed"):
        go("", None, landing="random")
    with pytest.raises(ValueError, match="choose one of early, late, random"):
        go("", None, landing="sometimes")
    with pytest.raises(ptx_emulator.Deadlock):
        go("bar.sync 0, 96;", 1)


LOCK = """
setp.eq.u32 %p0, ELECTED, 0;
TRY: mov.u32 %r1, 0;
@%p0 atom.global.cas.b32 %r1, [%ptr0], 0, 1;
MEET
setp.ne.u32 %p1, %r1, 0;
@%p1 bra TRY;
@%p0 ld.global.u32 %r2, [%ptr1]; @%p0 add.u32 %r2, %r2, 1; @%p0 st.global.u32 [%ptr1], %r2;
MEET
@%p0 atom.global.exch.b32 %r3, [%ptr0], 0;
"""


@pytest.mark.parametrize(("grid", "threads"), [(5, 32), (40, 32), (1, 128), (3, 96)])
@pytest.mark.parametrize("seed", [None, 2])
def test_a_lock_is_passed_on(grid: int, threads: int, seed: int | None) -> None:
    """CTAs, and warps of one CTA, try for a lock in a loop: the one that holds it must come to run."""
    lock, count = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    meet = "shfl.sync.idx.b32 %r1, %r1, 0, 31, -1;"  # what the elected lane got
    code = f"and.b32 %r9, %tid0, 31; {LOCK}".replace("ELECTED", "%r9").replace("MEET", meet)
    run(entry(code, 2), [lock, count], grid=grid, threads=threads, seed=seed)
    assert (lock[0], count[0]) == (0, grid * threads // 32)


def test_lanes_of_a_warp_are_kept_together() -> None:
    """A loop of many more rounds for some lanes than for others: all meet again behind it."""
    out = np.zeros(64, np.uint32)
    code = """
    mov.u32 %r1, 0; mul.lo.u32 %r2, %tid0, 40;
    LOOP: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, %r2; @%p1 bra LOOP;
    activemask.b32 %r3; mul.wide.u32 %d1, %tid0, 4; add.u64 %d1, %d1, %ptr0; st.global.u32 [%d1], %r3;
    """
    run(entry(code, 1), [out], threads=64)
    assert (out == 0xFFFFFFFF).all()


ROLES = """mov.b32 %r9, tile; and.b32 %r8, %tid0, 31; mad.lo.u32 %r8, %r8, 4, %r9; mov.u32 %r1, 0;
setp.ge.u32 %p1, %tid0, 32; @%p1 bra $S; {first} bra $D; $S: {second} $D:
mad.wide.u32 %d1, %tid0, 4, %ptr0; st.global.b32 [%d1], %r1;"""
WRITE, READ = "st.shared.b32 [%r8], %tid0;", "ld.shared.b32 %r1, [%r8];"
CLOCKED = "mov.b32 %r7, bar; setp.eq.u32 %p2, %tid0, 0; @%p2 mbarrier.init.shared::cta.b64 [%r7], 1; bar.sync 0;"


@pytest.mark.parametrize("clocked", [False, True])
@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize(
    ("first", "second", "races"),
    [
        ("bar.arrive 1, 64;" + WRITE, "bar.sync 1, 64;" + READ, True),
        (WRITE + "bar.arrive 1, 64;", "bar.sync 1, 64;" + READ, False),
        ("bar.arrive 1, 64;" + READ, "bar.sync 1, 64;" + WRITE, True),
        (READ + "bar.arrive 1, 64;", "bar.sync 1, 64;" + WRITE, False),
        ("bar.arrive 1, 64;" + WRITE, "bar.sync 1, 64;" + WRITE, True),
        ("bar.arrive 1, 64;" + WRITE + "bar.arrive 2, 64;", "bar.sync 1, 64; bar.sync 2, 64;" + READ, False),
    ],
)
def test_what_comes_after_an_arrival_is_not_told_of(
    first: str, second: str, races: bool, seed: int | None, clocked: bool
) -> None:
    """A warp arrives at a barrier and goes on: the warp that waits there sees what came before the arrival."""
    outside = SHARED + ".shared .align 8 .b8 bar[8];\n"
    code = (CLOCKED if clocked else "") + ROLES.replace("{first}", first).replace("{second}", second)
    report = run(entry(code, 1, outside=outside), [np.zeros(64, np.uint32)], threads=64, seed=seed)
    assert bool(report.faults) == races
