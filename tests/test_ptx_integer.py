"""Integer, logic, shift and bit-field instructions against Python's whole numbers."""

import re
from collections.abc import Callable

import numpy as np
import ptx_emulator
import pytest
from ptx_snippets import edge_values, entry, lanewise, run, signed

WIDTHS = (16, 32, 64)


def check(
    instruction: str, reference: Callable[..., int], arrays: list[np.ndarray], out_bits: int, code: str = ""
) -> None:
    """`instruction %o, %a, %b, ...` equals the reference, lane by lane."""
    names = ", ".join(f"%{n}" for n in "abce"[: len(arrays)])
    (got,) = lanewise(
        code or f"{instruction} %o, {names};", arrays, [{16: np.uint16, 32: np.uint32, 64: np.uint64}[out_bits]]
    )
    for lane, values in enumerate(zip(*(a.tolist() for a in arrays), strict=True)):
        want = reference(*values) & ((1 << out_bits) - 1)
        assert int(got[lane]) == want, f"{instruction} of {values}: {int(got[lane])}, not {want}"


def truncating(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def pairs(bits: int) -> list[np.ndarray]:
    values = edge_values(bits, 256)
    return [values[:128], values[128:]]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ["u", "s"])
def test_arithmetic(kind: str, bits: int) -> None:
    read = (lambda v: signed(v, bits)) if kind == "s" else (lambda v: v)
    a, b = pairs(bits)
    two = {
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul.lo": lambda x, y: x * y,
        "mul.hi": lambda x, y: read(x) * read(y) >> bits,
        "min": lambda x, y: min(read(x), read(y)),
        "max": lambda x, y: max(read(x), read(y)),
    }
    for name, reference in two.items():
        check(f"{name}.{kind}{bits}", reference, [a, b], bits)
    divisor = np.where(b == 0, b.dtype.type(3), b)
    check(f"div.{kind}{bits}", lambda x, y: truncating(read(x), read(y)), [a, divisor], bits)
    check(f"rem.{kind}{bits}", lambda x, y: read(x) - truncating(read(x), read(y)) * read(y), [a, divisor], bits)
    check(f"mad.lo.{kind}{bits}", lambda x, y, z: x * y + z, [a, b, b[::-1].copy()], bits)
    if bits < 64:
        check(f"mul.wide.{kind}{bits}", lambda x, y: read(x) * read(y), [a, b], 2 * bits)
        c = edge_values(2 * bits)
        check(f"mad.wide.{kind}{bits}", lambda x, y, z: read(x) * read(y) + z, [a, b, c], 2 * bits)
    if kind == "s":
        check(f"neg.s{bits}", lambda x: -x, [a], bits)
        check(f"abs.s{bits}", lambda x: abs(read(x)), [a], bits)


def test_saturating_add() -> None:
    clamp = lambda v: max(-(1 << 31), min((1 << 31) - 1, v))  # noqa: E731
    check("add.sat.s32", lambda x, y: clamp(signed(x, 32) + signed(y, 32)), pairs(32), 32)
    check("sub.sat.s32", lambda x, y: clamp(signed(x, 32) - signed(y, 32)), pairs(32), 32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_logic(bits: int) -> None:
    check(f"and.b{bits}", lambda x, y: x & y, pairs(bits), bits)
    check(f"or.b{bits}", lambda x, y: x | y, pairs(bits), bits)
    check(f"xor.b{bits}", lambda x, y: x ^ y, pairs(bits), bits)
    check(f"not.b{bits}", lambda x: ~x, pairs(bits)[:1], bits)


def test_predicate_logic() -> None:
    a, b = np.array([0, 0, 1, 1], np.uint32), np.array([0, 1, 0, 1], np.uint32)
    read = "setp.ne.u32 %p0, %a, 0; setp.ne.u32 %p1, %b, 0;"
    for name, reference in {"and": a & b, "or": a | b, "xor": a ^ b}.items():
        (got,) = lanewise(f"{read} {name}.pred %o, %p0, %p1;", [a, b], [bool])
        assert (got == reference.astype(bool)).all()
    (got,) = lanewise(f"{read} and.pred %o, %p0, !%p1;", [a, b], [bool])
    assert got.tolist() == [False, False, True, False]
    (got,) = lanewise(f"{read} not.pred %o, %p0;", [a, b], [bool])
    assert got.tolist() == [True, True, False, False]


def test_lop3() -> None:
    a, b = pairs(32)
    for table in (0x80, 0xFE, 0x96, 0xCA, 0x1B):

        def reference(x: int, y: int, z: int, table: int = table) -> int:
            return sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i for i in range(32))

        check("", reference, [a, b, a ^ b >> np.uint32(3)], 32, code=f"lop3.b32 %o, %a, %b, %c, {table};")


@pytest.mark.parametrize("bits", WIDTHS)
def test_shifts(bits: int) -> None:
    counts = np.resize(np.array([0, 1, bits // 2, bits - 1, bits, bits + 1, 255, 0xFFFFFFFF], np.uint32), 128)
    a = np.repeat(edge_values(bits, 16), 8)
    check(f"shl.b{bits}", lambda x, n: x << n if n < bits else 0, [a, counts], bits)
    check(f"shr.u{bits}", lambda x, n: x >> n, [a, counts], bits)
    check(f"shr.s{bits}", lambda x, n: signed(x, bits) >> n, [a, counts], bits)


@pytest.mark.parametrize("way", ["l", "r"])
def test_funnel_shift(way: str) -> None:
    low, high = pairs(32)
    counts = np.resize(np.array([0, 1, 31, 32, 33, 63, 255], np.uint32), 128)
    for mode in ("wrap", "clamp"):

        def reference(a: int, b: int, n: int, mode: str = mode) -> int:
            n = n % 32 if mode == "wrap" else min(n, 32)
            both = b << 32 | a
            return both << n >> 32 if way == "l" else both >> n

        check(f"shf.{way}.{mode}.b32", reference, [low, high, counts], 32)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_fields(bits: int) -> None:
    rng = np.random.default_rng(1)
    pick = np.array([0, 1, 5, bits - 1, bits, bits + 3, 255, 256 + 7], np.uint32)
    a, b, start, length = (
        edge_values(bits),
        edge_values(bits)[::-1].copy(),
        rng.choice(pick, 128),
        rng.choice(pick, 128),
    )

    def extract(x: int, pos: int, count: int, sign: bool) -> int:
        pos, count = pos & 255, count & 255
        fill = x >> min(pos + count - 1, bits - 1) & 1 if sign and count else 0
        return sum((x >> pos + i & 1 if i < count and pos + i < bits else fill) << i for i in range(bits))

    def insert(x: int, y: int, pos: int, count: int) -> int:
        for i in range(count & 255):
            if (pos & 255) + i < bits:
                at = (pos & 255) + i
                y = y & ~(1 << at) | (x >> i & 1) << at
        return y

    check(f"bfe.u{bits}", lambda x, p, n: extract(x, p, n, False), [a, start, length], bits)
    check(f"bfe.s{bits}", lambda x, p, n: extract(x, p, n, True), [a, start, length], bits)
    check(f"bfi.b{bits}", insert, [a, b, start, length], bits)


@pytest.mark.parametrize("bits", [32, 64])
def test_counting(bits: int) -> None:
    a = edge_values(bits)
    highest = lambda x: x.bit_length() - 1  # noqa: E731
    magnitude = lambda x: x if signed(x, bits) >= 0 else ~x & (1 << bits) - 1  # noqa: E731
    check(f"popc.b{bits}", lambda x: x.bit_count(), [a], 32)
    check(f"clz.b{bits}", lambda x: bits - x.bit_length(), [a], 32)
    check(f"brev.b{bits}", lambda x: int(f"{x:0{bits}b}"[::-1], 2), [a], bits)
    check(f"bfind.u{bits}", highest, [a], 32)
    check(f"bfind.s{bits}", lambda x: highest(magnitude(x)), [a], 32)
    check(f"bfind.shiftamt.u{bits}", lambda x: bits - 1 - highest(x) if x else -1, [a], 32)


def test_permute() -> None:
    a, b = np.full(16, 0x83828180, np.uint32), np.full(16, 0x07060504, np.uint32)
    table = [0x80, 0x81, 0x82, 0x83, 4, 5, 6, 7, 255, 255, 255, 255, 0, 0, 0, 0]
    selector = np.arange(16, dtype=np.uint32)
    (got,) = lanewise("prmt.b32 %o, %a, %b, %c;", [a, b, selector], [np.uint32])
    assert (got & 0xFF).tolist() == table, "each selector value, sign replication from 8 on"
    selector = np.full(16, 0x7531, np.uint32)
    (got,) = lanewise("prmt.b32 %o, %a, %b, %c;", [a, b, selector], [np.uint32])
    assert got[0] == 0x07058381


def test_immediates() -> None:
    a = np.arange(4, dtype=np.uint32)
    (got,) = lanewise("add.s32 %o, %a, -3; add.u32 %o, %o, 0x10; add.u32 %o, %o, 5U;", [a], [np.uint32])
    assert got.tolist() == [18, 19, 20, 21]


@pytest.mark.parametrize("text", ["add.cc.s32 %r1, %r2, %r3;", "mul.s32 %r1, %r2, %r3;", "sad.s32 %r1, %r2, %r3, %r4;"])
def test_unknown_names_its_text(text: str) -> None:
    with pytest.raises(ptx_emulator.Unsupported, match=text.split()[0]):
        run(entry(text, 0), [])


@pytest.mark.parametrize(
    "text", ["add.s32 %r1, %r2;", "add.s32 %r1, %r2, %r3, %r4;", "mad.lo.s32 %r1, %r2, %r3;", "bfe.u32 %r1, %r2, %r3;"]
)
def test_another_number_of_operands_is_refused(text: str) -> None:
    message = rf"{len(text.split()) - 1} operands where .*{re.escape(text[:-1])}"
    with pytest.raises(ptx_emulator.Unsupported, match=message):
        run(entry(text, 0), [])


def test_a_register_of_another_width_is_refused() -> None:
    with pytest.raises(ptx_emulator.Unsupported, match=r"add\.s32"):
        run(entry("add.s32 %d1, %d2, %d3;", 0), [])
