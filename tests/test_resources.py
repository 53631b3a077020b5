"""Reading machine code: registers, spills and loops, tensor-core opcodes, how many CTAs fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from ptx_emulator.predict import resources as reading
from ptx_emulator.predict.resources import Resources, in_loops, read_amdgcn, read_sass, resident_ctas, resources
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, Recorder, offline_driver
from triton_kernels import product, scale

SASS = """
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1+0x4], R2 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDL.LU R3, [R1+0x4] ;
        /*0040*/              @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_2:
        /*0050*/                   STL.64 [R1+0x8], R4 ;
        /*0060*/                   BRA.U UP0, `(.L_x_2) ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0080*/                   LDL R9, [R1] ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
        /*00b0*/                   NOP;
"""
AMD = """
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\tscratch_store_dword off, v1, off offset:4 ; 4-byte Folded Spill
\ts_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tscratch_load_dword v1, off, off offset:4 ; 4-byte Folded Reload
\ts_cbranch_scc1 .LBB0_1
.LBB0_2:
\ts_endpgm
    .vgpr_count:     74
"""


def compiled(name: str, *, warps: int = 4, kind: torch.dtype = torch.bfloat16, **options: int) -> Launch:
    a, b = torch.zeros(256, 512, dtype=kind), torch.zeros(512, 256, dtype=kind)
    with offline_driver(target(name), Recorder()) as recorder:
        product(a, b, warps=warps, **options)
    (record,) = recorder.records.values()
    return record.first


def read(launch: Launch) -> Resources:
    return resources(launch.asm, launch.metadata.shared, launch.metadata.num_warps, launch.target)


def test_sass_is_read_with_its_loops() -> None:
    code, labels = read_sass(SASS)
    assert [i.opcode for i in code] == [
        "MOV", "STL", "BRA", "LDL.LU", "UIADD3", "STL.64", "BRA.U", "BRA", "LDL", "EXIT", "BRA", "NOP",
    ]  # fmt: skip
    assert [i.target for i in code if i.target] == [".L_x_0", ".L_x_2", ".L_x_1", ".L_x_3"]
    assert [code[i].opcode for i, inside in enumerate(in_loops(code, labels)) if inside] == [
        "LDL.LU", "UIADD3", "STL.64", "BRA.U", "BRA",
    ]  # fmt: skip


def test_amd_assembly_is_read_with_its_loops() -> None:
    code, labels = read_amdgcn(AMD)
    assert [i.opcode for i in code if i.opcode.startswith("scratch")] == ["scratch_store_dword", "scratch_load_dword"]
    assert [code[i].opcode for i, inside in enumerate(in_loops(code, labels)) if inside] == [
        "scratch_load_dword", "s_cbranch_scc1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma_f32_32x32x8_bf16")],
)
def test_each_architecture_has_its_tensor_core(name: str, kind: str) -> None:
    found = read(compiled(name, warps=8, bm=64))
    assert found.tensor_core == kind
    assert found.tensor_core_count > 0
    assert found.spills == found.loop_spills == found.stack_bytes == 0
    assert 32 < found.registers <= 255
    assert found.instructions > found.tensor_core_count
    assert (found.async_copies > 0) == (name != "gfx942")  # Triton loads through registers there
    assert found.tma_copies == 0


def test_a_kernel_without_products_has_no_tensor_core() -> None:
    with offline_driver(target("sm_90"), Recorder()) as recorder:
        scale(torch.zeros(300), 2.0)
    (record,) = recorder.records.values()
    found = read(record.first)
    assert (found.tensor_core, found.tensor_core_count, found.shared_bytes) == ("", 0, 0)
    assert found.occupancy == 1.0


def test_spills_are_found_where_they_are() -> None:
    """A [256, 256] accumulator in 128 threads is 512 registers a thread, of 255: it must spill inside the loop."""
    found = read(compiled("sm_80", bm=256, stages=2))
    assert found.registers == 255
    assert found.stack_bytes > 0
    assert 0 < found.loop_spills <= found.spills
    assert read(compiled("sm_80", bm=64, stages=2)).spills == 0


@pytest.mark.parametrize(
    ("name", "registers", "shared", "warps", "ctas"),
    [
        ("sm_80", 32, 0, 4, 16),  # 64 warps
        ("sm_80", 255, 0, 8, 1),  # 256 registers x 32 lanes = 8 Ki a warp, 2 warps a quarter
        ("sm_80", 128, 0, 8, 2),
        ("sm_80", 168, 0, 4, 3),
        ("sm_80", 64, 166912, 8, 1),
        ("sm_80", 64, 166913, 8, 0),  # over the limit
        ("sm_80", 64, 82944, 8, 2),  # 2 x (81 + 1) KiB = 164 KiB
        ("sm_80", 64, 83000, 8, 1),
        ("sm_90", 32, 0, 1, 32),  # CTAs
        ("sm_86", 32, 0, 4, 12),  # 48 warps
        ("sm_86", 32, 0, 1, 16),
        ("sm_90", 64, 232448, 8, 1),
        ("gfx942", 128, 0, 4, 4),  # 4 waves a SIMD
        ("gfx942", 512, 0, 4, 1),
        ("gfx942", 74, 40960, 8, 1),
        ("gfx942", 32, 65537, 4, 0),
    ],
)
def test_resident_ctas(name: str, registers: int, shared: int, warps: int, ctas: int) -> None:
    assert resident_ctas(target(name), registers, shared, warps) == ctas


def test_a_missing_disassembler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = compiled("sm_80", bm=16)
    monkeypatch.setattr(reading.triton, "knobs", object())
    with pytest.raises(RuntimeError, match=r"nvdisasm is missing from Triton .*TRITON_NVDISASM_PATH"):
        read(launch)


def test_a_failing_disassembler_is_named() -> None:
    launch = compiled("sm_80", bm=16)
    with pytest.raises(RuntimeError, match=r"nvdisasm .* failed"):
        read(dataclasses.replace(launch, asm={"cubin": b"no binary"}))


def test_a_figure_that_is_not_told_is_no_zero() -> None:
    with pytest.raises(RuntimeError, match="does not tell REG"):
        reading._usage_field("Function k:", "REG")
    with pytest.raises(RuntimeError, match=r"does not tell \.vgpr_count"):
        reading._amd_field("", "vgpr_count")


def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = compiled("sm_80", bm=16)
    monkeypatch.setattr(reading.tempfile, "tempdir", str(tmp_path))
    read(launch)
    assert list(tmp_path.iterdir()) == []
