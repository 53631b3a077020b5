"""Floating-point arithmetic and comparisons, special values included."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import ptx_emulator
import pytest
import torch
from ptx_snippets import entry, lanewise, run

INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-40, 3.5, -2.25, 1e30, -1e30, 65504.0, 1e-8]


def numbers(count: int = 256, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(count) * np.exp2(rng.integers(-12, 12, count))).astype(np.float32)
    values[: len(SPECIAL)] = rng.permutation(np.array(SPECIAL, np.float32))
    return values


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Equal as values, NaN equal to NaN, the zeros' signs equal."""
    np.testing.assert_array_equal(got, want)
    zero = want == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


def bits(array: np.ndarray) -> np.ndarray:
    return array.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[array.dtype.itemsize])


def unary(code: str, a: np.ndarray) -> np.ndarray:
    return lanewise(code, [bits(a)], [bits(a).dtype])[0].view(a.dtype)


def binary(code: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return lanewise(code, [bits(a), bits(b)], [bits(a).dtype])[0].view(a.dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_arithmetic(name: str, dtype: type) -> None:
    a, b = numbers(seed=1).astype(dtype), numbers(seed=2).astype(dtype)
    kind = "f32" if dtype is np.float32 else "f64"
    with np.errstate(all="ignore"):
        want = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b}[name]
    same(binary(f"{name}.rn.{kind} %o, %a, %b;", a, b), want)


@pytest.mark.parametrize(("mode", "towards"), [("rz", 0.0), ("rm", -INF), ("rp", INF)])
def test_directed_roundings(mode: str, towards: float) -> None:
    rng = np.random.default_rng(7)
    a, b, c = (rng.standard_normal(200).astype(np.float32) for _ in range(3))
    for name, exact in {
        "add": a.astype(np.float64) + b,
        "mul": a.astype(np.float64) * b,
        "fma": a.astype(np.float64) * b + c,
    }.items():
        near = exact.astype(np.float32)
        past = (near > exact) if towards == -INF else (near < exact) if towards == INF else np.abs(near) > np.abs(exact)
        want = np.where(past, np.nextafter(near, np.float32(towards)), near)
        names = "%a, %b, %c" if name == "fma" else "%a, %b"
        inputs = [bits(x) for x in (a, b, c)[: 3 if name == "fma" else 2]]
        (got,) = lanewise(f"{name}.{mode}.f32 %o, {names};", inputs, [np.uint32])
        np.testing.assert_array_equal(got.view(np.float32), want)


def test_approximate_division() -> None:
    a, b = numbers(seed=1), numbers(seed=2)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(binary("div.full.f32 %o, %a, %b;", a, b), a / b, rtol=3e-7)


def rounded(value: Fraction) -> np.float32:
    """A fraction as float32, rounded once to nearest even (no overflow here)."""
    near = np.float32(float(value))
    candidates = [near, np.nextafter(near, np.float32(INF)), np.nextafter(near, np.float32(-INF))]
    best = min(abs(Fraction(float(c)) - value) for c in candidates)
    ties = [c for c in candidates if abs(Fraction(float(c)) - value) == best]
    return ties[0] if len(ties) == 1 else next(c for c in ties if bits(np.array([c]))[0] % 2 == 0)


def test_fma_rounds_once() -> None:
    """(1 + 2**-12)**2 - (1 + 2**-11) is 2**-24: separate rounding loses it. And a sum that float64 itself rounds onto
    the midpoint of two float32 numbers."""
    a = np.array([1 + 2**-12, 1 + 2**-23, 1 + 2**-12, 3.0], np.float32)
    b = np.array([1 + 2**-12, 1 + 2**-23, 1 - 2**-12, 7.0], np.float32)
    c = np.array([-(1 + 2**-11), 2**-24 - 2**-47, 2**-60, -21.0], np.float32)
    tiny = np.float32(2.0**-100)
    a = np.append(a, [np.float32(1 + 2**-23), tiny])
    b = np.append(b, [np.float32(1 + 2**-1), tiny])
    c = np.append(c, [np.float32(2**-60), np.float32(1)])
    rng = np.random.default_rng(3)
    a, b, c = (np.append(x, rng.standard_normal(200).astype(np.float32)) for x in (a, b, c))
    (got,) = lanewise("fma.rn.f32 %o, %a, %b, %c;", [bits(a), bits(b), bits(c)], [np.uint32])
    want = np.array(
        [rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)]
    )
    np.testing.assert_array_equal(got.view(np.float32), want)
    separate = (a * b) + c
    assert (separate != want).any(), "the case must tell one rounding from two"


def test_fma_is_not_rounded_by_float64_first() -> None:
    """(1 + 2**-23) * 2**-24 (1 - 2**-23) + 1 + 2**-23 lies below a midpoint of float32 by 2**-70, which float64 drops.
    (1 + 2**-23) * 2**-24 (1 - 2**-23) + 1 + 2**-23 lies below a midpoint of float32 by 2**-70, which float64 drops."""
    one = np.float32(1 + 2**-23)
    a, b, c = (np.array([v], np.float32) for v in (one, 2**-24 * (1 - 2**-23), one))
    through_float64 = (a.astype(np.float64) * b + c).astype(np.float32)
    assert through_float64[0] == np.float32(1 + 2**-22), "the case must be one that rounds twice"
    (got,) = lanewise("fma.rn.f32 %o, %a, %b, %c;", [bits(a), bits(b), bits(c)], [np.uint32])
    assert got.view(np.float32)[0] == one


@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes(name: str) -> None:
    a = np.array([1, NAN, NAN, 0.0, -0.0, -INF, 5], np.float32)
    b = np.array([2, 3, NAN, -0.0, 0.0, INF, -5], np.float32)
    low, high = [1, 3, NAN, -0.0, -0.0, -INF, -5], [2, 3, NAN, 0.0, 0.0, INF, 5]
    want = np.array(low if name == "min" else high, np.float32)
    same(binary(f"{name}.f32 %o, %a, %b;", a, b), want)
    same(binary(f"{name}.NaN.f32 %o, %a, %b;", a, b), np.where(np.isnan(a) | np.isnan(b), np.float32(NAN), want))


@pytest.mark.parametrize(
    "code",
    [
        "add.f32 %o, %a, %b;", "sub.f32 %o, %a, %b;", "mul.f32 %o, %a, %b;", "div.rn.f32 %o, %a, %b;",
        "add.rz.f32 %o, %a, %b;", "fma.rn.f32 %o, %a, %b, %b;", "min.NaN.f32 %o, %a, %b;", "max.f32 %o, %a, %b;",
        "sqrt.rn.f32 %o, %a;", "ex2.approx.f32 %o, %a;",
    ],
)  # fmt: skip
def test_every_nan_has_the_same_bits(code: str) -> None:
    """Whatever the operands' signs and payloads are: an order of summands cannot be told from the sum."""
    a = np.array([0x7FC00001, 0xFFC00002, 0x7F800003, 0x7FFF7FFF], np.uint32)
    (got,) = lanewise(code, [a, a[::-1].copy()], [np.uint32])
    np.testing.assert_array_equal(got, 0x7FFFFFFF)


def test_a_nan_that_arithmetic_makes() -> None:
    a, b = np.array([INF, 0.0, 1.0], np.float32), np.array([-INF, INF, 2.0], np.float32)
    assert [hex(x) for x in bits(binary("add.f32 %o, %a, %b;", a, b))] == ["0x7fffffff", "0x7f800000", "0x40400000"]
    assert [hex(x) for x in bits(binary("mul.f32 %o, %a, %b;", a, b))] == ["0xff800000", "0x7fffffff", "0x40000000"]


def test_signs() -> None:
    a, b = numbers(seed=4), numbers(seed=5)
    np.testing.assert_array_equal(bits(unary("neg.f32 %o, %a;", a)), bits(a) ^ 0x80000000)
    np.testing.assert_array_equal(bits(unary("abs.f32 %o, %a;", a)), bits(a) & 0x7FFFFFFF)
    with_sign = binary("copysign.f32 %o, %a, %b;", a, b)
    np.testing.assert_array_equal(bits(with_sign), bits(a) & 0x80000000 | bits(b) & 0x7FFFFFFF)


@pytest.mark.parametrize(
    ("code", "function", "tolerance"),
    [
        ("sqrt.rn.f32", np.sqrt, 0),
        ("sqrt.approx.f32", np.sqrt, 2**-22),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 2**-22),
        ("rcp.rn.f32", lambda x: 1 / x, 2**-24),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 2**-22),
        ("ex2.approx.f32", np.exp2, 2**-22),
        ("ex2.approx.ftz.f32", np.exp2, 2**-22),
        ("lg2.approx.f32", np.log2, 2**-22),
        ("tanh.approx.f32", np.tanh, 2**-10),
        ("sin.approx.f32", np.sin, 2**-20),
        ("cos.approx.f32", np.cos, 2**-20),
    ],
)
def test_functions(code: str, function: Callable[[np.ndarray], np.ndarray], tolerance: float) -> None:
    values = np.array([0.0, -0.0, 1.0, 2.0, -1.0, 0.5, INF, -INF, NAN, 3.7, 100.0, -100.0, 1e-3], np.float32)
    with np.errstate(all="ignore"):
        want = function(values.astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(unary(f"{code} %o, %a;", values), want, rtol=tolerance + 1e-12, atol=tolerance)


def test_rsqrt_rounds_once() -> None:
    """1/sqrt in float32 steps would be wrong by an ulp on some inputs; the exact value is the reference."""
    values = np.linspace(1, 2, 1000, dtype=np.float32)
    got = unary("rsqrt.approx.f32 %o, %a;", values)
    np.testing.assert_array_equal(got, (1 / np.sqrt(values.astype(np.float64))).astype(np.float32))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma", "max", "min"])
def test_halves(name: str, packed: bool, kind: str) -> None:
    """Against float64 rounded once to the half type by torch."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(128, generator=generator).mul(torch.logspace(-3, 3, 128, base=2)).to(dtype) for _ in range(3)
    ]
    a, b, c = (t.double() for t in tensors)
    exact = {"add": a + b, "sub": a - b, "mul": a * b, "fma": a * b + c, "max": a.maximum(b), "min": a.minimum(b)}[name]
    # torch converts float64 to half through float32; round to odd first so that the pair of roundings counts as one
    near = exact.float()
    cut = near.view(torch.int32) - ((near.double().abs() > exact.abs()).int())
    odd = torch.where(near.double() != exact, cut | 1, near.view(torch.int32)).view(torch.float32)
    want = odd.to(dtype).view(torch.int16).numpy().view(np.uint16)
    inputs = [t.view(torch.int16).numpy().view(np.uint16) for t in tensors[: 3 if name == "fma" else 2]]
    rounding = ".rn" if name == "fma" else ""
    names = ", ".join(f"%{n}" for n in "abc"[: len(inputs)])
    if packed:
        (got,) = lanewise(f"{name}{rounding}.{kind}x2 %o, {names};", [x.view(np.uint32) for x in inputs], [np.uint32])
        got = got.view(np.uint16)
    else:
        (got,) = lanewise(f"{name}{rounding}.{kind} %o, {names};", inputs, [np.uint16])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_negation(kind: str) -> None:
    a = np.array([0x3C00BC00, 0x00008000, 0x7FFF0001], np.uint32)
    (got,) = lanewise(f"neg.{kind}x2 %o, %a;", [a], [np.uint32])
    np.testing.assert_array_equal(got, a ^ np.uint32(0x80008000))


ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("name", [*ORDERED, "num", "nan", *(f"{n}u" for n in ORDERED)])
def test_float_comparisons(name: str) -> None:
    """Ordered forms are false with a NaN, unordered forms true."""
    values = np.array([1, 2, NAN, -0.0, 0.0, INF], np.float32)
    a, b = (x.reshape(-1) for x in np.meshgrid(values, values))
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        want = unordered if name == "nan" else ~unordered
    else:
        want = ORDERED[name.removesuffix("u") if name not in ORDERED else name](a, b)
        if name not in ORDERED:
            want = want | unordered
    (got,) = lanewise(f"setp.{name}.f32 %o, %a, %b;", [bits(a), bits(b)], [bool])
    np.testing.assert_array_equal(got, want)


def test_integer_comparisons() -> None:
    a = np.array([0, 1, 0xFFFFFFFF, 0x80000000, 5], np.uint32)
    a, b = (x.reshape(-1) for x in np.meshgrid(a, a))
    for names, x, y, kind in (
        (("eq", "ne", "lt", "le", "gt", "ge"), a.view(np.int32), b.view(np.int32), "s32"),
        (("eq", "ne", "lt", "le", "gt", "ge"), a, b, "u32"),
        (("lo", "ls", "hi", "hs"), a, b, "u32"),
        (("eq", "ne"), a, b, "b32"),
    ):
        plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
        for name in names:
            (got,) = lanewise(f"setp.{name}.{kind} %o, %a, %b;", [a, b], [bool])
            np.testing.assert_array_equal(got, x != y if name == "ne" else ORDERED[plain.get(name, name)](x, y))


def test_combined_comparisons_and_two_destinations() -> None:
    a, b = np.array([1, 1, 2, 2], np.uint32), np.array([0, 1, 0, 1], np.uint32)
    head = "setp.ne.u32 %p3, %b, 0;"
    first, second = a == 1, b != 0
    for name, want in {"and": first & second, "or": first | second, "xor": first ^ second}.items():
        (got,) = lanewise(f"{head} setp.eq.{name}.u32 %o, %a, 1, %p3;", [a, b], [bool])
        np.testing.assert_array_equal(got, want)
    got, complement = lanewise(f"{head} setp.eq.and.u32 %o|%q, %a, 1, !%p3;", [a, b], [bool, bool])
    np.testing.assert_array_equal(got, first & ~second)
    np.testing.assert_array_equal(complement, ~first & ~second)


def test_set_and_testp() -> None:
    a = np.array([1, NAN, INF, 1e-40], np.float32)
    (got,) = lanewise("set.gt.u32.f32 %o, %a, 0f00000000;", [bits(a)], [np.uint32])
    assert got.tolist() == [0xFFFFFFFF, 0, 0xFFFFFFFF, 0xFFFFFFFF]
    for name, want in {
        "finite": [1, 0, 0, 1],
        "notanumber": [0, 1, 0, 0],
        "subnormal": [0, 0, 0, 1],
        "infinite": [0, 0, 1, 0],
    }.items():
        (flag,) = lanewise(f"testp.{name}.f32 %o, %a;", [bits(a)], [bool])
        assert flag.tolist() == [bool(v) for v in want]


def test_literals() -> None:
    a = np.zeros(4, np.float32)
    assert unary("add.f32 %o, %a, 0f3FC00000;", a)[0] == 1.5
    assert unary("add.f32 %o, %a, 2.5;", a)[0] == 2.5
    assert unary("add.f64 %o, %a, 0d4004000000000000;", a.astype(np.float64))[0] == 2.5
    (got,) = lanewise("add.s32 %o, %a, -010;", [np.array([10, 8], np.uint32)], [np.uint32])
    assert got.tolist() == [2, 0], "an octal number"


@pytest.mark.parametrize("text", ["add.rz.f64 %d1, %d2, %d3;", "fma.rn.oob.f16 %h1, %h2, %h3, %h4;"])
def test_unknown_rounding_is_refused(text: str) -> None:
    with pytest.raises(ptx_emulator.Unsupported, match=text.split()[0]):
        run(entry(text, 0), [])


def once(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b + c of float64, rounded once."""
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    return np.array([float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in rows])


def test_fma_of_float64_is_rounded_once() -> None:
    """What is left of a product, which libraries of double-double numbers take this way, and numbers near the ends."""
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal(300), rng.standard_normal(300)
    a[200:], b[200:] = a[200:] * 2.0 ** rng.integers(-500, 500, 100), b[200:] * 2.0 ** rng.integers(-500, 500, 100)
    c = np.where(np.arange(300) < 100, -(a * b), rng.standard_normal(300) * 10.0 ** rng.integers(-30, 10, 300))
    a[-3:], b[-3:], c[-3:] = [2.0**-600, 2.0**600, 1e308], [2.0**-500, 2.0**500, 1e308], [2.0**-1074, 1.0, -INF]
    (got,) = lanewise("fma.rn.f64 %o, %a, %b, %c;", [bits(a), bits(b), bits(c)], [np.uint64])
    want = np.append(once(a[:-2], b[:-2], c[:-2]), [INF, -INF])
    same(got.view(np.float64), want)


def test_what_is_far_below_decides_a_tie() -> None:
    """7 times 37/256 lies in the middle between two numbers of bf16; 2^-100 more is above it, and less below it."""
    values = np.array([[7.0, 7.0], [37 / 256, 37 / 256], [2**-100, -(2**-100)]], np.float32)
    a, b, c = values.view(np.uint32) >> 16
    pair = np.uint32(0x10001)
    (got,) = lanewise("fma.rn.bf16x2 %o, %a, %b, %c;", [a * pair, b * pair, c * pair], [np.uint32])
    assert (got << 16).view(np.float32).tolist() == [130 / 128, 129 / 128]
    assert (got >> 16 == got & 0xFFFF).all()


@pytest.mark.parametrize(
    ("mode", "more", "less"), [("rz", 1.0, 1 - 2**-24), ("rm", 1.0, 1 - 2**-24), ("rp", 1 + 2**-23, 1.0)]
)
def test_directed_roundings_see_what_is_far_below(mode: str, more: float, less: float) -> None:
    one, tiny = np.ones(2, np.float32), np.array([2**-100, -(2**-100)], np.float32)
    assert binary(f"add.{mode}.f32 %o, %a, %b;", one, tiny).tolist() == [more, less]
    assert binary(f"sub.{mode}.f32 %o, %a, %b;", one, -tiny).tolist() == [more, less]
    (got,) = lanewise(f"fma.{mode}.f32 %o, %a, %a, %b;", [bits(one), bits(tiny)], [np.uint32])
    assert got.view(np.float32).tolist() == [more, less]
    zero = binary(f"add.{mode}.f32 %o, %a, %b;", one, -one)
    assert np.signbit(zero).all() == (mode == "rm")


def test_saturation_leaves_no_minus_zero() -> None:
    x = np.array([-0.0, NAN, -3.0, 0.5, 7.0], np.float32)
    same(binary("add.sat.f32 %o, %a, %b;", x, x * 0), np.array([0.0, 0.0, 0.0, 0.5, 1.0], np.float32))
