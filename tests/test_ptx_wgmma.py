"""wgmma: descriptors of every swizzle, operands from registers, groups, and the hazards of what is in flight."""

from dataclasses import dataclass

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import entry, run

THREADS = 128
WIDTHS = {0: 0, 1: 128, 2: 64, 3: 32}
TILE = ".shared .align 1024 .b8 tile[49152];\n"
B_AT = 16384
LANE = np.arange(THREADS)


@dataclass
class Operand:
    """A matrix of 16- or 32-bit patterns [rows, k] laid out in shared memory as the document's layout tables say."""

    matrix: np.ndarray
    swizzle: int
    mn_major: bool

    def place(self) -> tuple[np.ndarray, int, int]:
        """(bytes, leading byte offset, stride byte offset)."""
        rows, depth = self.matrix.shape
        size, width = self.matrix.dtype.itemsize, WIDTHS[self.swizzle]
        if self.mn_major:
            tile = width // size if width else 8
            blocks = -(-rows // tile)
            # tiles along k first, then along rows; without swizzling the two strides change roles
            step_k, step_rows = 8 * (width or 16), 8 * (width or 16) * (depth // 8)
            leading, stride = (step_rows, step_k) if width else (step_k, step_rows)
            total = blocks * step_rows
        else:
            stride, leading = (8 * width, 16) if width else (128, rows * 16)
            total = rows // 8 * stride if width else leading * (depth * size // 16)
        out = np.zeros(-(-total // 1024) * 1024, np.uint8)
        for r in range(rows):
            for k in range(depth):
                if self.mn_major:
                    address = r // tile * step_rows + k // 8 * step_k + k % 8 * (width or 16) + size * (r % tile)
                elif width:
                    address = r // 8 * stride + r % 8 * width + size * k
                else:
                    address = r // 8 * stride + r % 8 * 16 + size * k // 16 * leading + size * k % 16
                if width:
                    address ^= (address >> 7 & (width // 16 - 1)) << 4
                out[address : address + size] = np.frombuffer(self.matrix[r, k].tobytes(), np.uint8)
        return out, leading, stride

    def descriptor(self, leading: int, stride: int) -> int:
        return leading >> 4 << 16 | stride >> 4 << 32 | self.swizzle << 62


def setup(a: Operand | None, b: Operand) -> tuple[np.ndarray, str]:
    """The shared-memory image, and code that copies it there and makes the descriptors %d10 (A) and %d11 (B)."""
    image = np.zeros(49152, np.uint8)
    code = """
    mov.b32 %r1, tile; mov.b32 %r2, %tid0;
    $COPY: mad.lo.u32 %r3, %r2, 16, %r1; mad.wide.u32 %d1, %r2, 16, %ptr0; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d1];
    st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7}; add.u32 %r2, %r2, 128; setp.lt.u32 %p1, %r2, 3072; @%p1 bra $COPY;
    fence.proxy.async.shared::cta; bar.sync 0; cvt.u64.u32 %d2, %r1; shr.u64 %d2, %d2, 4;"""
    for name, operand, start in (("%d10", a, 0), ("%d11", b, B_AT)):
        if operand is not None:
            data, leading, stride = operand.place()
            image[start : start + len(data)] = data
            bits = operand.descriptor(leading, stride) + (start >> 4)
            code += f"mov.b64 {name}, {bits}; add.s64 {name}, {name}, %d2;"
    return image, code


def result(columns: int) -> tuple[str, str]:
    """The accumulator list, and code that stores it to x1 as [threads, registers]."""
    names = [f"%acc{i}" for i in range(columns // 2)]
    stores = f"mad.wide.u32 %d3, %tid0, {2 * columns}, %ptr1;" + "".join(
        f"st.global.b32 [%d3+{4 * i}], {n};" for i, n in enumerate(names)
    )
    return "{" + ", ".join(names) + "}", stores


def as_matrix(registers: np.ndarray, columns: int) -> np.ndarray:
    """Accumulators [threads, registers] as [64, columns], by the document's figure."""
    out = np.zeros((64, columns), np.float32)
    for i in range(columns // 2):
        out[16 * (LANE // 32) + LANE % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (LANE % 4) + i % 2] = registers[
            :, i
        ]
    return out


def patterns(shape: tuple[int, int], kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(bit patterns, exact values)."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16), x.astype(np.float16).astype(np.float64)
    keep = np.uint32(0xFFFF0000 if kind == "bf16" else 0xFFFFE000)
    bits = x.view(np.uint32) & keep
    return (bits >> np.uint32(16)).astype(np.uint16) if kind == "bf16" else bits, bits.view(np.float32).astype(
        np.float64
    )


def multiply(
    columns: int,
    kind: str,
    swizzle_a: int,
    swizzle_b: int,
    major: tuple[bool, bool],
    scales: str = "1, 1, 1",
    start: float = 0.0,
    more: str = "",
    seed: int | None = None,
) -> tuple[np.ndarray, np.ndarray, ptx_emulator.Report]:
    """(D, A @ B.T in float64, report) of one wgmma; `scales` are scale-d, scale-a and scale-b."""
    depth = 8 if kind == "tf32" else 16
    (a, x), (b, y) = patterns((64, depth), kind, 1), patterns((columns, depth), kind, 2)
    image, code = setup(Operand(a, swizzle_a, major[0]), Operand(b, swizzle_b, major[1]))
    accumulators, stores = result(columns)
    flag, *rest = scales.split(", ")
    transposed = "" if kind == "tf32" else f", {int(major[0])}, {int(major[1])}"
    code += (
        "".join(f"mov.b32 %acc{i}, 0f{np.float32(start).view(np.uint32):08X};" for i in range(columns // 2))
        + f"""
    setp.ne.u32 %p2, {flag}, 0; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}
    {accumulators}, %d10, %d11, %p2, {", ".join(rest)}{transposed};
    wgmma.commit_group.sync.aligned; {more} wgmma.wait_group.sync.aligned 0; {stores}"""
    )
    out = np.zeros((THREADS, columns // 2), np.float32)
    text = entry(f".reg .f32 %acc<{columns // 2}>;" + code, 2, outside=TILE)
    report = run(text, [image, out], threads=THREADS, seed=seed)
    return as_matrix(out, columns), x @ y.T, report


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_layouts(kind: str, mn_major: bool, swizzle: int) -> None:
    got, want, report = multiply(64, kind, swizzle, swizzle, (mn_major, mn_major))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not report.faults


@pytest.mark.parametrize("columns", [8, 16, 24, 32, 96, 128, 200, 256])
def test_widths(columns: int) -> None:
    got, want, report = multiply(columns, "bf16", 1, 3, (False, False))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert report.counters.tensor_flops_by_kind == {f"wgmma.m64n{columns}k16.bf16": 2 * 64 * columns * 16}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_product_of_warps_that_run_apart(seed: int) -> None:
    got, want, report = multiply(64, "bf16", 1, 1, (False, False), start=2.5, seed=seed)
    np.testing.assert_allclose(got, want + 2.5, rtol=1e-5, atol=1e-5)
    assert not report.faults


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_tf32(swizzle: int) -> None:
    got, want, _ = multiply(32, "tf32", swizzle, swizzle, (False, False))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_scales() -> None:
    """scale-d off drops the accumulators, poison included; -1 negates an operand."""
    got, want, _ = multiply(16, "bf16", 1, 1, (False, False), "1, 1, 1", start=2.5)
    np.testing.assert_allclose(got, want + 2.5, rtol=1e-5, atol=1e-5)
    got, want, _ = multiply(16, "bf16", 1, 1, (False, False), "0, 1, 1", start=float("nan"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    got, _, _ = multiply(16, "bf16", 1, 1, (False, False), "1, 1, 1", start=-float("nan"))
    assert (got.view(np.uint32) == 0x7FFFFFFF).all(), "every NaN of arithmetic has these bits"
    got, want, _ = multiply(16, "bf16", 1, 1, (False, False), "1, -1, 1", start=1.0)
    np.testing.assert_allclose(got, 1 - want, rtol=1e-5, atol=1e-5)
    got, want, _ = multiply(16, "bf16", 1, 1, (False, False), "1, -1, -1")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def from_registers(kind: str) -> tuple[np.ndarray, np.ndarray]:
    depth = 8 if kind == "tf32" else 16
    (a, x), (b, y) = patterns((64, depth), kind, 1), patterns((32, depth), kind, 2)
    rows, t = 16 * (LANE // 32) + LANE % 32 // 4, LANE % 4
    parts = []
    for register in range(4):
        row = rows + 8 * (register % 2)
        if kind == "tf32":
            parts.append(a[row, t + 4 * (register // 2)])
        else:
            k = 2 * t + 8 * (register // 2)
            parts.append(a[row, k].astype(np.uint32) | a[row, k + 1].astype(np.uint32) << 16)
    image, code = setup(None, Operand(b, 1, False))
    accumulators, stores = result(32)
    code += (
        "".join(f"mov.b32 %acc{i}, 0;" for i in range(16))
        + f"""
    mad.wide.u32 %d5, %tid0, 16, %ptr2; ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d5]; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n32k{depth}.f32.{kind}.{kind}
    {accumulators}, {{%r20, %r21, %r22, %r23}}, %d11, 1, 1, 1{"" if kind == "tf32" else ", 0"};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {stores}"""
    )
    out = np.zeros((THREADS, 16), np.float32)
    fragment = np.ascontiguousarray(np.stack(parts, 1))
    report = run(entry(".reg .f32 %acc<16>;" + code, 3, outside=TILE), [image, out, fragment], threads=THREADS)
    assert not report.faults
    return as_matrix(out, 32), x @ y.T


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_a_from_registers(kind: str) -> None:
    got, want = from_registers(kind)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_chained_products_and_groups() -> None:
    """Two products on the same accumulators, one group each: waiting for all but one leaves the registers as they
    were."""
    again = (
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%acc0, %acc1, %acc2, %acc3, %acc4, %acc5, "
        "%acc6, %acc7}, %d10, %d11, 1, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;"
    )
    got, want, report = multiply(16, "bf16", 1, 1, (False, False), more=again)
    np.testing.assert_allclose(got, 2 * want, rtol=1e-5, atol=1e-5)
    assert not report.faults
    got, _, report = multiply(16, "bf16", 1, 1, (False, False), start=3.0, more=again + "mov.b32 %r30, %acc0;")
    assert [f.kind for f in report.faults] == ["register of a pending wgmma used"]
    assert report.faults[0].instruction == "mov.b32 %r30, %acc0"


HAZARDS = {
    "read": ("add.f32 %f1, %acc3, %acc3;", "register of a pending wgmma used"),
    "write": ("mov.b32 %acc3, 0;", "register of a pending wgmma used"),
    "operand": ("st.shared.b32 [%r1], %tid0;", "write to an operand of a pending wgmma"),
    "short wait": ("wgmma.wait_group.sync.aligned 1; mov.b32 %f1, %acc0;", "register of a pending wgmma used"),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_hazards_before_the_wait(name: str) -> None:
    code, kind = HAZARDS[name]
    _, _, report = multiply(16, "bf16", 1, 1, (False, False), more=code)
    assert kind in {f.kind for f in report.faults}


def broken(old: str, new: str) -> set[str]:
    """Fault kinds of a product whose code has `old` replaced."""
    depth, columns = 16, 16
    (a, _), (b, _) = patterns((64, depth), "bf16", 1), patterns((columns, depth), "bf16", 2)
    image, code = setup(Operand(a, 1, False), Operand(b, 1, False))
    accumulators, stores = result(columns)
    code += (
        "".join(f"mov.b32 %acc{i}, 0;" for i in range(8))
        + f"""wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {accumulators}, %d10, %d11, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {stores}"""
    )
    assert old in code
    text = entry(".reg .f32 %acc<8>;" + code.replace(old, new), 2, outside=TILE)
    report = run(text, [image, np.zeros((THREADS, 8), np.float32)], threads=THREADS)
    return {f.kind for f in report.faults}


def test_what_must_stand_before_a_product() -> None:
    assert broken("bar.sync 0;", "bar.sync 0;") == set()
    assert broken("bar.sync 0;", "") == {"write-read by wgmma"}
    assert broken("fence.proxy.async.shared::cta;", "") == {"wgmma reads a write without fence.proxy.async"}
    assert broken("wgmma.fence.sync.aligned;", "") == {"wgmma register written after the last wgmma.fence"}
    late = "wgmma.fence.sync.aligned; mov.b32 %acc1, %acc0;"
    assert broken("wgmma.fence.sync.aligned;", late) == set()  # a copy names a register, it computes nothing
    late = "wgmma.fence.sync.aligned; add.f32 %acc1, %acc0, %acc0;"
    assert broken("wgmma.fence.sync.aligned;", late) == {"wgmma register written after the last wgmma.fence"}
    assert broken("wgmma.wait_group.sync.aligned 0;", "") == {"register of a pending wgmma used"}
    assert broken(
        "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 0; st.shared.b32 [%r1], %tid0;"
    ) >= {"read-write"}


def test_a_descriptor_past_the_end() -> None:
    with pytest.raises(ptx_emulator.MemoryFault, match=r"matrix descriptor reaches.*wgmma\.mma_async"):
        broken("wgmma.fence", "add.s64 %d11, %d11, 2040; wgmma.fence")


def test_a_part_of_a_warpgroup_is_refused() -> None:
    with pytest.raises(ptx_emulator.Divergence, match=r"warpgroup.*wgmma\.fence"):
        broken("wgmma.fence.sync.aligned;", "setp.lt.u32 %p3, %tid0, 64; @%p3 wgmma.fence.sync.aligned;")
    with pytest.raises(ptx_emulator.Divergence, match="descriptor differs"):
        broken("wgmma.fence", "cvt.u64.u32 %d12, %tid0; add.s64 %d10, %d10, %d12; wgmma.fence")


@pytest.mark.parametrize("seed", [None, 0])
def test_two_warpgroups_with_operands_of_their_own(seed: int | None) -> None:
    """Warpgroup 1 reads A 64 rows further down; both share B."""
    (a, x), (b, y) = patterns((128, 16), "bf16", 1), patterns((16, 16), "bf16", 2)
    image, code = setup(Operand(a, 1, False), Operand(b, 1, False))
    code = code.replace("add.u32 %r2, %r2, 128", "add.u32 %r2, %r2, 256")
    accumulators, stores = result(16)
    code += f"""shr.u32 %r20, %tid0, 7; mul.lo.u32 %r20, %r20, 512; cvt.u64.u32 %d12, %r20; add.s64 %d10, %d10, %d12;
    mov.b32 %acc0, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {accumulators}, %d10, %d11, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {stores}"""
    out = np.zeros((2, THREADS, 8), np.float32)
    report = run(entry(".reg .f32 %acc<8>;" + code, 2, outside=TILE), [image, out], threads=256, seed=seed)
    assert not report.faults
    for group in range(2):
        np.testing.assert_allclose(
            as_matrix(out[group], 16), x[64 * group : 64 * group + 64] @ y.T, rtol=1e-5, atol=1e-5
        )


def test_one_warpgroup_alone() -> None:
    """The other jumps over the product; its registers stay."""
    (a, x), (b, y) = patterns((64, 16), "bf16", 1), patterns((16, 16), "bf16", 2)
    image, code = setup(Operand(a, 1, False), Operand(b, 1, False))
    code = code.replace("add.u32 %r2, %r2, 128", "add.u32 %r2, %r2, 256")
    accumulators, stores = result(16)
    code += (
        "".join(f"mov.b32 %acc{i}, 0f40400000;" for i in range(8))
        + f"""setp.lt.u32 %p3, %tid0, 128; @%p3 bra $OVER;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {accumulators}, %d10, %d11, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    $OVER: {stores}"""
    )
    out = np.zeros((2, THREADS, 8), np.float32)
    report = run(entry(".reg .f32 %acc<8>;" + code, 2, outside=TILE), [image, out], threads=256)
    assert not report.faults
    assert (out[0] == 3).all()
    np.testing.assert_allclose(as_matrix(out[1], 16), x @ y.T + 3, rtol=1e-5, atol=1e-5)
    assert report.counters.tensor_flops == 2 * 64 * 16 * 16


@pytest.mark.parametrize("form", ["m64n16k16.f16.f16.f16", "m64n16k32.f32.e4m3.e4m3", "m64n12k16.f32.bf16.bf16"])
def test_other_forms_are_refused(form: str) -> None:
    with pytest.raises(ptx_emulator.Unsupported, match=r"wgmma\.mma_async"):
        broken("m64n16k16.f32.bf16.bf16", form)
