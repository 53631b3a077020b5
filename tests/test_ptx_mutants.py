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
        ("finding", "write-read"), ("error", "Deadlock"), ("finding", "read-write"), ("", ""),
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
    subject, kept = made(name), ptx_mutants.read()
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
        assert ptx_mutants.row_of(subject, judge(subject, wrong, subject.right())) == rows[number]


@pytest.mark.heavy
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_mutant_ends_as_it_did(name: str) -> None:
    subject, _, rows = current(name)
    assert list(ptx_mutants.judged(subject)) == rows


def test_of_each_kernel_95_percent_are_seen_and_the_rest_explained() -> None:
    kept = ptx_mutants.read()
    assert list(kept["made"]) == list(SUBJECTS)
    for name in SUBJECTS:
        ends = [row[5] for row in kept["mutants"] if row[0] == name]
        seen, missed = sum(end in ptx_mutants.CAUGHT for end in ends), ends.count(ptx_mutants.MISSED)
        assert seen / (seen + missed) >= 0.95, name
    assert ptx_mutants.TABLE.read_text() == ptx_mutants.table(kept)


def test_each_rule_explains_something() -> None:
    told = {row[6] for row in ptx_mutants.read()["mutants"]}
    assert [rule.why for rule in mutant_reasons.RULES if rule.why not in told] == []
