"""Loads, stores and atomics in every state space, and the faults of bad addresses."""

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, lanewise, run

LANES = np.arange(32, dtype=np.uint32)
SHARED = ".shared .align 16 .b8 tile[512];\n"


@pytest.mark.parametrize(
    ("width", "vector"), [(8, 1), (16, 1), (32, 1), (64, 1), (8, 4), (16, 2), (16, 4), (32, 2), (32, 4), (64, 2)]
)
def test_global_copy(width: int, vector: int) -> None:
    """Each width and vector, through a negative offset."""
    size = width // 8 * vector
    names = ", ".join(f"%{'h' if width <= 16 else 'r' if width == 32 else 'd'}{i + 8}" for i in range(vector))
    suffix, operand = (f".v{vector}", "{" + names + "}") if vector > 1 else ("", names)
    code = f"""
    mad.wide.u32 %d1, %tid0, {size}, %ptr0; mad.wide.u32 %d2, %tid0, {size}, %ptr1; add.s64 %d1, %d1, 64;
    ld.global.nc.L1::evict_last{suffix}.b{width} {operand}, [%d1+-64];
    st.global.wb{suffix}.b{width} [%d2], {operand};"""
    source = np.random.default_rng(0).integers(0, 256, 32 * size, dtype=np.uint8)
    target = np.zeros_like(source)
    report = run(entry(code, 2), [source, target])
    np.testing.assert_array_equal(source, target)
    assert report.counters.global_load_bytes == report.counters.global_store_bytes == 32 * size


def test_sign_and_zero_extension() -> None:
    code = """
    cvt.u64.u32 %d1, %tid0; add.s64 %d1, %d1, %ptr0; ld.global.s8 %r1, [%d1]; ld.global.u8 %r2, [%d1];
    ld.global.s8 %d3, [%d1];
    mad.wide.u32 %d2, %tid0, 16, %ptr1; cvt.u32.u64 %r3, %d3; shr.u64 %d4, %d3, 32; cvt.u32.u64 %r4, %d4;
    st.global.v4.b32 [%d2], {%r1, %r2, %r3, %r4};"""
    source = np.linspace(0, 255, 32).astype(np.uint8)
    out = np.zeros((32, 4), np.int32)
    run(entry(code, 2), [source, out])
    wide = source.view(np.int8).astype(np.int32)
    np.testing.assert_array_equal(out.T, [wide, source, wide, wide >> 31])


def test_masked_lanes_are_untouched() -> None:
    code = """
    setp.lt.u32 %p1, %tid0, 3; mad.wide.u32 %d1, %tid0, 4, %ptr0; mov.b32 %r1, 77; @%p1 ld.global.b32 %r1, [%d1];
    mad.wide.u32 %d2, %tid0, 4, %ptr1; setp.gt.u32 %p2, %tid0, 29; @!%p2 st.global.b32 [%d2], %r1;"""
    source, out = np.array([5, 6, 7], np.uint32), np.full(32, 9, np.uint32)
    run(entry(code, 2), [source, out])
    assert out.tolist() == [5, 6, 7] + [77] * 27 + [9, 9], "lanes 3 and on would have read past the buffer"


def test_parameters() -> None:
    text = entry(
        "ld.param.s32 %d1, [n]; ld.param.b32 %f1, [v]; ld.param.u16 %h1, [s]; st.global.b64 [%ptr0], %d1; "
        "st.global.b32 [%ptr0+8], %f1; st.global.b16 [%ptr0+12], %h1;",
        1,
    )
    text = text.replace(
        "x0)", "x0, .param .u32 n, .param .f32 v, .param .u16 s, .param .u64 scratch_a, .param .u64 scratch_b)", 1
    )
    kernel = ptx_emulator.parse(text).kernels["f"]
    assert kernel.parameters[:4] == [("x0", "u64", 8, 8), ("n", "u32", 4, 4), ("v", "f32", 4, 4), ("s", "u16", 2, 2)]
    out = np.zeros(16, np.uint8)
    memory = ptx_emulator.Memory()
    base = memory.register(out)

    def go(*arguments: float) -> None:
        ptx_emulator.launch(kernel, grid=(1, 1, 1), threads=32, arguments=[base, *arguments], memory=memory)

    go(-5, 2.5, 65535)  # two scratch pointers short
    memory.write_back()
    assert out[:8].view(np.int64)[0] == -5
    assert out[8:12].view(np.float32)[0] == 2.5
    assert out[12:14].view(np.uint16)[0] == 65535
    with pytest.raises(ValueError, match="6 parameters, 3 arguments"):
        go(1, 2.0)
    with pytest.raises(ValueError, match="32 bits"):
        go(1 << 40, 2.0, 3)
    with pytest.raises(TypeError, match="float"):
        go(1.5, 2.0, 3)


def test_outside_every_buffer() -> None:
    code = "mad.wide.u32 %d1, %tid0, 4, %ptr0; ld.global.b32 %r1, [%d1];"
    with pytest.raises(ptx_emulator.MemoryFault, match=r"byte 124 of 'x0', which has 124\): ld\.global\.b32"):
        run(entry(code, 1), [np.zeros(31, np.uint32)])
    with pytest.raises(ptx_emulator.MemoryFault, match=r"byte -4 of 'x0'.*st\.global"):
        run(entry("st.global.b32 [%ptr0+-4], %r1;", 1), [np.zeros(31, np.uint32)])
    with pytest.raises(ptx_emulator.MemoryFault, match=r"red\.global"):
        run(entry("red.global.add.u32 [%ptr0], 1;", 1), [np.zeros(0, np.uint32)])
    with pytest.raises(ptx_emulator.MemoryFault, match=r"ld\.global"):
        run(entry("mov.b64 %d1, 0; ld.global.b32 %r1, [%d1];", 1), [np.zeros(4, np.uint32)])


def test_an_access_may_not_reach_from_one_buffer_into_the_gap() -> None:
    with pytest.raises(ptx_emulator.MemoryFault, match="x0"):
        run(entry("ld.global.b64 %d1, [%ptr0+8];", 2), [np.zeros(3, np.uint32), np.zeros(3, np.uint32)])


def test_misaligned() -> None:
    with pytest.raises(ptx_emulator.Misaligned, match=r"multiple of 16: ld\.global\.v4"):
        run(entry("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%ptr0+8];", 1), [np.zeros(64, np.uint32)])
    with pytest.raises(ptx_emulator.Misaligned, match=r"multiple of 4: st\.shared"):
        run(entry("mov.b32 %r1, tile; st.shared.b32 [%r1+2], %r2;", 0, outside=SHARED), [])


def test_shared_memory() -> None:
    code = """
    mov.b32 %r1, tile; shl.b32 %r2, %tid0, 4; add.s32 %r1, %r1, %r2;
    st.shared::cta.v4.b32 [%r1], {%tid0, %r2, %r2, %tid0};
    bar.sync 0; xor.b32 %r4, %r1, 16; ld.shared.v2.b32 {%r5, %r6}, [%r4]; add.u32 %r5, %r5, %r6;
    mad.wide.u32 %d1, %tid0, 4, %ptr0; st.global.b32 [%d1], %r5;"""
    out = np.zeros(32, np.uint32)
    run(entry(code, 1, outside=SHARED), [out])
    np.testing.assert_array_equal(out, (LANES ^ 1) * 17)


@pytest.mark.parametrize("offset", ["512", "-4"])
def test_shared_bounds(offset: str) -> None:
    with pytest.raises(ptx_emulator.MemoryFault, match=r"512 bytes: ld\.shared"):
        run(entry(f"mov.b32 %r1, tile; ld.shared.b32 %r2, [%r1+{offset}];", 0, outside=SHARED), [])


@pytest.mark.parametrize(("target", "kib"), [("sm_80", 163), ("sm_90", 227)])  # CUDA's programming guide has them
def test_dynamic_shared_memory_and_its_limit(target: str, kib: int) -> None:
    outside = ".extern .shared .align 16 .b8 dynamic[];\n" + SHARED
    text = entry(
        "mov.b32 %r1, dynamic; ld.shared.b32 %r2, [%r1+1020]; mov.b32 %r3, tile; ld.shared.b32 %r2, [%r3];",
        0,
        outside=outside,
    )
    run(text, [], shared_bytes=1024)
    with pytest.raises(ptx_emulator.MemoryFault):
        run(text, [], shared_bytes=1020)
    run(text, [], shared_bytes=kib * 1024 - 512, target=target)
    with pytest.raises(ptx_emulator.SharedLimit, match=f"512 static.*{kib * 1024}"):
        run(text, [], shared_bytes=kib * 1024 - 511, target=target)


def test_uninitialised_values_are_nan() -> None:
    code = """
    mov.b32 %r1, tile; ld.shared.b32 %r2, [%r1]; st.global.v2.b32 [%ptr0], {%r2, %f9};
    ld.shared.b64 %d1, [%r1+8]; st.global.v2.b64 [%ptr0+16], {%d1, %d9};"""
    out = np.zeros(8, np.float32)
    run(entry(code, 1, outside=SHARED), [out])
    assert np.isnan(out[:2]).all()
    assert np.isnan(out[:2].view(np.float16)).all(), "each half is NaN as f16"
    assert np.isnan(out.view(np.float64)[2:]).all()
    assert (out[:2].view(np.uint16) & 0x7FFF > 0x7F80).all(), "and as bf16"


def test_generic_addresses() -> None:
    code = """
    mov.b64 %d1, tile; cvta.shared.u64 %d2, %d1; cvta.to.global.u64 %d3, %ptr0; cvta.global.u64 %d3, %d3;
    mad.wide.u32 %d4, %tid0, 4, %d2; st.b32 [%d4], %tid0; ld.b32 %r1, [%d4];
    mad.wide.u32 %d5, %tid0, 4, %d3; st.b32 [%d5], %r1; cvta.to.shared.u64 %d6, %d4; ld.shared.b32 %r2, [%d6];
    ld.b32 %r3, [%d5];
    add.u32 %r3, %r3, %r2; st.global.b32 [%d5], %r3;"""
    out = np.zeros(32, np.uint32)
    run(entry(code, 1, outside=SHARED), [out])
    np.testing.assert_array_equal(out, 2 * LANES)


def test_local_memory() -> None:
    code = """
    .local .align 16 .b8 depot[32];
    mov.b64 %d1, depot; cvta.local.u64 %d2, %d1; mul.lo.u32 %r1, %tid0, 3; st.local.v2.b32 [%d1+8], {%tid0, %r1};
    ld.b32 %r2, [%d2+8]; ld.local.b32 %r3, [%d1+12]; add.u32 %r2, %r2, %r3; setp.gt.u32 %p1, %tid0, 15;
    @%p1 st.local.b32 [%d1+12], 7;
    ld.local.b32 %r3, [%d1+12]; add.u32 %r2, %r2, %r3; mad.wide.u32 %d3, %tid0, 4, %ptr0; st.global.b32 [%d3], %r2;"""
    out = np.zeros(32, np.uint32)
    run(entry(code, 1), [out])
    np.testing.assert_array_equal(out, 4 * LANES + np.where(LANES > 15, 7, 3 * LANES))
    with pytest.raises(ptx_emulator.MemoryFault, match=r"32 bytes: ld\.local"):
        run(entry(".local .align 16 .b8 depot[32]; mov.b64 %d1, depot; ld.local.b32 %r1, [%d1+32];", 0), [])


@pytest.mark.parametrize(
    ("name", "kind", "reference"),
    [
        ("add", "u32", lambda old, v: old + v),
        ("add", "f32", lambda old, v: old + v),
        ("max", "s32", max),
        ("min", "u32", min),
        ("or", "b32", lambda old, v: old | v),
        ("xor", "b32", lambda old, v: old ^ v),
        ("and", "b32", lambda old, v: old & v),
        ("exch", "b32", lambda old, v: v),
    ],
)
def test_atomics_run_lane_after_lane(name: str, kind: str, reference: object) -> None:
    """32 lanes on 5 places: what each lane finds and what remains."""
    dtype = np.float32 if kind == "f32" else np.int32 if kind == "s32" else np.uint32
    value = np.random.default_rng(0).integers(0, 100, 32).astype(dtype)
    place = np.random.default_rng(1).integers(0, 5, 32)
    memory, found = list(np.arange(10, 15).astype(dtype)), []
    for lane in range(32):
        found.append(memory[place[lane]])
        memory[place[lane]] = dtype(reference(memory[place[lane]], value[lane]))  # type: ignore[operator]
    code = f"""
    mad.wide.u32 %d1, %tid0, 4, %ptr1; ld.global.b32 %r1, [%d1]; mad.wide.u32 %d2, %tid0, 4, %ptr2;
    ld.global.b32 %r2, [%d2];
    mad.wide.u32 %d3, %r2, 4, %ptr0; atom.global.gpu.relaxed.{name}.{kind} %r3, [%d3], %r1; st.global.b32 [%d1], %r3;"""
    cells = np.arange(10, 15).astype(dtype)
    old = value.copy()
    report = run(entry(code, 3), [cells, old, place.astype(np.uint32)])
    assert cells.tolist() == memory
    assert old.tolist() == found
    assert report.counters.atomic_operations == 32


def test_compare_and_swap_and_masked_reduction() -> None:
    code = """
    atom.global.cas.b32 %r1, [%ptr0], 3, 9; setp.lt.u32 %p1, %tid0, 4; @%p1 red.global.add.f32 [%ptr0+4], 0f3F800000;
    @%p1 red.global.add.noftz.bf16x2 [%ptr0+8], 0x3F803F80;
    @%p1 red.global.add.v2.f32 [%ptr0+16], {0f40000000, 0f3F800000};"""
    cells = np.array([3, 0, 0, 0, 0, 0], np.uint32)
    run(entry(code, 1), [cells])
    assert cells[0] == 9
    assert cells[[1, 4, 5]].view(np.float32).tolist() == [4, 8, 4]
    assert cells[2] == 0x40804080


def test_a_nan_that_is_added_has_the_bits_of_every_other() -> None:
    cells = np.array([0xFFC00001, 0x3F800000], np.uint32)
    run(entry("red.global.add.f32 [%ptr0], 0f3F800000; red.global.add.f32 [%ptr0+4], 0fFFC00002;", 1), [cells])
    assert [hex(x) for x in cells] == ["0x7fffffff"] * 2


def test_shared_atomics() -> None:
    code = """
    mov.b32 %r1, tile; and.b32 %r2, %tid0, 3; shl.b32 %r2, %r2, 2; add.u32 %r1, %r1, %r2; st.shared.b32 [%r1], 0;
    bar.sync 0;
    atom.shared.add.u32 %r3, [%r1], %tid0; bar.sync 0; ld.shared.b32 %r4, [%r1];
    mad.wide.u32 %d1, %tid0, 4, %ptr0; st.global.b32 [%d1], %r4;"""
    out = np.zeros(64, np.uint32)
    report = run(entry(code, 1, outside=SHARED), [out], threads=64)
    np.testing.assert_array_equal(out, np.resize([480, 496, 512, 528], 64))
    assert not report.faults


def test_zero_sized_buffers_and_bad_ones() -> None:
    memory = ptx_emulator.Memory()
    first, second = memory.register(np.zeros(0, np.uint8)), memory.register(np.zeros(3, np.uint8))
    assert first % 256 == second % 256 == 0
    assert second > first
    with pytest.raises(TypeError, match="uint8"):
        memory.register(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="1-D"):
        memory.register(np.zeros((3, 3), np.uint8))


def test_many_ctas_in_several_batches() -> None:
    """More lanes than one batch holds."""
    code = (
        "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 1024, %tid0; mad.wide.u32 %d1, %r2, 4, %ptr0; "
        "st.global.b32 [%d1], %r2;"
    )
    out = np.zeros(1024 * 40, np.uint32)
    report = run(entry(code, 1), [out], grid=40, threads=1024)
    np.testing.assert_array_equal(out, np.arange(len(out)))
    assert report.ctas == 40


@pytest.mark.parametrize("options", [{"threads": 33}, {"target": "sm_70"}, {"grid": (0, 1, 1)}])
def test_bad_launches(options: dict) -> None:
    kernel = ptx_emulator.parse(entry("", 0)).kernels["f"]
    arguments = {"grid": (1, 1, 1), "threads": 32, "target": "sm_80", **options}
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        ptx_emulator.launch(kernel, arguments=[], memory=ptx_emulator.Memory(), **arguments)


def test_required_threads() -> None:
    kernel = ptx_emulator.parse(entry("", 0, directives=".reqntid 64")).kernels["f"]
    assert kernel.required_threads == 64
    with pytest.raises(ValueError, match="asks for 64"):
        ptx_emulator.launch(kernel, grid=(1, 1, 1), threads=32, arguments=[], memory=ptx_emulator.Memory())


def test_wgmma_needs_sm_90() -> None:
    with pytest.raises(ptx_emulator.Unsupported, match="sm_80 has no wgmma"):
        run(entry("wgmma.fence.sync.aligned;", 0), [], target="sm_80")


def test_lanewise_covers_several_ctas() -> None:
    a = np.arange(100, dtype=np.uint32)
    (got,) = lanewise("mov.u32 %r1, %ctaid.x; add.u32 %o, %a, %r1;", [a], [np.uint32])
    np.testing.assert_array_equal(got, a + a // 32)
