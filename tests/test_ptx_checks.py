"""Shared-memory races: for each kind a kernel that has it and one that differs by what prevents it."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, run

SHARED = ".shared .align 16 .b8 tile[4096];\n"
# %r8: the thread's word, %r7: the same word of the other warp's thread
SETUP = (
    "mov.b32 %r9, tile; mad.lo.u32 %r8, %tid0, 4, %r9; xor.b32 %r7, %tid0, 32; mad.lo.u32 %r7, %r7, 4, %r9; "
    "setp.lt.u32 %p1, %tid0, 32;"
)
MINE, OTHER = "st.shared.b32 [%r8], %tid0;", "st.shared.b32 [%r7], %tid0;"
READ_MINE, READ_OTHER = "ld.shared.b32 %r1, [%r8];", "ld.shared.b32 %r1, [%r7];"
BARRIER = "bar.sync 0;"


def faults(code: str, threads: int = 64, grid: int = 1, **options: object) -> list[ptx_emulator.Fault]:
    return run(entry(SETUP + code, 0, outside=SHARED), [], threads=threads, grid=grid, **options).faults


RACES = {
    "write-read": (MINE, READ_OTHER),
    "write-write": (MINE, OTHER),
    "read-write": (READ_MINE, OTHER),
}


@pytest.mark.parametrize("kind", RACES)
def test_races(kind: str) -> None:
    first, second = RACES[kind]
    (fault,) = faults(first + second)
    assert fault.kind == kind
    assert fault.other == first.rstrip(";")
    assert fault.instruction == second.rstrip(";")
    assert (fault.word, fault.warps, fault.epoch, fault.cta) == (32, (1, 0), 0, 0), "thread 0 meets what thread 32 did"
    assert kind in str(fault)
    assert faults(first + BARRIER + second) == []


def test_one_barrier_does_not_cover_the_next_epoch() -> None:
    found = faults(MINE + BARRIER + READ_OTHER + MINE)
    assert [f.kind for f in found] == ["read-write"]
    assert found[0].epoch == 1
    assert faults(MINE + BARRIER + READ_OTHER + BARRIER + MINE) == []


def test_a_warp_does_not_race_with_itself() -> None:
    assert faults(MINE + READ_MINE + MINE + READ_MINE) == []


def test_equal_values_are_no_race() -> None:
    """Replicated layouts store the same value from several warps."""
    same = "and.b32 %r2, %tid0, 31; mad.lo.u32 %r3, %r2, 4, %r9; st.shared.b32 [%r3], %r2;"
    assert faults(same) == []
    assert faults(same + "@%p1 st.shared.b32 [%r3], %r2;") == []
    assert {f.kind for f in faults(same.replace("[%r3], %r2", "[%r3], %tid0"))} == {"write-write"}, "in one instruction"


def test_values_that_agree_are_a_note() -> None:
    """Equal, or float32 that rounding parts, as Triton's reductions write them: (a warp's value, the other's)."""

    def told(one: int, other: int) -> tuple[set[str], set[str]]:
        code = f"mov.b32 %r1, {one}; selp.b32 %r2, {other}, %r1, %p1; st.shared.b32 [%r9], %r2;"
        report = run(entry(SETUP + code, 0, outside=SHARED), [], threads=64)
        return {f.kind for f in report.faults}, {f.kind for f in report.notes}

    assert told(0x3F800000, 0x3F800000) == (set(), {"write-write of the same value"})
    assert told(0x3F800000, 0x3F800002) == (set(), {"write-write of values that differ by rounding"})
    assert told(0xBF800000, 0xBF80003F) == (set(), {"write-write of values that differ by rounding"})
    for one, other in ((0x3F800000, 0x3F800041), (5, 6), (0x3F800000, 0xBF800000), (0x7F800000, 0x7F7FFFFF)):
        assert told(one, other)[0] == {"write-write"}, (one, other)


def test_a_read_of_what_nobody_wrote_is_a_note() -> None:
    def told(code: str) -> list[tuple[str, str, int]]:
        report = run(entry(SETUP + code, 0, outside=SHARED), [], threads=64)
        assert report.faults == []
        return [(note.kind, note.instruction, note.word) for note in report.notes]

    assert told(READ_MINE) == [("read of a word that nobody wrote", "ld.shared.b32 %r1, [%r8]", 0)]
    assert told(f"@%p1 {MINE} {BARRIER} {READ_MINE}") == [
        ("read of a word that nobody wrote", "ld.shared.b32 %r1, [%r8]", 32)
    ]
    assert told(MINE + READ_MINE) == []


def test_a_nan_is_equal_whatever_the_order_of_its_summands() -> None:
    """Two warps add the same two NaNs, each its own first: on a GPU both write the same bits."""
    code = (
        "mov.b32 %r1, 0x7FC00001; mov.b32 %r2, 0xFFC00002; selp.b32 %r3, %r1, %r2, %p1; selp.b32 %r4, %r2, %r1, %p1; "
        "add.f32 %r5, %r3, %r4; st.shared.b32 [%r9], %r5;"
    )
    assert faults(code) == []
    assert {f.kind for f in faults(code.replace("[%r9], %r5", "[%r9], %r3"))} == {"write-write"}


def test_the_second_of_two_readers_counts() -> None:
    """Warp 0 reads word 0 first, then warp 1 does; warp 0 writes it in the same epoch."""
    code = (
        "@%p1 ld.shared.b32 %r1, [%r9]; @!%p1 ld.shared.b32 %r1, [%r9]; setp.eq.u32 %p2, %tid0, 0; "
        "@%p2 st.shared.b32 [%r9], 1;"
    )
    (fault,) = faults(code)
    assert (fault.kind, fault.warps) == ("read-write", (1, 0))
    assert faults(code.replace("@!%p1 ld.shared.b32 %r1, [%r9];", "")) == []


def test_halves_of_a_word_are_no_race() -> None:
    """Two warps store the two 16-bit halves of each word."""
    code = (
        "shr.u32 %r2, %tid0, 5; and.b32 %r3, %tid0, 31; mad.lo.u32 %r4, %r3, 4, %r9; "
        "mad.lo.u32 %r4, %r2, 2, %r4; cvt.u16.u32 %h1, %tid0; st.shared.b16 [%r4], %h1;"
    )
    assert faults(code) == []
    assert {f.kind for f in faults(code.replace("%r2, 2, %r4", "%r2, 0, %r4"))} == {"write-write"}


def test_races_of_one_cta_only() -> None:
    """CTA 2 writes where the others do not: each CTA has its own account from then on, and what came before is kept."""
    code = f"mov.u32 %r2, %ctaid.x; setp.eq.u32 %p3, %r2, 2; {MINE} {BARRIER} {READ_MINE} @%p3 {OTHER}"
    (fault,) = faults(code, grid=4)
    assert (fault.kind, fault.cta) == ("read-write", 2)
    assert faults(code.replace("ld.shared.b32 %r1, [%r8];", f"{READ_MINE} {BARRIER}"), grid=4) == []


def test_addresses_that_differ_between_ctas() -> None:
    code = (
        f"mov.u32 %r2, %ctaid.x; mad.lo.u32 %r8, %r2, 512, %r8; mad.lo.u32 %r7, %r2, 512, %r7; "
        f"{MINE} {BARRIER} {READ_OTHER} {BARRIER}"
    )
    assert faults(code, grid=4) == []
    assert {f.kind for f in faults(code.replace(BARRIER, "", 1), grid=4)} == {"write-read"}


def test_barriers_in_branches_order_only_their_warps() -> None:
    """Four warps; warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2. What warp 0 wrote warp 1 may read, warp
    2 not."""
    code = """st.shared.b32 [%r8], %tid0; setp.lt.u32 %p2, %tid0, 64; @!%p2 bra $B; bar.sync 1, 64; bra $J;
    $B: bar.sync 2, 64; $J: """
    assert faults(code + READ_OTHER, threads=128) == []
    far = "xor.b32 %r6, %tid0, 64; mad.lo.u32 %r6, %r6, 4, %r9; ld.shared.b32 %r1, [%r6];"
    assert {f.kind for f in faults(code + far, threads=128)} == {"write-read"}
    assert faults(code + BARRIER + far, threads=128) == []


def test_a_barrier_of_all_is_remembered_beside_one_of_some() -> None:
    """What lies before `bar.sync 0` stays ordered for the warps that later meet at a barrier of their own."""
    apart = "setp.lt.u32 %p2, %tid0, 64; @!%p2 bra $B; bar.sync 1, 64; $B: "
    assert faults(MINE + BARRIER + apart + READ_OTHER, threads=128) == []
    assert {f.kind for f in faults(MINE + apart + READ_OTHER, threads=128)} == {"write-read"}, "warps 2 and 3 never met"


def test_arrive_orders_one_way() -> None:
    """The producer's writes are seen by who waits;
    what the waiting warp writes races with the producer's later read."""
    code = "@%p1 bra $P; {c0} bar.sync 1, 64; {c1} bra $J; $P: {p0} bar.arrive 1, 64; {p1} $J: mov.b32 %r1, 0;"
    make = lambda **k: code.format(**{"c0": "", "c1": "", "p0": "", "p1": "", **k})  # noqa: E731
    assert faults(make(p0=MINE, c1=READ_OTHER)) == []
    assert {f.kind for f in faults(make(c0=MINE, p1=READ_OTHER))} == {"write-read"}


def test_atomics_race_with_plain_accesses_only() -> None:
    add = "red.shared.add.u32 [%r9], 1;"
    assert faults(add + add) == []
    assert {f.kind for f in faults(add + "ld.shared.b32 %r1, [%r9];")} == {"write-read"}
    assert {f.kind for f in faults("setp.eq.u32 %p2, %tid0, 0; @%p2 st.shared.b32 [%r9], 7;" + add)} == {"write-write"}
    assert (
        faults(
            "setp.eq.u32 %p2, %tid0, 0; @%p2 st.shared.b32 [%r9], 7;"
            + BARRIER
            + add
            + BARRIER
            + "ld.shared.b32 %r1, [%r9];"
        )
        == []
    )


COPY = "mad.lo.u32 %r5, %tid0, 16, %r9; mad.wide.u32 %d1, %tid0, 16, %ptr0; cp.async.cg.shared.global [%r5], [%d1], 16;"


def copy_faults(code: str) -> set[str]:
    text = entry(SETUP + code, 1, outside=SHARED)
    return {f.kind for f in run(text, [np.zeros(1024, np.uint8)], threads=64).faults}


def test_copies_in_flight() -> None:
    """From issue to wait a copy may land: reads and writes of its target are faults, even beyond a barrier."""
    wait = "cp.async.wait_all;"
    assert copy_faults(COPY + wait + BARRIER + READ_OTHER) == set()
    assert copy_faults(COPY + BARRIER + READ_OTHER + wait) == {"read of a copy in flight"}
    assert copy_faults(COPY + BARRIER + MINE + wait) == {"write to a copy in flight"}
    assert copy_faults(COPY + wait + READ_OTHER) == {"write-read"}, "waited for, but by another warp"
    assert copy_faults(READ_OTHER + COPY + wait) == {"read-write"}, "the target was still being read"
    assert copy_faults(MINE + COPY + wait) == {"write-write"}


def test_a_matrix_load_reads_whole_rows() -> None:
    store = "mad.lo.u32 %r5, %tid0, 16, %r9; st.shared.v4.b32 [%r5], {%tid0, %r9, %r9, %r9};"
    load = (
        "xor.b32 %r6, %tid0, 32; mad.lo.u32 %r6, %r6, 16, %r9; "
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r6];"
    )
    assert {f.kind for f in faults(store + load)} == {"write-read"}
    assert faults(store + BARRIER + load) == []
    put = load.replace("ldmatrix", "stmatrix").replace("{%r1, %r2, %r3, %r4}, [%r6]", "[%r6], {%r8, %r8, %r8, %r8}")
    assert {f.kind for f in faults(store + put)} == {"write-write"}
    assert faults(store + BARRIER + put) == []


def test_each_pair_of_instructions_is_reported_once() -> None:
    """Over five turns of a loop and three batches of CTAs."""
    loop = f"mov.b32 %r2, 0; $L: {MINE} {READ_OTHER} add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 5; @%p2 bra $L;"
    assert [f.kind for f in faults(loop, grid=600)] == ["write-read", "read-write"]


def test_checks_can_be_switched_off() -> None:
    assert faults(MINE + READ_OTHER, checks=False) == []
