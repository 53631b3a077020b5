"""mbarriers: arrivals, bytes, phases, waits that sleep, and the reports of deadlocks and of barriers misused."""

import numpy as np
import ptx_emulator
import pytest
from ptx_emulator.cuda import Pointer, Record
from ptx_emulator.cuda import run as run_record
from ptx_snippets import entry, run

LANES = np.arange(64, dtype=np.uint32)
OUTSIDE = ".shared .align 8 .b8 bar[32];\n.shared .align 16 .b8 tile[1024];\n"
#: %r9: the barrier, %r8: the thread's word, %r7: the word of the other warp's thread, %p1: warp 0, %p2: thread 0
SETUP = (
    "mov.b32 %r9, bar; mov.b32 %r10, tile; mad.lo.u32 %r8, %tid0, 4, %r10; xor.b32 %r7, %tid0, 32; "
    "mad.lo.u32 %r7, %r7, 4, %r10; setp.lt.u32 %p1, %tid0, 32; setp.eq.u32 %p2, %tid0, 0; mov.b32 %r1, 0;"
)
STORE = "mad.wide.u32 %d32, %tid0, 4, %ptr0; st.global.b32 [%d32], %r1;"


def init(count: int, at: str = "%r9") -> str:
    return f"@%p2 mbarrier.init.shared::cta.b64 [{at}], {count}; bar.sync 0;"


def wait(parity: int | str, name: str = "W", at: str = "%r9", how: str = "try_wait") -> str:
    return f"${name}: mbarrier.{how}.parity.shared::cta.b64 %p5, [{at}], {parity}; @!%p5 bra ${name};"


def go(code: str, threads: int = 64, **options: object) -> tuple[np.ndarray, ptx_emulator.Report]:
    out = np.zeros(threads, np.uint32)
    report = run(entry(SETUP + code + STORE, 1, outside=OUTSIDE), [out], threads=threads, **options)
    return out, report


def kinds(report: ptx_emulator.Report) -> set[str]:
    return {fault.kind for fault in report.faults}


PRODUCER = "@%p1 bra $P; {wait} ld.shared.b32 %r1, [%r7]; bra $J; $P: st.shared.b32 [%r8], 9; {arrive} $J: "


@pytest.mark.parametrize("how", ["try_wait", "test_wait"])
def test_a_consumer_sleeps_until_its_producer_has_arrived(how: str) -> None:
    """The consumer's code comes first, so the emulator runs it first; its wait must not starve the producer."""
    code = PRODUCER.format(wait=wait(0, how=how), arrive="mbarrier.arrive.shared::cta.b64 _, [%r9];")
    out, report = go(init(32) + code)
    np.testing.assert_array_equal(out, np.where(LANES < 32, 0, 9))
    assert not report.faults


def test_what_a_relaxed_arrival_or_wait_leaves_open() -> None:
    """The values come right in this order all the same: only the clocks tell."""
    arrive = "mbarrier.arrive.relaxed.cluster.shared::cta.b64 _, [%r9];"
    _, report = go(init(32) + PRODUCER.format(wait=wait(0), arrive=arrive))
    assert kinds(report) == {"write-read"}
    relaxed = wait(0).replace("parity.", "parity.relaxed.cluster.")
    _, report = go(init(32) + PRODUCER.format(wait=relaxed, arrive="mbarrier.arrive.shared::cta.b64 _, [%r9];"))
    assert kinds(report) == {"write-read"}
    both = wait(0).replace("parity.", "parity.acquire.cluster.")
    release = arrive.replace("relaxed", "release")
    assert not go(init(32) + PRODUCER.format(wait=both, arrive=release))[1].faults


def test_a_race_is_found_though_the_order_hid_it() -> None:
    """A store behind the arrival is not released by it, though the producer's store came first here."""
    code = PRODUCER.format(wait="bar.sync 2, 64; " + wait(0), arrive="mbarrier.arrive.shared::cta.b64 _, [%r9];")
    late = code.replace("st.shared.b32 [%r8], 9; mbarrier", "bar.arrive 2, 64; mbarrier").replace(
        "$J:", "st.shared.b32 [%r8], 9; $J:"
    )
    assert kinds(go(init(32) + late)[1]) & {"write-read", "read-write"}


def test_parities_of_a_ring_over_many_phases() -> None:
    """Both warps meet six times; each waits for the phase whose parity it keeps."""
    code = f"""mov.b32 %r2, 0; mov.b32 %r3, 0;
    $L: mbarrier.arrive.shared::cta.b64 _, [%r9]; {wait("%r3")} xor.b32 %r3, %r3, 1; add.u32 %r1, %r1, 7;
    add.u32 %r2, %r2, 1; setp.lt.u32 %p3, %r2, 6; @%p3 bra $L;"""
    out, report = go(init(64) + code)
    assert (out == 42).all()
    assert not report.faults


def test_arrivals_with_a_count_and_the_state_they_give() -> None:
    """One thread of each warp arrives for all of its lanes; it waits for the state that its arrival gave."""
    code = """and.b32 %r2, %tid0, 31; setp.ne.u32 %p3, %r2, 0; @%p3 bra $E;
    mbarrier.arrive.shared::cta.b64 %d1, [%r9], 32; mbarrier.pending_count.b64 %r1, %d1;
    $S: mbarrier.{how}.shared::cta.b64 %p4, [%r9], %d1; @!%p4 bra $S; $E: """
    for how in ("try_wait", "test_wait", "try_wait.acquire.cta"):
        out, _ = go(init(64) + code.replace("{how}", how))
        assert sorted(out[out > 0].tolist()) == [32, 64]


def test_no_complete() -> None:
    arrive = "@%p1 mbarrier.arrive.noComplete.shared::cta.b64 %d1, [%r9], 1; mov.b32 %r1, 5;"
    assert (go(init(33) + arrive)[0] == 5).all()
    with pytest.raises(ptx_emulator.EmulationError, match=r"noComplete ends the phase.*1 of 32 arrivals"):
        go(init(32) + arrive)


def test_arrive_drop_lowers_the_next_phases() -> None:
    code = f"""@%p1 mbarrier.arrive_drop.shared::cta.b64 _, [%r9];
    @!%p1 mbarrier.arrive.shared::cta.b64 _, [%r9]; {wait(0)}
    @%p1 bra $E; mbarrier.arrive.shared::cta.b64 _, [%r9]; {wait(1, "V")} mov.b32 %r1, 3; $E: """
    out, _ = go(init(64) + code)
    np.testing.assert_array_equal(out, np.where(LANES < 32, 0, 3))


def test_expected_bytes_hold_a_phase_open() -> None:
    code = """@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 96;
    @%p1 mbarrier.complete_tx.relaxed.cluster.shared::cta.b64 [%r9], 3;"""
    assert not go(init(1) + code + wait(0))[1].faults
    with pytest.raises(ptx_emulator.Deadlock, match="0 of 1 arrivals and 32 bytes outstanding"):
        go(init(1) + code.replace("], 96", "], 128") + wait(0))
    apart = code.replace("arrive.expect_tx", "expect_tx.relaxed.cluster").replace("64 _,", "64")
    assert not go(init(1) + apart + "@%p2 mbarrier.arrive.shared::cta.b64 _, [%r9];" + wait(0))[1].faults
    with pytest.raises(ptx_emulator.EmulationError, match="beyond 1048575"):
        go(init(1) + code.replace("], 96", "], 2000000"))


def test_a_generic_address() -> None:
    code = "cvt.u64.u32 %d1, %r9; cvta.shared.u64 %d1, %d1; @%p2 mbarrier.arrive.b64 _, [%d1];"
    code += "$G: mbarrier.try_wait.parity.b64 %p5, [%d1], 0, 1000; @!%p5 bra $G;"
    assert not go(init(1) + code)[1].faults


@pytest.mark.parametrize("how", ["try_wait", "test_wait"])
def test_a_deadlock_is_a_report(how: str) -> None:
    """Two of three arrivals come: the report says so, of which barrier, and who waits at which line."""
    code = f"{init(3, at='%r9+8')} @%p2 mbarrier.arrive.shared::cta.b64 _, [%r9+8], 2;\n.loc 1 77 1\n" + wait(
        1, at="%r9+8", how=how
    )
    out = np.zeros(64, np.uint32)
    passes = entry(SETUP + code + STORE, 1, outside='.file 1 "ring.cu"\n' + OUTSIDE)
    run(passes, [out], threads=64)
    want = (
        rf"`mbarrier\.{how}.*` 64 threads of CTA 0, thread 0 first, wait for parity 0 at the mbarrier at shared byte 8 "
        r"of CTA 0: phase 0, 1 of 3 arrivals and 0 bytes outstanding \(ring\.cu:77\)"
    )
    with pytest.raises(ptx_emulator.Deadlock, match=want):
        run(passes.replace("[%r9+8], 1; @!%p5", "[%r9+8], 0; @!%p5"), [out], threads=64)


def test_more_arrivals_than_expected() -> None:
    with pytest.raises(
        ptx_emulator.EmulationError, match=r"more arrivals than the phase expects.* 0 of 1 arrivals and 8"
    ):
        go(
            init(1) + "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 8; bar.sync 0; @%p1 "
            "mbarrier.arrive.shared::cta.b64 _, [%r9];"
        )


def test_an_mbarrier_that_is_none() -> None:
    arrive = "@%p2 mbarrier.arrive.shared::cta.b64 _, [%r9];"
    with pytest.raises(ptx_emulator.MemoryFault, match="no mbarrier was initialised at shared byte 0"):
        go(arrive)
    with pytest.raises(ptx_emulator.MemoryFault, match="no mbarrier"):
        go(init(1) + "@%p2 mbarrier.inval.shared::cta.b64 [%r9];" + arrive)
    with pytest.raises(ptx_emulator.Misaligned, match="no multiple of 8"):
        go(init(1, at="%r9+4"))
    with pytest.raises(ptx_emulator.EmulationError, match="1 to 1048575 arrivals, not 0"):
        go(init(0))
    with pytest.raises(ptx_emulator.MemoryFault, match="outside the CTA's"):
        go(init(1, at="%r9+4096"))


def test_an_init_that_nobody_was_told_of() -> None:
    arrive = "@!%p1 mbarrier.arrive.shared::cta.b64 _, [%r9];"
    _, report = go("@%p2 mbarrier.init.shared::cta.b64 [%r9], 32;" + arrive)
    assert kinds(report) == {"mbarrier used before its init is visible"}
    assert not go(init(32) + arrive)[1].faults


def test_forms_that_are_no_mbarrier() -> None:
    for form in (
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9];",
        "mbarrier.init.shared::cta.b64 [%r9];",
        "mbarrier.arrive.shared::cluster.b64 %d1, [%r9];",
        "mbarrier.arrive.shared::cta.b32 _, [%r9];",
    ):
        with pytest.raises(ptx_emulator.Unsupported, match=form.split(" ")[0]):
            go(form)


@pytest.mark.parametrize("noinc", [".noinc", ""])
def test_copies_of_a_thread_that_an_mbarrier_tells_of(noinc: str) -> None:
    """Warp 0 copies from global memory; warp 1 waits at the mbarrier alone. Nobody waits for a group."""
    copy = "mad.wide.u32 %d1, %tid0, 4, %ptr1; cp.async.ca.shared.global [%r8], [%d1], 4;"
    told = f"cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [%r9];"
    arrive = told if noinc else told + "mbarrier.arrive.shared::cta.b64 _, [%r9];"
    code = "@%p1 bra $P; {wait} ld.shared.b32 %r1, [%r7]; bra $J; $P: {produce} $J: "

    def launch(produce: str, waits: str = wait(0)) -> tuple[np.ndarray, set[str]]:
        out, x = np.zeros(64, np.uint32), np.arange(100, 164, dtype=np.uint32)
        text = entry(SETUP + init(32) + code.format(wait=waits, produce=produce) + STORE, 2, outside=OUTSIDE)
        return out, kinds(run(text, [out, x], threads=64))

    out, faults = launch(copy + arrive)
    np.testing.assert_array_equal(out, np.where(LANES < 32, 0, 68 + LANES))
    assert not faults
    assert launch(copy + arrive + "ld.shared.b32 %r1, [%r8];")[1] == {"write-read"}, "the copying warp must wait too"
    assert not launch(copy + arrive + wait(0, "V") + "ld.shared.b32 %r1, [%r8];")[1]
    with pytest.raises(ptx_emulator.Deadlock, match="32 of 32 arrivals"):
        launch(copy)


@pytest.mark.parametrize(
    "how", ["st.shared.b32 [%r9], 7;", "st.shared.b32 [%r9+4], 7;", "red.shared.add.u32 [%r9], 1;"]
)
def test_what_writes_over_an_mbarrier(how: str) -> None:
    """Its eight bytes are its own, and a write beside it is no matter."""
    over = f"@%p2 {how} bar.sync 0;"
    assert kinds(go(init(64) + over)[1]) == {"write over an mbarrier"}
    assert not go(init(64) + over.replace("%r9+4", "%r9+8").replace("[%r9]", "[%r9+8]"))[1].faults
    ended = "@%p2 mbarrier.inval.shared::cta.b64 [%r9]; bar.sync 0;"
    assert not go(init(64) + ended + over)[1].faults


def test_a_wait_that_does_not_try_again() -> None:
    """`try_wait` may return false when its time is over. What goes on all the same is found under some seed."""
    loop, arrive = wait(0), "mbarrier.arrive.shared::cta.b64 _, [%r9];"
    once = loop.split("@!%p5")[0]
    found = [kinds(go(init(32) + PRODUCER.format(wait=once, arrive=arrive), seed=seed)[1]) for seed in range(16)]
    assert {"write-read"} in found or {"read-write"} in found
    for seed in range(16):
        out, report = go(init(32) + PRODUCER.format(wait=loop, arrive=arrive), seed=seed)
        assert (out[:32] == 0).all()
        assert (out[32:] == 9).all()
        assert not report.faults


#: Waits for at most %d20 nanoseconds, and goes to $OVER if the phase is over.
LIMITED = (
    "mov.u64 %d10, %globaltimer; $W: mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r9], 0; @%p5 bra $OVER; "
    "mov.u64 %d11, %globaltimer; sub.u64 %d11, %d11, %d10; setp.lt.u64 %p6, %d11, %d20; @%p6 bra $W; "
)


def test_where_no_thread_can_go_on_time_passes_for_who_reads_it() -> None:
    code = init(2) + "mov.b64 %d20, 2500000000; @%p2 bra $T; bra $X; $T: " + LIMITED
    out, report = go(code + "cvt.u32.u64 %r1, %d11; bra $X; $OVER: mov.b32 %r1, 1; $X: ")
    assert out[0] == 3_000_000_000 % 2**32
    assert not report.faults


def test_time_does_not_pass_while_another_thread_can_go_on() -> None:
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r9];"
    code = init(1) + "mov.b64 %d20, 1; @%p1 bra $P; " + LIMITED + "mov.b32 %r1, 2; bra $X; "
    out, _ = go(code + f"$P: @%p2 {arrive} bra $X; $OVER: mov.b32 %r1, 1; $X: ")
    assert (out[32:] == 1).all()


def test_who_waits_for_ever_is_told_after_a_minute_and_what_was_written_before_a_trap_stays() -> None:
    forever = init(1) + "mov.b64 %d20, -1; " + LIMITED + "$OVER: "
    with pytest.raises(ptx_emulator.EmulationError, match="no thread can go on"):
        go(forever)
    text = entry(SETUP + "mov.b32 %r1, 7;" + STORE + "trap;", 1, outside=OUTSIDE)
    out = np.zeros(64, np.uint32)
    record = Record(text, "f", (1, 1, 1), (64, 1, 1), (Pointer("x"),), {"x": out})
    with pytest.raises(ptx_emulator.EmulationError, match="trap"):
        run_record(record)
    assert (out == 7).all()
