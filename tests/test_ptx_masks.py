"""The member masks of a warp's exchanges: who is heard, and who waits for whom."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, lanewise, run

LANES = np.arange(32, dtype=np.uint32)
HALVES = np.where(LANES < 16, 0xFFFF, 0xFFFF0000).astype(np.uint32)
KINDS = [int(kind, 16) for kind in ("55555555", "aaaaaaaa")]
PARITY = np.array(KINDS, np.uint32)[LANES % 2]


@pytest.mark.parametrize("masks", [HALVES, PARITY, np.uint32(1) << LANES], ids=["halves", "parity", "alone"])
def test_lanes_hear_those_of_their_masks(masks: np.ndarray) -> None:
    """As the tiles of a cooperative group do: one instruction, executed by all, with a mask for each tile."""
    flags = LANES % 3 == 0
    mine = (masks[:, None] >> LANES & 1) != 0
    code = "rem.u32 %r1, %a, 3; setp.eq.u32 %p1, %r1, 0; "
    (ballot,) = lanewise(code + "vote.sync.ballot.b32 %o, %p1, %b;", [LANES, masks], [np.uint32])
    assert ballot.tolist() == [int((np.uint32(1) << LANES)[row & flags].sum()) for row in mine]
    for name, want in {
        "any": (mine & flags).any(1),
        "all": (~mine | flags).all(1),
        "uni": (~mine | flags).all(1) | ~(mine & flags).any(1),
    }.items():
        (got,) = lanewise(f"{code}vote.sync.{name}.pred %o, %p1, %b;", [LANES, masks], [bool])
        assert got.tolist() == want.tolist(), name
    leader, chosen = lanewise("elect.sync %o|%q, %b;", [LANES, masks], [np.uint32, bool])
    assert leader.tolist() == mine.argmax(1).tolist()
    assert chosen.tolist() == (mine.argmax(1) == LANES).tolist()


@pytest.mark.parametrize(
    ("name", "function"), [("add", np.add), ("min", np.minimum), ("max", np.maximum), ("xor", np.bitwise_xor)]
)
def test_sums_of_masks(name: str, function: np.ufunc) -> None:
    kind = "b32" if name == "xor" else "s32"
    values = (LANES * 7 % 31 - 11).astype(np.uint32)
    (got,) = lanewise(f"redux.sync.{name}.{kind} %o, %a, %b;", [values, HALVES], [np.uint32])
    want = [function.reduce(values.view(np.int32)[mask == HALVES]) for mask in HALVES]
    assert got.view(np.int32).tolist() == want


def test_a_value_from_outside_of_the_mask_is_undefined() -> None:
    code = "xor.b32 %r1, %a, 16; shfl.sync.idx.b32 %o, %a, %r1, 31, %b;"
    (got,) = lanewise(code, [LANES, HALVES], [np.uint32])
    assert (got == 0x7FFF7FFF).all()
    (got,) = lanewise("shfl.sync.bfly.b32 %o, %a, 8, 31, %b;", [LANES, HALVES], [np.uint32])
    assert got.tolist() == (LANES ^ 8).tolist()


@pytest.mark.parametrize(
    "code", ["shfl.sync.idx.b32 %o, %a, 0, 31, 255;", "redux.sync.add.u32 %o, %a, 255;", "elect.sync %o|%p1, 255;"]
)
def test_a_lane_outside_of_its_own_mask_is_an_error(code: str) -> None:
    with pytest.raises(ptx_emulator.EmulationError, match="thread 8 of CTA 0 is not in the mask that it names"):
        lanewise(code, [LANES], [np.uint32])


WAITING = """
.shared .align 8 .b8 bar[8];
mov.u32 %r0, bar;
setp.eq.u32 %p0, %tid0, 0; setp.eq.u32 %p1, %tid0, 32; setp.ge.u32 %p2, %tid0, 32;
@%p0 mbarrier.init.shared::cta.b64 [%r0], 1;
bar.sync 0;
@%p2 bra SECOND;
mov.u32 %r5, %tid0;
@!%p0 bra AFTER;
mov.u32 %r5, 77;
W: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r0], 0;
@!%p3 bra W;
AFTER:
EXCHANGE
mul.wide.u32 %d1, %tid0, 4; add.u64 %d1, %d1, %ptr0;
st.global.u32 [%d1], %r6;
bra DONE;
SECOND:
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r0];
DONE:
"""


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize(
    ("code", "want"),
    [
        ("shfl.sync.idx.b32 %r6, %r5, 0, 31, -1;", 77),
        ("setp.ge.u32 %p3, %r5, 1; vote.sync.ballot.b32 %r6, %p3, -1;", 0xFFFFFFFF),
        ("redux.sync.max.u32 %r6, %r5, -1;", 77),
        ("elect.sync %r6|%p3, -1;", 0),
        ("shl.b32 %r7, 1, %tid0; shfl.sync.idx.b32 %r6, %r5, %tid0, 31, %r7; max.u32 %r6, %r6, 77;", 77),
    ],
)
def test_an_exchange_waits_for_a_lane_that_waits_elsewhere(code: str, want: int, seed: int | None) -> None:
    """Lane 0 sleeps at an mbarrier until another warp has come; the others must not exchange without it."""
    out = np.zeros(64, np.uint32)
    report = run(entry(WAITING.replace("EXCHANGE", code), 1), [out], threads=64, seed=seed)
    assert (out[:32] == want).all(), out[:32]
    assert not report.faults


def test_a_lane_that_never_comes_is_a_deadlock() -> None:
    text = WAITING.replace("EXCHANGE", "shfl.sync.idx.b32 %r6, %r5, 0, 31, -1;").replace("%tid0, 32;", "%tid0, 99;", 1)
    told = "31 threads, thread 1 first, that wait for lanes 0xffffffff of their warp"
    with pytest.raises(ptx_emulator.Deadlock, match=told):
        run(entry(text, 1), [np.zeros(64, np.uint32)], threads=64)
