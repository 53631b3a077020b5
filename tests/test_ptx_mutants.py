"""Faults planted mechanically: what is planted, how each is judged, and whether the kept table is of these kernels."""

from __future__ import annotations

import random
from functools import cache

import mutant_reasons
import numpy as np
import ptx_emulator
import ptx_mutants
import pytest
from mutant_subjects import NEED_NVCC, SUBJECTS, split_launch
from ptx_emulator import cuda
from ptx_emulator.cuda import Pointer, Record, Tiled
from ptx_emulator.mutants import Mutant, Subject, judge, mutants
from ptx_emulator.mutants.judge import SAME, UNREACHED
from ptx_snippets import entry
from test_ptx_cuda import NVCC

pytest.importorskip("triton", minversion="3.8", reason="the kept table is of kernels of Triton 3.8")

#: Each thread of 64 writes a word, and reads that of the other warp.
EXCHANGE = """
.shared .align 4 .b8 words[256];
mov.u32 %r1, words; mad.lo.u32 %r2, %tid0, 4, %r1; st.shared.b32 [%r2], %tid0;
bar.sync 0, 64;
xor.b32 %r3, %tid0, 32; mad.lo.u32 %r3, %r3, 4, %r1; ld.shared.b32 %r4, [%r3];
mul.wide.u32 %d1, %tid0, 4; add.u64 %d1, %d1, %ptr0; st.global.b32 [%d1], %r4;
bar.sync 0;
"""


def small(code: str = EXCHANGE) -> Subject:
    record = Record(entry(code, 1), "f", (1, 1, 1), (64, 1, 1), (Pointer("y"),), {"y": np.zeros(64, np.uint32)})
    return Subject("small", record, {"y": ""})


def test_what_is_planted_and_what_sees_it() -> None:
    subject = small()
    found = {(m.change, m.line): judge(subject, m, subject.right()) for m in mutants(subject.record)}
    assert [change for change, _ in found] == ["deleted", "32 threads more", "32 threads fewer", "deleted"]
    assert [(v.how, v.by) for v in found.values()] == [
        ("finding", "write-read"), ("error", "Deadlock"), ("finding", "write-read"), ("", ""),
    ]  # fmt: skip
    assert all(v.mutant.instruction.startswith("bar.sync 0") for v in found.values())


def test_a_change_of_nothing_is_told_from_one_that_nothing_saw() -> None:
    """Twice no bytes are no bytes; two bytes more are, though nobody waits for them; the last guard holds nowhere."""
    code = """
    .shared .align 8 .b8 at[8];
    mov.u32 %r1, at; mov.u32 %r2, 0; setp.eq.u32 %p1, %tid0, 0; setp.gt.u32 %p2, %tid0, 99;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
    @%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], %r2;
    @%p2 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], %r2;
    mul.wide.u32 %d1, %tid0, 4; add.u64 %d1, %d1, %ptr0; st.global.b32 [%d1], %tid0;
    """
    subject = small(code)
    planted = [m for m in mutants(subject.record) if m.family == "expected bytes"]
    found = [(m.change, judge(subject, m, subject.right())) for m in planted]
    assert [(change, verdict.how, verdict.by) for change, verdict in found] == [
        ("bytes + 1", "", ""),
        ("bytes - 1", "error", "EmulationError"),
        ("bytes x 2", "", SAME),
        ("bytes / 2", "", SAME),
        *((change, "", UNREACHED) for change, _ in found[:4]),
    ]


#: %r9: an mbarrier, %r3: the CTA's rank, %p1: thread 0, %p2: threads 0 and 1
CLUSTER = """
.shared .align 8 .b8 at[8]; .shared .align 4 .b8 word[4];
mov.u32 %r9, at; mov.u32 %r3, %cluster_ctarank; setp.eq.u32 %p1, %tid0, 0; setp.lt.u32 %p2, %tid0, 2;
"""
MADE = "@%p1 mbarrier.init.shared::cta.b64 [%r9], 2; @%p1 fence.mbarrier_init.release.cluster; "
MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; "
ARRIVE = (
    "@%p2 mapa.shared::cluster.u32 %r5, %r9, %tid0; @%p2 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5]; "
)
END = "$W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p5, [%r9], 0; @!%p5 bra $W; " + MEET


def told(rule: mutant_reasons.Check, code: str, family: str, change: str, instruction: str = "") -> bool:
    """What a rule says of the first such mutant of a kernel of two CTAs, 64 threads each, that nothing sees."""
    text = entry(CLUSTER + code, 1, directives=".explicitcluster\n.reqnctapercluster 2\n")
    record = Record(text, "f", (2, 1, 1), (64, 1, 1), (Pointer("y"),), {"y": np.zeros(64, np.uint32)})
    subject = Subject("small", record, {"y": ""})
    wanted = [m for m in mutants(record) if (m.family, m.change) == (family, change) and instruction in m.instruction]
    return rule(subject, wanted[0])


@pytest.mark.parametrize(
    ("code", "holds"),
    [
        (MADE + MEET + ARRIVE + END, True),
        (MADE + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r9]; " + MEET + ARRIVE + END, True),
        ("st.shared.b32 [word], 1; " + MADE + MEET + ARRIVE + END, False),
        (MADE + "st.shared.b32 [word], 1; " + MEET + ARRIVE + END, False),
        (MADE + "@%p1 ld.global.b32 %r6, [%ptr0]; " + MEET + ARRIVE + END, False),
        (MADE.partition("@%p1 fence")[0] + MEET + ARRIVE + END, False),
        ("$L: " + MADE + MEET + ARRIVE + END + "add.u32 %r7, %r7, 1; setp.lt.u32 %p4, %r7, 0; @%p4 bra $L;", False),
        (MADE + MEET, False),  # nobody uses what was made, so the emulator does not look whether it may
    ],
)
def test_when_a_barrier_of_the_cluster_need_not_release(code: str, holds: bool) -> None:
    code = code if "arrive.shared::cta" not in code else code.replace("[%r9], 2;", "[%r9], 3;", 1)
    assert told(mutant_reasons.releases_inits_alone, code, "order", "relaxed", "barrier.cluster") == holds


FENCE = "@%p1 fence.mbarrier_init.release.cluster; "
BARE = MADE.replace(FENCE, "")


@pytest.mark.parametrize(
    ("code", "holds"),
    [
        (BARE + MEET + FENCE + ARRIVE + END, True),
        (BARE + FENCE + MEET + ARRIVE + END, False),
        (BARE + MEET.replace(".release", ".relaxed") + FENCE + ARRIVE + END, False),
        (BARE + "@%p1 bra $O; " + MEET + "$O: " + FENCE + ARRIVE + END, False),
        (MEET + BARE + MEET + FENCE + ARRIVE + END, False),
        (BARE + FENCE + MEET + FENCE.replace("@%p1", "@%p2") + ARRIVE + END, False),  # the first fence has shown them
    ],
)
def test_when_inits_were_released_before_the_fence(code: str, holds: bool) -> None:
    at = "@%p2 fence" if "@%p2 fence" in code else "fence"
    assert told(mutant_reasons.inits_are_released, code, "fence", "deleted", at) == holds


@pytest.mark.parametrize(
    ("instead", "holds"),
    [
        ({}, True),
        (
            {"setp.lt.u32 %p2, %tid0, 2": "and.b32 %r4, %tid0, 31; setp.lt.u32 %p2, %r4, 1; shr.u32 %tid0, %tid0, 5"},
            False,
        ),
        ({ARRIVE: "st.shared.b32 [word], %tid0; " + ARRIVE}, False),
        ({"[%r9], 2;": "[%r9], 4;", ARRIVE: ARRIVE + "@%p2 mbarrier.arrive.shared::cta.b64 _, [%r9]; "}, True),
        ({"%tid0; @%p2 mbarrier": "%r3; @%p2 mbarrier"}, False),
    ],
)
def test_when_lanes_swap_their_mbarriers(instead: dict[str, str], holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lanes of a warp; of two warps; behind an access; with more arrivals beside; both at the own CTA's."""
    setup, code = CLUSTER, MADE + MEET + ARRIVE + END
    for old, new in instead.items():
        assert old in setup + code
        setup, code = setup.replace(old, new), code.replace(old, new, 1)
    monkeypatch.setitem(globals(), "CLUSTER", setup)
    assert told(mutant_reasons.same_arrivals, code, "rank", "bit 1 flipped") == holds


@pytest.mark.parametrize(
    ("between", "holds"),
    [
        ("", True),
        ("bra.uni $J; trap; $J: ", True),
        ("bra.uni $J; $K: trap; $J: mov.u32 %r5, 1; ", False),
        ("@%p1 bra $J; $J: ", False),
    ],
)
def test_when_a_barrier_of_the_cluster_stands_behind_that_of_a_warp(between: str, holds: bool) -> None:
    code = MADE + "bar.warp.sync -1; " + between + MEET + ARRIVE + END
    assert told(mutant_reasons.followed_by(r"barrier\.cluster\.arrive"), code, "barrier", "deleted", "warp") == holds


def test_when_no_box_reaches_what_a_field_of_a_map_says() -> None:
    """Of the mutants of a tensor's size that run through, those of which the kept rows say so."""
    subject, planted, rows = current("gluon_kernels.py")
    ends = (ptx_mutants.EQUIVALENT, "wrong values")
    some = [(m, row) for m, row in zip(planted, rows, strict=True) if "global_dim" in m.instruction and row[5] in ends]
    found = [mutant_reasons.same_boxes(subject, m) for m, _ in some]
    assert found == [row[5] == ptx_mutants.EQUIVALENT for _, row in some]
    assert {True, False} == set(found)


def test_values_of_a_tensor_map() -> None:
    """A field at a time; a map that the driver would refuse is a refused launch."""
    tile = Tiled(Pointer("y"), "u32", (8, 8), (32,), (8, 8))
    record = Record("", "f", (1, 1, 1), (32, 1, 1), (3, tile), {"y": np.zeros(64, np.uint32)})
    found = {m.change: m.record.arguments[1] for m in mutants(record)}
    assert {"swizzle 128", "box[0] x 2", "strides[0] - 16", "sizes[1] + 1", "start + 16"} <= set(found)
    assert len(found) == 3 + 4 + 3 + 4 + 1
    assert all(other != tile for other in found.values())
    assert found["box[1] / 2"] == Tiled(Pointer("y"), "u32", (8, 8), (32,), (8, 4))


@pytest.mark.parametrize("landing", ["late", "early"])
def test_the_split_kernel_is_right(landing: str) -> None:
    record, exact = split_launch(made("split.cu").record.ptx)
    assert cuda.run(record, landing=landing).faults == []
    for name, want in exact.items():
        assert np.abs(record.buffers[name] - want).max() < 1e-4, "sums of 312 products in float32"


@cache
def made(name: str) -> Subject:
    if name in NEED_NVCC and NVCC is None:
        pytest.skip("no nvcc: a CUDA toolkit compiles this kernel")
    return SUBJECTS[name]()


def current(name: str) -> tuple[Subject, list[Mutant], list[ptx_mutants.Row]]:
    """(the kernel, its mutants, their kept rows)."""
    subject, kept = made(name), ptx_mutants.PTX.read()
    if kept["made"][name]["compiler"] != ptx_mutants.compiler(subject):
        pytest.skip(f"the rows are of {kept['made'][name]['compiler']}, this is {ptx_mutants.compiler(subject)}")
    return subject, mutants(subject.record), [row for row in kept["mutants"] if row[0] == name]


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_kept_rows_are_of_this_kernel(name: str) -> None:
    """As many mutants as the mutator makes now, the same ones; a few of them, drawn by a seed, end as they did."""
    subject, planted, rows = current(name)
    assert [row[1:5] for row in rows] == [[m.family, m.line, m.instruction[:110], m.change] for m in planted]
    for number in random.Random(2026).sample(range(len(rows)), 3):
        wrong = planted[number]
        assert ptx_emulator.parse(wrong.record.ptx).kernels
        assert ptx_mutants.row_of(subject, judge(subject, wrong, subject.right(), mutant_reasons.proof)) == rows[number]


@pytest.mark.heavy
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_mutant_ends_as_it_did(name: str) -> None:
    subject, _, rows = current(name)
    assert ptx_mutants.judged(subject) == rows


def test_every_fault_is_seen_or_explained() -> None:
    kept = ptx_mutants.PTX.read()
    assert list(kept["made"]) == list(SUBJECTS)
    assert {row[0] for row in kept["mutants"]} == set(SUBJECTS)
    assert [row for row in kept["mutants"] if row[5] == ptx_mutants.MISSED] == []
    assert ptx_mutants.PTX.table.read_text() == ptx_mutants.PTX.made_table(kept)


def test_each_rule_explains_something() -> None:
    told = {row[6] for kept in (ptx_mutants.PTX, ptx_mutants.CUDA) for row in kept.read()["mutants"]}
    assert [rule.why for rule in mutant_reasons.RULES if rule.why not in told] == []
