"""Counters against patterns counted by hand."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, run

SHARED = ".shared .align 128 .b8 tile[16384];\n"


def counted(code: str, buffers: int = 1, grid: int = 1, threads: int = 32) -> ptx_emulator.Counters:
    arrays = [np.zeros(16384, np.uint8) for _ in range(buffers)]
    return run(entry("mov.b32 %r9, tile;" + code, buffers, outside=SHARED), arrays, grid=grid, threads=threads).counters


@pytest.mark.parametrize(
    ("address", "sectors"),
    [
        ("mad.wide.u32 %d1, %tid0, 4, %ptr0;", 4),  # 128 consecutive bytes
        ("mad.wide.u32 %d1, %tid0, 8, %ptr0;", 8),  # every other word
        ("mad.wide.u32 %d1, %tid0, 32, %ptr0;", 32),  # a sector each
        ("mad.wide.u32 %d1, %tid0, 512, %ptr0;", 32),
        ("mov.b64 %d1, %ptr0;", 1),  # one address for all
        ("and.b32 %r1, %tid0, 7; mad.wide.u32 %d1, %r1, 4, %ptr0;", 1),  # repeated
        ("xor.b32 %r1, %tid0, 31; mad.wide.u32 %d1, %r1, 4, %ptr0;", 4),  # backwards
        ("mad.wide.u32 %d1, %tid0, 4, %ptr0; add.s64 %d1, %d1, 16;", 5),  # shifted by half a sector
    ],
)
def test_sectors(address: str, sectors: int) -> None:
    counters = counted(f"{address} ld.global.b32 %r2, [%d1]; st.global.b32 [%d1], %r2;", grid=3)
    warps = 3
    assert counters.global_load_sectors == sectors * warps
    assert counters.global_store_sectors == counters.global_load_sectors
    assert counters.global_load_requests == warps
    assert counters.global_load_bytes == 128 * warps


def test_vector_and_masked_sectors() -> None:
    assert (
        counted("mad.wide.u32 %d1, %tid0, 16, %ptr0; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];").global_load_sectors
        == 16
    )
    masked = counted(
        "setp.lt.u32 %p1, %tid0, 9; mad.wide.u32 %d1, %tid0, 4, %ptr0; @%p1 ld.global.b32 %r1, [%d1];", threads=64
    )
    assert (masked.global_load_sectors, masked.global_load_requests, masked.global_load_bytes) == (2, 1, 36)


@pytest.mark.parametrize(
    ("scale", "width", "wavefronts", "ideal"),
    [
        (4, 1, 1, 1),  # one word a bank
        (8, 1, 2, 1),  # two words in every other bank
        (128, 1, 32, 1),  # all in one bank
        (0, 1, 1, 1),  # broadcast
        (132, 1, 1, 1),  # padded rows
        (8, 2, 2, 2),  # 64-bit, consecutive: two phases
        (16, 2, 4, 2),
        (16, 4, 4, 4),  # 128-bit, consecutive: four phases
        (32, 4, 8, 4),
        (128, 4, 32, 4),
    ],
)
def test_wavefronts(scale: int, width: int, wavefronts: int, ideal: int) -> None:
    names = "{" + ", ".join(f"%r{i}" for i in range(1, width + 1)) + "}" if width > 1 else "%r1"
    vector = f".v{width}" if width > 1 else ""
    code = f"mad.lo.u32 %r8, %tid0, {scale}, %r9; ld.shared{vector}.b32 {names}, [%r8]; "
    counters = counted(code + f"st.shared{vector}.b32 [%r8], {names};", grid=5)
    assert counters.shared_load_wavefronts == counters.shared_store_wavefronts == 5 * wavefronts
    assert counters.shared_load_wavefronts_ideal == counters.shared_store_wavefronts_ideal == 5 * ideal
    assert counters.shared_load_bytes == 5 * 32 * 4 * width


def test_masked_and_swizzled_wavefronts() -> None:
    half = counted("setp.lt.u32 %p1, %tid0, 16; mad.lo.u32 %r8, %tid0, 128, %r9; @%p1 ld.shared.b32 %r1, [%r8];")
    assert (half.shared_load_wavefronts, half.shared_load_wavefronts_ideal) == (16, 1)
    last_bank = "setp.lt.u32 %p1, %tid0, 2; mad.lo.u32 %r8, %tid0, 128, %r9; @%p1 ld.shared.b32 %r1, [%r8+124];"
    assert counted(last_bank).shared_load_wavefronts == 2, "two words of bank 31; the other lanes count nowhere"
    rows = "and.b32 %r1, %tid0, 7; shr.u32 %r2, %tid0, 3; mad.lo.u32 %r8, %tid0, 128, %r9;"
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r4, %r5, %r6, %r7}, [%r8];"
    plain = counted(rows + load)
    swizzled = counted(rows + "xor.b32 %r3, %r1, %r2; mad.lo.u32 %r8, %r3, 16, %r8;" + load)
    assert (plain.shared_load_wavefronts, swizzled.shared_load_wavefronts) == (32, 4)
    assert plain.shared_load_wavefronts_ideal == swizzled.shared_load_wavefronts_ideal == 4


def test_copies_count_both_sides() -> None:
    code = (
        "mad.lo.u32 %r8, %tid0, 16, %r9; mad.wide.u32 %d1, %tid0, 16, %ptr0; "
        "cp.async.cg.shared.global [%r8], [%d1], 16; cp.async.wait_all;"
    )
    counters = counted(code, grid=2)
    assert (counters.async_copy_bytes, counters.global_load_sectors, counters.shared_store_wavefronts) == (1024, 32, 8)


def test_addresses_that_differ_between_ctas() -> None:
    """CTA 0 without conflicts, CTA 1 with: the sum, not one of them times two."""
    code = "mov.u32 %r1, %ctaid.x; shl.b32 %r2, 4, %r1; mad.lo.u32 %r8, %tid0, %r2, %r9; ld.shared.b32 %r3, [%r8];"
    assert counted(code, grid=2).shared_load_wavefronts == 1 + 2


def test_warp_instructions() -> None:
    assert counted("", grid=3, threads=64).warp_instructions == 3 * 2 * 4, "ld.param, mov tid, mov tile, ret"
    apart = counted(
        "setp.lt.u32 %p1, %tid0, 32; @%p1 bra $END; mov.b32 %r1, 1; mov.b32 %r2, 2; $END: mov.b32 %r3, 3;", threads=64
    )
    assert apart.warp_instructions == 2 * 5 + 2 + 2 * 2
