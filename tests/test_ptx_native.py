"""The native engine against the interpreter, which is the definition. The tests of small PTX compare them as well."""

import gc
import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import engines
import numpy as np
import ptx_emulator
import pytest
from ptx_emulator.core.findings import NEAR, SAME, UNWRITTEN
from ptx_emulator.core.launch import ENGINES
from ptx_emulator.core.program import compile_kernel
from ptx_emulator.native.liveness import Accesses, place
from ptx_snippets import entry, run

import cast_kernels._native


def native(text: str, arrays: list[np.ndarray], **options: object) -> ptx_emulator.Report:
    """Launch the only kernel of `text` by the native engine alone."""
    (kernel,) = ptx_emulator.parse(text).kernels.values()
    memory = ptx_emulator.Memory()
    addresses = [memory.register(array.view(np.uint8).reshape(-1), name=f"x{i}") for i, array in enumerate(arrays)]
    report = ptx_emulator.launch(
        kernel, grid=(2, 1, 1), threads=64, arguments=addresses, memory=memory, engine="native", **options
    )  # type: ignore[arg-type]
    memory.write_back()
    return report


def test_the_machine_is_built_where_the_native_core_is() -> None:
    if cast_kernels._native.RECORD.get("cpu", {}).get("built"):
        assert engines.built()


needs_machine = pytest.mark.skipif(not engines.built(), reason="the vector machine is not built")


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of interpreter, native"):
        run(entry("", 0), [], engine="fast")


@pytest.mark.parametrize("engine", [name for name, kind in ENGINES.items() if kind.built()])
def test_a_batch_leaves_no_memory_to_the_collector_of_cycles(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch of a launch finds the memory of the one before free."""
    kind, left = ENGINES[engine], []
    run_batch = kind.run

    def run_and_look(machine: Any, first: int = 0) -> None:
        assert [one() for one in left] == [None] * len(left)
        left.extend([weakref.ref(machine), weakref.ref(machine.checker), weakref.ref(machine.shared)])
        run_batch(machine, first)

    monkeypatch.setattr(kind, "run", run_and_look)
    monkeypatch.setattr(kind, "lanes_of_batch", lambda *_: 64)
    (kernel,) = ptx_emulator.parse(entry("bar.sync 0;", 0)).kernels.values()
    memory = ptx_emulator.Memory()
    gc.disable()
    try:
        ptx_emulator.launch(kernel, grid=(3, 1, 1), threads=64, arguments=[], memory=memory, engine=engine)
    finally:
        gc.enable()
    assert len(left) == 9
    assert [one() for one in left] == [None] * 9


@needs_machine
def test_a_launch_that_names_no_engine_takes_the_quickest_that_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel,) = ptx_emulator.parse(entry("", 0)).kernels.values()

    def engine() -> str:
        return ptx_emulator.launch(
            kernel, grid=(1, 1, 1), threads=32, arguments=[], memory=ptx_emulator.Memory()
        ).engine

    assert (engine(), ptx_emulator.default_engine()) == ("native", "native")
    monkeypatch.setattr(ENGINES["native"], "built", lambda: False)
    assert (engine(), ptx_emulator.default_engine()) == ("interpreter", "interpreter")


@needs_machine
def test_a_report_tells_what_was_interpreted() -> None:
    """lg2 has no code: two CTAs of two warps interpret it once each, and the value is the interpreter's."""
    code = """
    mad.wide.u32 %d1, %tid0, 4, %ptr0;
    ld.global.b32 %r1, [%d1];
    lg2.approx.f32 %f1, %r1;
    add.f32 %f1, %f1, 0f3F800000;
    st.global.b32 [%d1], %f1;
    """.replace("lg2.approx.f32 %f1, %r1", "mov.b32 %f2, %r1; lg2.approx.f32 %f1, %f2")
    values = np.arange(1, 65, dtype=np.float32)
    report = native(entry(code, 1), [values])
    assert report.engine == "native"
    assert dict(report.interpreted) == {"lg2": 4}
    assert values[7] == 4
    first = np.arange(1, 65, dtype=np.float32)
    again = run(entry(code, 1), [first], threads=64)
    assert (again.engine, dict(again.interpreted)) == ("interpreter", {})


@needs_machine
@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_planted_race_is_found_alike(barrier: str) -> None:
    """Thread t writes word t and reads word t + 32 (mod 64), another warp's; `run` compares the findings."""
    code = f"""
    shl.b32 %r1, %tid0, 2;
    mov.b32 %r2, s;
    add.u32 %r3, %r2, %r1;
    st.shared.b32 [%r3], %tid0;
    {barrier}
    xor.b32 %r4, %r1, 128;
    add.u32 %r4, %r4, %r2;
    ld.shared.b32 %r5, [%r4];
    mad.wide.u32 %d1, %tid0, 4, %ptr0;
    st.global.b32 [%d1], %r5;
    """
    text = entry(code, 1, outside=".shared .align 16 .b8 s[256];")
    out = np.zeros(64, np.uint32)
    report = run(text, [out], threads=64)
    assert {fault.kind for fault in report.faults} == (set() if barrier else {"write-read"})
    engines.compare(native(text, [out]), report)


#: Both warps write one word: the same value in CTA 0, others in CTA 1.
CLASH = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; setp.lt.u32 %p2, %tid0, 32; and.pred %p1, %p1, %p2;
selp.b32 %r2, {0}, 0x3F800000, %p1; st.shared.b32 [s], %r2;"""


@needs_machine
@pytest.mark.parametrize(("other", "worst"), [("5", "write-write"), ("0x3F800001", NEAR)])
def test_what_the_native_engine_may_note_beyond_the_interpreter(other: str, worst: str) -> None:
    """That values agree in a CTA, where those of another CTA do not; nothing else, nothing less, and not of one CTA."""
    text = entry(CLASH.format(other), 0, outside=".shared .align 4 .b8 s[4];")
    (kernel,) = ptx_emulator.parse(text).kernels.values()
    ours, theirs = (
        ptx_emulator.launch(
            kernel, grid=(2, 1, 1), threads=64, arguments=[], memory=ptx_emulator.Memory(), engine=engine
        )
        for engine in ("native", "interpreter")
    )
    assert [fault.kind for fault in theirs.faults + theirs.notes] == [worst]
    assert {fault.kind for fault in ours.faults + ours.notes} == {worst, SAME}
    engines.compare(ours, theirs)
    same = next(note for note in ours.notes if note.kind == SAME)
    for wrong, right in (
        (replace(ours, ctas=1), theirs),
        (replace(ours, notes=[replace(same, kind=UNWRITTEN)]), theirs),
        (replace(ours, notes=[replace(same, other="st.shared.b32 [s], 1")]), theirs),
        (replace(ours, faults=[], notes=[same]), theirs),
        (ours, replace(theirs, faults=[], notes=[same])),
        (ours, replace(theirs, notes=[replace(same, kind=UNWRITTEN)])),
    ):
        with pytest.raises(AssertionError):
            engines.compare(wrong, right)


@needs_machine
@pytest.mark.parametrize(
    ("code", "error", "told"),
    [
        ("ld.global.b32 %r1, [%d1+4096];", ptx_emulator.MemoryFault, "outside every buffer"),
        ("ld.global.b32 %r1, [%d1+2];", ptx_emulator.Misaligned, "no multiple of 4"),
        ("st.shared.b32 [s+256], %tid0;", ptx_emulator.MemoryFault, "outside the CTA's"),
    ],
)
def test_an_error_is_told_in_the_interpreters_words(code: str, error: type[Exception], told: str) -> None:
    text = entry(f"mov.b64 %d1, %ptr0; {code}", 1, outside=".shared .align 16 .b8 s[256];")
    with pytest.raises(error, match=re.escape(told)) as ours:
        native(text, [np.zeros(64, np.uint32)])
    with pytest.raises(error) as theirs:
        run(text, [np.zeros(64, np.uint32)], grid=2, threads=64)
    assert str(ours.value) == str(theirs.value)


@needs_machine
@pytest.mark.slow
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_levels_agree_too(level: str) -> None:
    """What has vector code of its own, in a process that asks for another level."""
    environment = os.environ | {"CAST_KERNELS_CPU_ISA": level}
    code = "from ptx_emulator.native.library import library; print(library().level)"
    folder = Path(__file__).parent
    search = environment | {"PYTHONPATH": str(folder.parent / "tools")}
    used = subprocess.run([sys.executable, "-c", code], env=search, capture_output=True, text=True, check=True)
    assert used.stdout.strip() in (level, "baseline")
    files = [str(folder / f"test_ptx_{name}.py") for name in ("matrix", "wgmma", "checks", "copies", "integer")]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def units_apart(code: str, *inputs: np.ndarray) -> np.ndarray:
    """By how many units of the last place the engines' results differ. The code makes %f1 of %f1 to %f3."""
    loads = "".join(
        f"mad.wide.u32 %d{i}, %r1, 4, %ptr{i}; ld.global.b32 %f{i + 1}, [%d{i}];" for i in range(len(inputs))
    )
    text = f"mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 128, %tid0; {loads} {code} st.global.b32 [%d0], %f1;"
    (kernel,) = ptx_emulator.parse(entry(text, len(inputs))).kernels.values()
    found = []
    for engine in ("native", "interpreter"):
        values, memory = [array.copy() for array in inputs], ptx_emulator.Memory()
        arguments = [memory.register(array.view(np.uint8)) for array in values]
        grid = (len(values[0]) // 128, 1, 1)
        ptx_emulator.launch(kernel, grid=grid, threads=128, arguments=arguments, memory=memory, engine=engine)
        memory.write_back()
        found.append(values[0].view(np.int32).astype(np.int64))
    return np.abs(found[0] - found[1])


@needs_machine
def test_powers_of_two_differ_by_one_unit_at_most() -> None:
    """ex2 is a series here and NumPy's exp2 there, both in float64: they may part where a value lies within their
    rounding of the middle between two floats. None of these million does."""
    rng = np.random.default_rng(0)
    edges = [0, -0.0, np.inf, -np.inf, np.nan, 1e-40]
    inputs = np.concatenate([rng.uniform(-160, 140, 1 << 20), edges]).astype(np.float32)
    apart = units_apart("ex2.approx.f32 %f1, %f1;", np.resize(inputs, (len(inputs) + 127) // 128 * 128))
    assert apart.max() <= 1
    assert np.count_nonzero(apart) == 0


@needs_machine
def test_a_tiny_sum_differs_by_one_unit_at_most() -> None:
    """The interpreter's fused multiply-add rounds to float64 first, which is seen in results without all their bits."""
    rng = np.random.default_rng(1)
    factors = [(rng.standard_normal(1 << 18) * 2.0**-67).astype(np.float32) for _ in range(2)]
    tiny = (rng.standard_normal(1 << 18) * 2.0**-133).astype(np.float32)
    apart = units_apart("fma.rn.f32 %f1, %f1, %f2, %f3;", *factors, tiny)
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= 1
    assert not units_apart("fma.rn.f32 %f1, %f1, %f2, %f3;", factors[0], factors[1], tiny * np.float32(2.0**60)).any()


def test_registers_share_a_place_only_when_they_are_not_needed_at_once() -> None:
    """%r1 and %r2 are needed at once; %r3 begins when both are over. One that is read before it is written is told."""
    code = "mov.u32 %r1, 1; mov.u32 %r2, 2; add.u32 %r3, %r1, %r2; add.u32 %r4, %r3, %r9; st.global.b32 [%ptr0], %r4;"
    (kernel,) = ptx_emulator.parse(entry(code, 1)).kernels.values()
    program = compile_kernel(kernel)
    names = {name: number for number, (name, _) in enumerate(kernel.registers)}
    widths = [*program.decoder.widths, *[8] * (program.decoder.count - len(program.decoder.widths))]
    places, early = place(program, Accesses.of(kernel.instructions), widths, frozenset())
    offsets = {name: places.offset[names[name]] for name in ("%r1", "%r2", "%r3", "%r4", "%r9")}
    assert offsets["%r1"] != offsets["%r2"]
    assert len({offsets[name] for name in ("%r1", "%r2", "%r9")}) == 3
    assert names["%r9"] in early
    assert names["%r1"] not in early
