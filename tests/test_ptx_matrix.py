"""ldmatrix, stmatrix and mma.sync."""

import numpy as np
import ptx_emulator
import pytest
import torch
from ptx_snippets import entry, run

LANES = np.arange(32)
TILE = ".shared .align 128 .b8 tile[1024];\n"
FILL = """
mov.b32 %r1, tile; mad.lo.u32 %r2, %tid0, 32, %r1; mad.wide.u32 %d1, %tid0, 32, %ptr0;
ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d1]; st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};
ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d1+16]; st.shared.v4.b32 [%r2+16], {%r4, %r5, %r6, %r7}; bar.sync 0;"""


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix(count: int, transposed: bool) -> None:
    """A numbered tile of 64 rows of 16 bytes; matrix j is rows 8j to 8j+7, taken in reverse order of addresses."""
    registers = [f"%r{10 + i}" for i in range(count)]
    code = f"""{FILL}
    sub.u32 %r3, 31, %tid0; mad.lo.u32 %r3, %r3, 16, %r1;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16
    {{{", ".join(registers)}}}, [%r3+256];
    mad.wide.u32 %d2, %tid0, 16, %ptr1;""" + "".join(
        f"st.global.b32 [%d2+{4 * i}], {r};" for i, r in enumerate(registers)
    )
    tile = np.arange(512, dtype=np.uint16).reshape(64, 8)
    out = np.zeros((32, 4, 2), np.uint16)
    run(entry(code, 2, outside=TILE), [tile, out])
    for j in range(count):
        rows = tile[16 + 31 - 8 * j - np.arange(8)]
        if transposed:
            rows = rows.T
        want = np.stack([rows[LANES // 4, 2 * (LANES % 4)], rows[LANES // 4, 2 * (LANES % 4) + 1]], 1)
        np.testing.assert_array_equal(out[:, j], want)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_store_matrix_undoes_load_matrix(count: int, transposed: bool) -> None:
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    form = f"sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    code = f"""{FILL}
    mad.lo.u32 %r3, %tid0, 16, %r1; ldmatrix.{form} {{{registers}}}, [%r3]; bar.sync 0;
    stmatrix.{form} [%r3+512], {{{registers}}}; bar.sync 0;
    ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3+512]; mad.wide.u32 %d2, %tid0, 16, %ptr1;
    st.global.v4.b32 [%d2], {{%r4, %r5, %r6, %r7}};"""
    tile = np.random.default_rng(0).integers(0, 1 << 16, (64, 8)).astype(np.uint16)
    out = np.zeros((32, 8), np.uint16)
    report = run(entry(code, 2, outside=TILE), [tile, out])
    np.testing.assert_array_equal(out[: 8 * count], tile[: 8 * count])
    np.testing.assert_array_equal(out[8 * count :], tile[32 + 8 * count :])
    assert report.counters.shared_store_bytes == 32 * 32 + 8 * count * 16
    assert not report.faults


def test_store_matrix_layout() -> None:
    """Lane l's register goes to row l/4, columns 2(l%4) and +1 of the matrix that lane's row address names."""
    code = """
    mov.b32 %r1, tile; mad.lo.u32 %r3, %tid0, 32, %r1; shl.b32 %r2, %tid0, 16; or.b32 %r2, %r2, %tid0;
    add.u32 %r2, %r2, 0x1000000;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r2}; bar.sync 0;
    shl.b32 %r5, %tid0, 3; add.u32 %r5, %r5, %r1; ld.shared.v2.b32 {%r6, %r7}, [%r5];
    mad.wide.u32 %d1, %tid0, 8, %ptr0; st.global.v2.b32 [%d1], {%r6, %r7};"""
    out = np.zeros((8, 16), np.uint16)
    run(entry(code, 1, outside=TILE), [out])
    np.testing.assert_array_equal(out[:, :8:2], LANES.reshape(8, 4))
    np.testing.assert_array_equal(out[:, 1:8:2], LANES.reshape(8, 4) + 256)
    assert (out[:, 8:] == 0x7FFF).all(), "what no lane stored is poison still"


def test_matrix_rows_must_be_aligned() -> None:
    code = "mov.b32 %r1, tile; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1+8];"
    with pytest.raises(ptx_emulator.Misaligned, match=r"multiple of 16: ldmatrix"):
        run(entry(code, 0, outside=TILE), [])


def test_half_a_warp_is_refused() -> None:
    code = "mov.b32 %r1, tile; setp.lt.u32 %p1, %tid0, 16; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];"
    with pytest.raises(ptx_emulator.Divergence, match="ldmatrix"):
        run(entry(code, 0, outside=TILE), [])


SHAPES = [(16, "bf16"), (16, "f16"), (8, "bf16"), (8, "f16"), (8, "tf32"), (4, "tf32")]


def fragments(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Registers [lanes, n] of A [16, k] and B [k, 8] as the document's figures place them, from 16- or 32-bit
    elements."""
    g, t, k = LANES // 4, LANES % 4, a.shape[1]
    if a.dtype == np.uint32:
        columns = [t] if k == 4 else [t, t + 4]
        left = [a[g + 8 * half, c] for c in columns for half in (0, 1)]
        right = [b[c, g] for c in columns]
        return np.stack(left, 1), np.stack(right, 1)
    left, right = [], []
    for base in range(0, k, 8):
        pair = np.stack([2 * t + base, 2 * t + base + 1], 1)
        left += [np.ascontiguousarray(a[(g + 8 * half)[:, None], pair]).view(np.uint32)[:, 0] for half in (0, 1)]
        right.append(np.ascontiguousarray(b[pair, g[:, None]]).view(np.uint32)[:, 0])
    return np.stack(left, 1), np.stack(right, 1)


def mma(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str) -> tuple[np.ndarray, ptx_emulator.Report]:
    """A mma of bit patterns a [16, k], b [k, 8] and float32 c [16, 8]."""
    left, right = fragments(a, b)
    g, t = LANES // 4, LANES % 4
    rows, columns = np.stack([g, g, g + 8, g + 8], 1), np.stack([2 * t, 2 * t + 1] * 2, 1)
    arrays = [np.ascontiguousarray(left), np.ascontiguousarray(right), np.ascontiguousarray(c[rows, columns])]
    loads = []
    for i, (array, first) in enumerate(zip(arrays, (10, 20, 30), strict=True)):
        width = array.shape[1]
        loads.append(f"mad.wide.u32 %d1, %tid0, {4 * width}, %ptr{i};")
        loads += [f"ld.global.b32 %r{first + j}, [%d1+{4 * j}];" for j in range(width)]
    names = [
        "{" + ", ".join(f"%r{first + j}" for j in range(n)) + "}"
        for first, n in ((30, 4), (10, left.shape[1]), (20, right.shape[1]))
    ]
    code = (
        "\n".join(loads)
        + f"""
    mma.sync.aligned.m16n8k{a.shape[1]}.row.col.f32.{kind}.{kind}.f32 {names[0]}, {names[1]}, {names[2]}, {names[0]};
    mad.wide.u32 %d1, %tid0, 16, %ptr2; st.global.v4.b32 [%d1], {names[0]};"""
    )
    report = run(entry(code, 3), arrays)
    out = np.zeros((16, 8), np.float32)
    out[rows, columns] = arrays[2]
    return out, report


def as_bits(x: torch.Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(bit patterns, exact values)."""
    if kind == "tf32":
        bits = x.numpy().view(np.uint32) & np.uint32(0xFFFFE000)
        return bits, bits.view(np.float32).astype(np.float64)
    half = x.to(torch.bfloat16 if kind == "bf16" else torch.float16)
    return half.view(torch.int16).numpy().view(np.uint16), half.double().numpy()


@pytest.mark.parametrize(("k", "kind"), SHAPES)
def test_mma(k: int, kind: str) -> None:
    torch.manual_seed(0)
    (a, x), (b, y) = as_bits(torch.randn(16, k), kind), as_bits(torch.randn(k, 8), kind)
    c = torch.randn(16, 8).numpy()
    out, report = mma(a, b, c, kind)
    np.testing.assert_allclose(out, x @ y + c, rtol=1e-5, atol=1e-6)
    assert report.counters.tensor_flops == 2 * 16 * 8 * k
    assert report.counters.tensor_flops_by_kind == {f"mma.m16n8k{k}.{kind}": 2 * 16 * 8 * k}


@pytest.mark.parametrize(("k", "kind"), SHAPES)
def test_mma_of_single_elements(k: int, kind: str) -> None:
    """One element of A and one of B: the product lands at one place, for every k."""
    for i in range(k):
        row, column = (5 * i + 3) % 16, (3 * i + 1) % 8
        left, right = torch.zeros(16, k), torch.zeros(k, 8)
        left[row, i], right[i, column] = 3, 7
        out, _ = mma(as_bits(left, kind)[0], as_bits(right, kind)[0], np.zeros((16, 8), np.float32), kind)
        want = np.zeros((16, 8))
        want[row, column] = 21
        np.testing.assert_array_equal(out, want)


def test_a_nan_of_mma_has_the_bits_of_every_other() -> None:
    a, b, c = np.full((16, 16), 0x3F80, np.uint16), np.full((16, 8), 0x3F80, np.uint16), np.ones((16, 8), np.uint32)
    a[3, 5], b[2, 1], c[0, 0] = 0xFFC1, 0x7F83, 0xFFC00005
    out, _ = mma(a, b, c.view(np.float32), "bf16")
    wrong = np.zeros((16, 8), bool)
    wrong[3], wrong[:, 1], wrong[0, 0] = True, True, True
    np.testing.assert_array_equal(out.view(np.uint32) == 0x7FFFFFFF, wrong)
    assert (out[~wrong] == 16).all()


def test_tf32_reads_the_upper_bits_only() -> None:
    a, b = np.full((16, 8), 0x3F801FFF, np.uint32), np.full((8, 8), 0x3F801FFF, np.uint32)
    out, _ = mma(a, b, np.zeros((16, 8), np.float32), "tf32")
    assert (out == 8).all()


def test_a_register_that_changes_is_read_again() -> None:
    """Fragments are kept while registers stay the same; a masked or whole write must not leave an old one behind."""
    code = """
    mov.b32 %r10, 0x3F803F80; mov.b32 %r20, 0x3F803F80; mov.b32 %f1, 0; mov.b32 %f2, 0; mov.b32 %f3, 0; mov.b32 %f4, 0;
    mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r10, %r10}, {%r20}, {%f1, %f2, %f3, %f4};
    mov.b32 %r10, 0x40004000; setp.eq.u32 %p1, %tid0, 0; @%p1 mov.b32 %r20, 0x40004000;
    mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r10, %r10}, {%r20}, {%f1, %f2, %f3, %f4};
    mad.wide.u32 %d1, %tid0, 8, %ptr0; st.global.v2.b32 [%d1], {%f1, %f2};"""
    out = np.zeros((8, 8), np.float32)
    run(entry(code, 1), [out])
    want = np.full((8, 8), 8 + 16)
    want[:, 0] = 8 + 2 * 6 + 2 * 2 * 2  # column 0 of B has two elements doubled
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    "types",
    ["m16n8k16.row.col.f16.f16.f16.f16", "m16n8k32.row.col.s32.s8.s8.s32", "m16n8k16.row.row.f32.bf16.bf16.f32"],
)
def test_other_mma_forms_are_refused(types: str) -> None:
    c = "{%r1, %r2, %r3, %r4}"
    text = f"mma.sync.aligned.{types} {c}, {{%r5, %r6, %r7, %r8}}, {{%r9, %r10}}, {c};"
    with pytest.raises(ptx_emulator.Unsupported, match="mma"):
        run(entry(text, 0), [])
