"""Triton's launches run in emulation: memory of the tensors, results, faults, planted faults."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cache import offline
from ptx_emulator.targets import target
from ptx_emulator.triton.checker import Checker
from ptx_emulator.triton.driver import Argument, Launch
from ptx_emulator.triton.launcher import EmulationFault, Emulator, memory_of, place, spans
from triton_kernels import EMULATED, pieces_kernel, product, reverse_kernel, scale, scale_kernel, strayed_kernel

from cast_kernels import evidence
from cast_kernels.evidence import mutants as planting
from cast_kernels.evidence.cases import poisoned_memory

TARGETS = ("sm_80", "sm_90")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def pointer(tensor: torch.Tensor, name: str = "x") -> Argument:
    return Argument(name, "*fp32", tensor)


class Memory:
    """Keeps what is registered."""

    def __init__(self) -> None:
        self.registered: list[tuple[int, str, int]] = []

    def register(self, array: np.ndarray, name: str, offset: int) -> int:
        self.registered.append((array.size, name, offset))
        return 0x10000 * len(self.registered) + offset


def test_a_span_is_what_the_view_touches() -> None:
    x = torch.zeros(10, 8)
    for view, first, last in ((x, 0, 79), (x[2:4], 16, 31), (x[:, 1], 1, 73), (x[3:5, 2:4], 26, 35), (x.t(), 0, 79)):
        (span,) = spans([pointer(view)])
        assert (span.start, span.stop) == (x.data_ptr() + 4 * first, x.data_ptr() + 4 * last + 4)
        assert memory_of(span).size == 4 * (last + 1 - first)


def test_memory_is_the_tensor_itself() -> None:
    x = torch.zeros(4)
    memory_of(spans([pointer(x)])[0]).view(np.float32)[2] = 7
    assert x.tolist() == [0, 0, 7, 0]


def test_overlapping_views_are_one_buffer_and_neighbours_are_not() -> None:
    x = torch.zeros(64)
    parts = [pointer(x[:16], "a"), pointer(x[8:32], "b"), pointer(x[32:48], "c"), pointer(x[20:24], "d")]
    found = spans([*parts, Argument("n", "i32", 5)])
    assert [(s.start - x.data_ptr(), s.stop - x.data_ptr(), s.names) for s in found] == [
        (0, 128, ("a", "b", "d")), (128, 192, ("c",)),
    ]  # fmt: skip


def test_addresses_keep_the_views_alignment() -> None:
    x, memory = torch.zeros(1024), Memory()
    values = place(memory, (pointer(x[100:200], "a"), Argument("n", "i32", 5), pointer(x[120:130], "b")))
    assert memory.registered == [(400, "a+b", 400 % 256)]
    assert values == [0x10000 + 144, 5, 0x10000 + 144 + 80]


def test_an_empty_tensor_has_no_memory() -> None:
    memory = Memory()
    assert place(memory, (pointer(torch.zeros(0)),)) == [0]
    assert memory.registered == []


def test_a_pointer_must_be_a_tensor_on_the_cpu() -> None:
    for wrong in (torch.zeros(3, device="meta"), 4096):
        with pytest.raises(TypeError, match=r"argument x \(\*fp32\) is .*CPU"):
            spans([Argument("x", "*fp32", wrong)])


@pytest.mark.parametrize("name", EMULATED)
def test_results_are_right(name: str) -> None:
    x, a, b = random(300), random(100, 96), random(96, 64)
    with offline(target(name), Emulator()) as emulator, poisoned_memory():
        scaled, multiplied = scale(x, 1.5), product(a, b)
    assert torch.equal(scaled, x.float() * 1.5)
    exact = a.double() @ b.double()
    assert (multiplied - exact).abs().max() < 1e-5 * exact.abs().max()
    runs = emulator.runs["product_kernel"]
    assert (runs.launches, runs.ctas) == (1, 2)
    assert runs.counters["tensor_flops"] == 2 * 128 * 96 * 64
    assert emulator.runs["scale_kernel"].counters["tensor_flops"] == 0


def test_views_with_gaps_are_read_and_written_in_place() -> None:
    whole, out = random(400, dtype=torch.float32), torch.full((400,), -1.0)
    with offline(target("sm_80"), Emulator()):
        scale_kernel[(1,)](whole[50:150], out[60:160], 2.0, 100, BLOCK=128)
    assert torch.equal(out[60:160], whole[50:150] * 2)
    assert (out[:60] == -1).all()
    assert (out[160:] == -1).all()


@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_an_access_that_strays_meets_the_same_wherever_the_tensors_lie(rows: tuple[int, ...]) -> None:
    """Nothing between the first and the second argument, the third 9216 bytes behind the first."""
    block = torch.zeros(3, 128)
    x, y, z = (block[row] for row in rows)
    z.copy_(torch.arange(128.0))
    with offline(target("sm_80"), Emulator()):
        strayed_kernel[(1,)](x, y, z, 2304, BLOCK=128)
        assert torch.equal(y, z)
        with pytest.raises(EmulationFault, match=r"at 0x1000010a0 .*\(byte -608 of 'y', which has 512\)"):
            strayed_kernel[(1,)](x, y, z, 1000, BLOCK=128)


@pytest.mark.parametrize(("n", "grid"), [(301, 3), (300, 4)])
def test_touching_more_than_the_view_is_a_fault(n: int, grid: int) -> None:
    """The tensor's storage goes on behind the view; the kernel may not."""
    x, y = random(1024), torch.empty(1024)
    with offline(target("sm_80"), Emulator()):
        if n == 300:
            scale_kernel[(grid,)](x[:300], y[:300], 2.0, n, BLOCK=128)  # a CTA too many, all masked: no fault
        else:
            with pytest.raises(EmulationFault, match=r"scale_kernel on sm_80, grid .*: MemoryFault") as caught:
                scale_kernel[(grid,)](x[:300], y[:300], 2.0, n, BLOCK=128)
            assert caught.value.kinds == ("MemoryFault",)


def test_a_misaligned_access_is_a_fault() -> None:
    """16-byte vectors, compiled for aligned pointers, on one that is not: launched past Triton's own check."""
    captured: list[Launch] = []
    x, y = random(256, dtype=torch.float32), torch.empty(257)
    with offline(target("sm_80"), SimpleNamespace(enforces_limits=True, launch=captured.append)):
        scale_kernel[(1,)](x, y[:256], 2.0, 256, BLOCK=256)
    (launch,) = captured
    moved = tuple(a._replace(value=y[1:]) if a.name == "y" else a for a in launch.arguments)
    with pytest.raises(EmulationFault) as caught:
        Emulator().launch(dataclasses.replace(launch, arguments=moved))
    assert caught.value.kinds == ("Misaligned",)


def without(instruction: str) -> Any:
    """PTX without every line that holds the instruction."""
    return lambda launch: "\n".join(line for line in launch.asm["ptx"].splitlines() if instruction not in line)


@pytest.mark.parametrize("name", TARGETS)
def test_a_race_is_a_fault(name: str) -> None:
    with offline(target(name), Emulator(without("bar.sync"))), pytest.raises(EmulationFault, match="write-read"):
        product(random(100, 96), random(96, 64))


def test_what_the_emulator_lacks_is_no_fault_of_the_kernel() -> None:
    def edit(launch: Launch) -> str:
        return launch.asm["ptx"].replace("ret;", "frobnicate.u32 %r1, %r1;\n\tret;")

    with offline(target("sm_80"), Emulator(edit)), pytest.raises(RuntimeError, match="frobnicate") as caught:
        scale(random(300), 2.0)
    assert not isinstance(caught.value, EmulationFault)


def test_a_missing_emulator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(evidence, "__file__", "/a/b/c/d.py")
    with pytest.raises(ModuleNotFoundError, match="not whole; install it again"):
        evidence.find_emulator()


def test_mutants_take_one_thing_away_each() -> None:
    ptx = """
	bar.sync 	0;
	@%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
	@!%p2 st.global.b32 [ %rd1 + 0 ], { %r1 };
	cp.async.cg.shared.global [ %r42 + 0 ], [ %rd4 + 0 ], 0x10, %r43;
	cp.async.wait_group 	2;
	wgmma.wait_group.sync.aligned 0;
	fence.proxy.async.shared::cta;
	@%p3 bra 	$L__BB0_3;
"""
    found = list(planting.mutants("k", ptx))
    assert [(m.kind, m.line) for m in found] == [
        ("barrier", 2), ("mask of a load", 3), ("mask of a store", 4), ("mask of a copy", 5), ("wait", 6), ("wait", 7),
        ("proxy fence", 8),
    ]  # fmt: skip
    lines = [m.text.splitlines()[m.line - 1].strip() for m in found]
    assert lines == [
        "", "ld.global.b32 { %r1 }, [ %rd1 + 0 ];", "st.global.b32 [ %rd1 + 0 ], { %r1 };",
        "cp.async.cg.shared.global [ %r42 + 0 ], [ %rd4 + 0 ], 0x10;", "", "", "",
    ]  # fmt: skip
    for m in found:
        changed = [i for i, (a, b) in enumerate(zip(ptx.splitlines(), m.text.splitlines(), strict=True)) if a != b]
        assert changed == [m.line - 1]


@pytest.mark.parametrize("name", EMULATED)
def test_planted_faults_are_caught(name: str) -> None:
    emulator = planting.CapturingEmulator()
    with offline(target(name), emulator), poisoned_memory():
        product(random(100, 96), random(96, 64))
        (capture,) = emulator.captures.values()
        planted = list(planting.mutants("product_kernel", capture.launch.asm["ptx"]))
        verdicts = [planting.try_mutant(capture, mutant) for mutant in planted]
        unchanged = planting.try_mutant(capture, dataclasses.replace(planted[0], text=capture.launch.asm["ptx"]))
    assert (unchanged.caught_by, unchanged.change) == ("", 0.0)
    caught = {v.mutant.kind for v in verdicts if v.caught_by}
    assert {"barrier", "wait", "mask of a store", "mask of a copy"} <= caught
    assert sum(bool(v.caught_by) for v in verdicts) > len(verdicts) / 2
    assert {v.why for v in verdicts} <= {"", *planting.HARMLESS}


def test_every_reason_that_is_given_for_a_kind_counts_as_harmless() -> None:
    assert set(planting._ORDER.values()) <= set(planting.HARMLESS)


@pytest.mark.parametrize(("n", "why"), [(256, "guard never false"), (300, "")])
def test_a_guard_is_probed(n: int, why: str) -> None:
    """Of two CTAs of 128 elements no lane is masked; of three, 84 lanes are, and without the mask they fault."""
    emulator = planting.CapturingEmulator()
    with offline(target("sm_80"), emulator):
        scale(random(n), 2.0)
        (capture,) = emulator.captures.values()
        planted = list(planting.mutants("scale_kernel", capture.launch.asm["ptx"]))
        verdicts = [planting.try_mutant(capture, m) for m in planted]
        probes = [planting.probe(m) for m in planted]
        faults = [planting._run(capture, p, "interpreter")[0] for p in probes if p]
    assert {v.mutant.kind for v in verdicts} == {"mask of a load", "mask of a store"}
    assert {(v.why, v.caught_by) for v in verdicts} == {(why, "" if why else "MemoryFault")}
    assert len(faults) == len(planted)
    assert all((fault == "") == bool(why) for fault in faults)


def test_a_store_to_a_wrong_place_is_seen_where_a_later_one_makes_it_good() -> None:
    """Without their mask, lanes of a piece of 100 store into the next piece, whose own CTA happens to run later."""
    emulator = planting.CapturingEmulator()
    with offline(target("sm_80"), emulator):
        pieces_kernel[(4,)](random(428), torch.zeros(428), 100, BLOCK=128)
        (capture,) = emulator.captures.values()
        planted = list(planting.mutants("pieces_kernel", capture.launch.asm["ptx"]))
        (store,) = [mutant for mutant in planted if mutant.kind == "mask of a store"]
        assert planting._run(capture, store, None) == ("", 0.0)
        assert planting.try_mutant(capture, store).caught_by == "values"


def test_lanes_that_store_what_another_lane_stores_are_harmless() -> None:
    emulator = planting.CapturingEmulator()
    with offline(target("sm_80"), emulator):
        scale(random(64), 2.0, block=64)  # in 128 lanes
        (capture,) = emulator.captures.values()
        planted = planting.mutants("scale_kernel", capture.launch.asm["ptx"])
        (store,) = [mutant for mutant in planted if mutant.kind == "mask of a store"]
        verdict = planting.try_mutant(capture, store)
    assert (verdict.caught_by, verdict.why) == ("", "stores what another lane stores")


def test_a_masked_load_that_stays_inside_is_told_from_one_that_masks_nothing() -> None:
    whole = random(384)
    emulator = planting.CapturingEmulator()
    with offline(target("sm_80"), emulator):
        scale_kernel[(3,)](whole, torch.zeros(300), 2.0, 300, BLOCK=128)
        (capture,) = emulator.captures.values()
        planted = list(planting.mutants("scale_kernel", capture.launch.asm["ptx"]))
        verdicts = [planting.try_mutant(capture, m) for m in planted]
    found = {(v.mutant.kind, v.caught_by, v.why) for v in verdicts}
    assert found == {("mask of a load", "", "reads inside, uses nothing"), ("mask of a store", "MemoryFault", "")}


def ending(code: str) -> Any:
    """A kernel's PTX with more at its end. %mine0: the thread's number; `clash`: 512 bytes of shared memory."""
    code = "{ .reg .b32 %mine<4>; .reg .pred %warp<2>; mov.u32 %mine0, %tid.x; " + code + " }\n"

    def edit(launch: Launch) -> str:
        head, start, body = launch.asm["ptx"].partition(".visible .entry")
        return head + ".shared .align 4 .b8 clash[512];\n" + start + body.replace("ret;", code + "ret;")

    return edit


def clashing(one: int, other: int) -> Any:
    """At the end warps 0 and 1 write a number each to one word of shared memory."""
    return ending(
        f"setp.lt.u32 %warp0, %mine0, 32; setp.lt.u32 %warp1, %mine0, 64; selp.b32 %mine1, {one}, {other}, %warp0; "
        "@%warp1 st.shared.b32 [clash], %mine1;"
    )


def test_the_order_of_lanes_is_looked_at_where_it_is_asked_for() -> None:
    """Each thread writes its word and reads its neighbour's: by a launcher that raises, and by one that collects."""
    edit = ending(
        "shl.b32 %mine1, %mine0, 2; mov.u32 %mine2, clash; add.u32 %mine1, %mine1, %mine2; "
        "st.shared.b32 [%mine1], %mine0; xor.b32 %mine1, %mine1, 4; ld.shared.b32 %mine3, [%mine1];"
    )
    kind = "write-read between lanes of a warp that have not met"
    for asked in (False, True):
        checker = Checker(target("sm_80"), lane_order=asked)
        checker._ptx = edit
        with offline(target("sm_80"), checker):
            scale(random(300), 2.0)
        assert [finding.kind for finding in checker.findings] == ([kind] if asked else [])
    with offline(target("sm_80"), Emulator(edit)):
        scale(random(300), 2.0)
    with offline(target("sm_80"), Emulator(edit, lane_order=True)), pytest.raises(EmulationFault, match=kind):
        scale(random(300), 2.0)


@pytest.mark.parametrize(
    ("one", "other", "kind", "fails"),
    [
        (0x3F800000, 0x3F800000, "write-write of the same value", False),
        (0x3F800000, 0x3F800002, "write-write of values that differ by rounding", True),
        (9437184, 9437185, "write-write of values that differ by rounding", True),  # two integers, it may be
        (5, 6, "write-write", True),
    ],
)
def test_values_that_differ_fail_our_kernels_launches(one: int, other: int, kind: str, fails: bool) -> None:
    """By rounding too, which for other people's kernels is a note, counted by its kind."""
    with offline(target("sm_80"), Emulator(clashing(one, other))):
        if fails:
            with pytest.raises(EmulationFault) as caught:
                scale(random(300), 2.0)
            assert caught.value.kinds == (kind,)
        else:
            torch.testing.assert_close(scale(random(300), 2.0), 2 * random(300).float())
    checker = Checker(target("sm_80"))
    checker._ptx = clashing(one, other)
    with offline(target("sm_80"), checker):
        scale(random(300), 2.0)
    noted = kind != "write-write"
    assert checker.noted == ({kind: 1} if noted else {})
    assert [finding.kind for finding in checker.findings] == ([] if noted else [kind])
    assert (f"\nnotes: 1 {kind}\n" in checker.text()) == noted
    assert checker.as_json()["noted"] == dict(checker.noted)


def test_a_barrier_that_no_check_knows_of_is_missed_where_warps_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It separates accesses to global memory, which no check orders; in program order each warp finds all written."""
    emulator = planting.CapturingEmulator()
    with offline(target("sm_80"), emulator):
        reverse_kernel[(1,)](torch.zeros(128), torch.zeros(128), BLOCK=128)
        (capture,) = emulator.captures.values()
        (barrier,) = [m for m in planting.mutants("reverse_kernel", capture.launch.asm["ptx"]) if m.kind == "barrier"]
        seen = planting.try_mutant(capture, barrier)
        monkeypatch.setattr(planting, "SEEDS", ())
        unseen = planting.try_mutant(capture, barrier)
    assert (seen.caught_by, seen.why) == ("values", "")
    assert (unseen.caught_by, unseen.why) == ("", "separates nothing")
