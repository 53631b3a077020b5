"""What takes the launches of the CUDA kernels in place of the driver: executes, keeps, refuses, and always leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_cases import ODD, call, needs_kernels
from ptx_emulator import Fault, Report
from ptx_emulator.core.findings import NEAR
from ptx_emulator.cuda import load, run
from ptx_emulator.triton.launcher import EmulationFault

from cast_kernels import _native
from cast_kernels.evidence import cuda_launches
from cast_kernels.evidence.cuda_launches import emulated, kept
from cast_kernels.evidence.cuda_modules import entries, modules, split

pytestmark = needs_kernels

TINY = replace(ODD, batch=1, frames=2, patches=9, dim=64)


def test_launches_are_kept_and_not_executed() -> None:
    made = call(TINY, "amp", "nothing")
    with kept() as launches:
        made.forward()
    assert [one.kernel for one in launches] == [
        "bcast_prepare_bf16_fp32", "bcast_project_bf16_fp32_192", "bcast_attention_bf16_32",
        "bcast_exchange_bf16_fp32_192",
    ]  # fmt: skip
    project = launches[1]
    assert (project.grid, project.threads, project.cluster, project.shared_bytes) == ((24, 1, 1), 256, 4, 107_520)
    assert {place["address"] for place in project.places} >= {stream.data_ptr() for stream in made.x}
    assert all(y.isnan().all() for y in made.y)
    assert not _native.cuda().is_recorded()


def test_without_a_recorder_the_driver_is_asked() -> None:
    if _native.cuda().driver()[0]:
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match=r"no NVIDIA driver: libcuda\.so\.1"):
        call(TINY).forward()


def test_the_recorder_goes_whatever_happens() -> None:
    for taking in (kept, emulated):
        with pytest.raises(ZeroDivisionError), taking():
            raise ZeroDivisionError
        assert not _native.cuda().is_recorded()
        with pytest.raises(RuntimeError, match="taken already"), kept(), taking():
            pass
        assert not _native.cuda().is_recorded()


def test_a_kernel_that_leaves_its_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the emulator is told of half a line less than each address has."""
    spans = cuda_launches._spans
    monkeypatch.setattr(cuda_launches, "_spans", lambda places: [(a, b - 64) for a, b in spans(places)])
    made = call(TINY)
    with pytest.raises(EmulationFault, match="bcast_prepare_bf16_bf16 on sm_90, grid") as caught, emulated() as ran:
        made.forward()
    assert caught.value.kinds == ("MemoryFault",)
    assert ran == []
    assert not _native.cuda().is_recorded()


@pytest.mark.parametrize(("kind", "raises"), [(NEAR, True), ("the same value", False)])
def test_notes_of_values_that_differ_are_faults(kind: str, raises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    note = Fault(kind, "st.global.f32 [%rd1], %f1;", "the same", -1, (0, 1), 0, 0)
    assert note.differs is raises
    monkeypatch.setattr(cuda_launches, "run", lambda record, **options: Report(notes=[note]))
    made = call(TINY)
    if raises:
        with pytest.raises(EmulationFault, match=NEAR) as caught, emulated():
            made.forward()
        assert caught.value.kinds == (NEAR,)
    else:
        with emulated() as ran:
            made.forward()
        assert len(ran) == 4


def test_a_kernel_that_the_module_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_launches, "entries", dict)
    with pytest.raises(KeyError, match="bcast_prepare_bf16_bf16"), emulated():
        call(TINY).forward()
    assert not _native.cuda().is_recorded()


def test_records_in_files_run_again(tmp_path: Path) -> None:
    """Each holds what memory held before its launch; the last one's outputs are the call's."""
    made = call(TINY)
    with emulated(folder=tmp_path) as ran:
        made.forward()
    files = sorted(tmp_path.iterdir())
    assert [path.stem for path in files] == [f"{n:02d}_{one.launch.kernel}" for n, one in enumerate(ran)]
    record = load(files[-1])
    for stream in made.y:
        before = record.buffers[f"{stream.data_ptr():#x}"]
        assert (
            before.view(np.uint16) == torch.full_like(stream, float("nan")).view(torch.uint16).numpy().ravel()
        ).all()
    assert not run(record).faults
    for stream in made.y:
        after = torch.from_numpy(record.buffers[f"{stream.data_ptr():#x}"])
        assert torch.equal(after, stream.view(torch.uint8).ravel())


def test_addresses_that_overlap_are_one_buffer_and_neighbours_are_two() -> None:
    places = tuple({"address": a, "bytes": n} for a, n in ((64, 16), (16, 48), (24, 8), (40, 32), (128, 8)))
    assert cuda_launches._spans(places) == [(16, 80), (128, 136)]
    assert cuda_launches._spans(places[:2]) == [(16, 64), (64, 80)]


def test_a_bad_address_is_as_bad_in_the_emulator() -> None:
    """A stream that begins 8 bytes behind a multiple of 16: the driver refuses its tensor map."""
    made = call(TINY)
    space = torch.zeros(made.x[0].numel() + 4, dtype=made.x[0].dtype)
    moved = made._replace(x=(space[4:].view_as(made.x[0]), made.x[1]))
    with pytest.raises(ValueError, match="a multiple of 16"), emulated():
        moved.forward()


def test_each_kernel_is_a_module_of_its_own() -> None:
    assert {one.module for one in entries().values()} == set(modules())
    for kernel, one in entries().items():
        assert one.ptx.count(".entry") == 1
        assert f".entry {kernel}(" in one.ptx
        assert ".section" not in one.ptx
    text = ".version 9.0\n.const .b8 c[4];\n" + "".join(
        f".visible .entry {name}(\n.param .u64 p)\n{{ {{ mov.b64 {{%r1, %r2}}, %d1; }} ret; }}\n" for name in "ab"
    )
    found = split(f'{text}.global .b8 g[4];\n\t.file 1 "x"\n.section .debug\n{{\n}}\n')
    assert list(found) == ["a", "b"]
    assert "g[4]" in found["a"]
    assert "c[4]" in found["b"]
    assert '.file 1 "x"' in found["b"]
    with pytest.raises(ValueError, match="not balanced"):
        split(text[:-3])
