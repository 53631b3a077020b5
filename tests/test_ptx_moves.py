"""Moves, packing, selection, and the exchange of values inside a warp."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, lanewise, run

LANES = np.arange(32, dtype=np.uint32)


def test_pack_and_unpack() -> None:
    a, b = np.array([0x1111], np.uint16), np.array([0x2222], np.uint16)
    assert lanewise("mov.b32 %o, {%a, %b};", [a, b], [np.uint32])[0][0] == 0x22221111, (
        "the first element is the low part"
    )
    wide = np.array([0x4444333322221111], np.uint64)
    low, high = lanewise("mov.b64 {%o, %q}, %a;", [wide], [np.uint32, np.uint32])
    assert (low[0], high[0]) == (0x22221111, 0x44443333)
    assert lanewise("mov.b64 {%h0, _, %h2, %o}, %a;", [wide], [np.uint16])[0][0] == 0x4444
    quarter = "mov.b64 {%h0, %h1, %h2, %h3}, %a; mov.b64 %o, {%h3, %h2, %h1, %h0};"
    assert lanewise(quarter, [wide], [np.uint64])[0][0] == 0x1111222233334444


def test_select() -> None:
    a = np.arange(8, dtype=np.uint32)
    (got,) = lanewise("setp.gt.u32 %p0, %a, 3; selp.b32 %o, %a, 100, %p0;", [a], [np.uint32])
    assert got.tolist() == [100, 100, 100, 100, 4, 5, 6, 7]
    sign = np.array([1, 0xFFFFFFFF, 0], np.uint32)
    (got,) = lanewise("slct.b32.s32 %o, 1, 2, %a;", [sign], [np.uint32])
    assert got.tolist() == [1, 2, 1]


def test_guards_leave_other_lanes_alone() -> None:
    a = np.arange(8, dtype=np.uint32)
    (got,) = lanewise(
        "mov.b32 %o, 7; setp.lt.u32 %p0, %a, 4; @%p0 mov.b32 %o, 1; @!%p0 add.u32 %o, %o, 1;", [a], [np.uint32]
    )
    assert got.tolist() == [1, 1, 1, 1, 8, 8, 8, 8]


def test_special_registers() -> None:
    code = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %tid0;
    mad.wide.u32 %d1, %r3, 16, %ptr0; mov.u32 %r4, %laneid; mov.u32 %r5, %warpid; mov.u32 %r6, %nctaid.x;
    mov.u32 %r7, %lanemask_lt; st.global.v4.b32 [%d1], {%r4, %r5, %r6, %r7};"""
    out = np.zeros((3 * 64, 4), np.uint32)
    run(entry(code, 1), [out], grid=3, threads=64)
    thread = np.arange(3 * 64) % 64
    np.testing.assert_array_equal(out.T, [thread % 32, thread // 32, np.full(192, 3), (1 << thread % 32) - 1])


def shuffle_reference(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The pseudocode of the ISA document."""
    bval, cval, mask = b & 31, c & 31, c >> 8 & 31
    high, low = (lane & mask) | (cval & ~mask & 31), lane & mask
    j = {"up": lane - bval, "down": lane + bval, "bfly": lane ^ bval, "idx": low | (bval & ~mask & 31)}[mode]
    inside = j >= high if mode == "up" else j <= high
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("c", [0x1F, 0, 0x1807, 0x1C1F, 0x100F])
def test_shuffle(mode: str, c: int) -> None:
    values = LANES * 3 + 100
    for b in (0, 1, 3, 16, 31):
        got, flag = lanewise(f"shfl.sync.{mode}.b32 %o|%q, %a, {b}, {c}, -1;", [values], [np.uint32, bool])
        want = [shuffle_reference(mode, lane, b, c) for lane in range(32)]
        assert got.tolist() == [int(values[j]) for j, _ in want]
        assert flag.tolist() == [inside for _, inside in want]


def test_shuffle_with_a_source_lane_per_thread() -> None:
    values = np.concatenate([LANES, LANES + 1000])
    source = np.concatenate([LANES[::-1], (LANES * 7) % 32]).astype(np.uint32)
    (got,) = lanewise("shfl.sync.idx.b32 %o, %a, %b, 31, -1;", [values, source], [np.uint32])
    np.testing.assert_array_equal(got, np.concatenate([LANES[::-1], (LANES * 7) % 32 + 1000]))


def test_shuffle_from_an_inactive_lane_is_undefined() -> None:
    (got,) = lanewise(
        "mov.b32 %o, 5; setp.lt.u32 %p0, %a, 8; @%p0 shfl.sync.bfly.b32 %o, %a, 4, 31, 255;", [LANES], [np.uint32]
    )
    assert got[:8].tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert got[8:].tolist() == [5] * 24
    (got,) = lanewise(
        "setp.lt.u32 %p0, %a, 8; mov.b32 %o, 0; @%p0 shfl.sync.bfly.b32 %o, %a, 16, 31, 255;", [LANES], [np.uint32]
    )
    assert np.isnan(got[:8].view(np.float32)).all(), "poison, so that a use of it shows"


def test_votes() -> None:
    code = "setp.gt.u32 %p0, %a, 9; "
    (got,) = lanewise(code + "vote.sync.ballot.b32 %o, %p0, -1;", [LANES], [np.uint32])
    assert (got == 0xFFFFFC00).all()
    for mode, want in {"any": True, "all": False, "uni": False}.items():
        (flag,) = lanewise(f"{code} vote.sync.{mode}.pred %o, %p0, -1;", [LANES], [bool])
        assert flag.tolist() == [want] * 32
    (flag,) = lanewise(code + "vote.sync.all.pred %o, !%p0, -1;", [LANES % 9], [bool])
    assert flag.all()


@pytest.mark.parametrize(
    ("name", "kind", "want"),
    [
        ("add", "u32", 496),
        ("min", "s32", 0),
        ("max", "u32", 31),
        ("or", "b32", 31),
        ("and", "b32", 0),
        ("xor", "b32", 0),
    ],
)
def test_redux(name: str, kind: str, want: int) -> None:
    (got,) = lanewise(f"redux.sync.{name}.{kind} %o, %a, -1;", [LANES], [np.uint32])
    assert got.tolist() == [want] * 32


def test_elect_and_activemask() -> None:
    leader, flag = lanewise("elect.sync %o|%q, -1;", [LANES], [np.uint32, bool])
    assert (leader == 0).all()
    assert flag.tolist() == [True] + [False] * 31
    code = "setp.ge.u32 %p0, %a, 5; mov.b32 %o, 0; @%p0 activemask.b32 %o; mov.b32 %r1, 0; @%p0 elect.sync %r1|%q, -1;"
    mask, _ = lanewise(code + "@!%p0 setp.eq.u32 %q, %a, 99;", [LANES], [np.uint32, bool])
    assert mask[5:].tolist() == [0xFFFFFFE0] * 27
    assert mask[0] == 0


def test_instructions_without_effect() -> None:
    quiet = (
        "membar.gl; fence.acq_rel.gpu; griddepcontrol.wait; bar.warp.sync -1; prefetch.global.L2 [%ptr0]; "
        "griddepcontrol.launch_dependents;"
    )
    (got,) = lanewise(f"{quiet} mov.b32 %o, %a;", [LANES], [np.uint32])
    np.testing.assert_array_equal(got, LANES)


def test_a_cache_policy_changes_no_value() -> None:
    """What Triton makes of `eviction_policy` on a load."""
    code = (
        "createpolicy.fractional.L2::evict_first.b64 %d1, 1.0; "
        "ld.global.L1::evict_first.L2::cache_hint.b32 %o, [%d32], %d1;"
    )
    (got,) = lanewise(code, [LANES + 7], [np.uint32])
    np.testing.assert_array_equal(got, LANES + 7)


@pytest.mark.parametrize(
    "text",
    [
        "discard.global.L2 [%ptr0], 128;",
        "mov.u32 %r1, %clock;",
        "nosuch.op %r1;",
        "match.any.sync.b32 %r1, %r2, -1;",
        "mov.u32 %r1, nowhere;",
    ],
)
def test_unknown(text: str) -> None:
    with pytest.raises(ptx_emulator.Unsupported, match=text.split()[0]):
        run(entry(text, 0), [])
