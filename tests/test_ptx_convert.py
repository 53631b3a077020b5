"""cvt: every direction, roundings, saturation, and the halves of packed pairs."""

import numpy as np
import ptx_emulator
import pytest
import torch
from ptx_snippets import edge_values, entry, lanewise, run, signed

INF, NAN = float("inf"), float("nan")
# ties to even in bf16 (…8000) and neighbours, overflow, NaN, infinity, denormals
FLOATS = np.array(
    [1.0, -0.0, NAN, INF, -INF, 3.4e38, 65504.0, 65519.0, 65520.0, 1e-40, 6e-8, 2.98e-8, -1.75], np.float32
)
TIES = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x3F801000, 0x3F803000, 0x3F801001], np.uint32)


def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([FLOATS, TIES.view(np.float32), (rng.standard_normal(200) * 100).astype(np.float32)])


def torch_bits(x: np.ndarray, kind: str) -> np.ndarray:
    """As torch rounds, with PTX's NaN."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    out = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), out)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_float_to_half(kind: str) -> None:
    x = values()
    (got,) = lanewise(f"cvt.rn.{kind}.f32 %o, %a;", [x.view(np.uint32)], [np.uint16])
    np.testing.assert_array_equal(got, torch_bits(x, kind))
    (relu,) = lanewise(f"cvt.rn.relu.{kind}.f32 %o, %a;", [x.view(np.uint32)], [np.uint16])
    np.testing.assert_array_equal(relu, torch_bits(np.where(x < 0, np.float32(0), x), kind))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_pair_order(kind: str) -> None:
    """The first source is the upper half."""
    a, b = values(), values()[::-1].copy()
    (got,) = lanewise(f"cvt.rn.{kind}x2.f32 %o, %a, %b;", [a.view(np.uint32), b.view(np.uint32)], [np.uint32])
    np.testing.assert_array_equal(got >> 16, torch_bits(a, kind))
    np.testing.assert_array_equal(got & 0xFFFF, torch_bits(b, kind))


def test_towards_zero() -> None:
    x = values()
    (got,) = lanewise("cvt.rz.bf16.f32 %o, %a;", [x.view(np.uint32)], [np.uint16])
    want = np.where(np.isnan(x), 0x7FFF, x.view(np.uint32) >> 16)
    np.testing.assert_array_equal(got, want)
    finite = np.abs(values()) < 60000
    (got,) = lanewise("cvt.rz.f16.f32 %o, %a;", [x[finite].view(np.uint32)], [np.uint16])
    half = got.view(np.float16).astype(np.float32)
    assert (np.abs(half) <= np.abs(x[finite])).all()
    assert (
        np.abs(np.nextafter(got.view(np.float16), np.copysign(np.float16(INF), x[finite].astype(np.float16))))
        > np.abs(x[finite])
    ).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_half_to_float_is_exact(kind: str) -> None:
    x = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    (got,) = lanewise(f"cvt.f32.{kind} %o, %a;", [x], [np.uint32])
    want = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16 if kind == "bf16" else torch.float16).float().numpy()
    np.testing.assert_array_equal(got.view(np.float32), want)


def test_double_to_half_rounds_once() -> None:
    """1 + 2**-11 + 2**-40 is above a tie of f16 that float32 would hide."""
    x = np.array([1 + 2**-11 + 2**-40, 1 + 2**-11, 1 + 3 * 2**-11], np.float64)
    (got,) = lanewise("cvt.rn.f16.f64 %o, %a;", [x.view(np.uint64)], [np.uint16])
    assert got.view(np.float16).tolist() == [1 + 2**-10, 1.0, 1 + 2 * 2**-10]


def test_tf32() -> None:
    x = np.array([0x3F801000, 0x3F800FFF, 0x3F803000, 0x3F801001], np.uint32)
    (away,) = lanewise("cvt.rna.tf32.f32 %o, %a;", [x], [np.uint32])
    assert away.tolist() == [0x3F802000, 0x3F800000, 0x3F804000, 0x3F802000]
    (even,) = lanewise("cvt.rn.tf32.f32 %o, %a;", [x], [np.uint32])
    assert even.tolist() == [0x3F800000, 0x3F800000, 0x3F804000, 0x3F802000]
    special = np.array([INF, -INF, NAN], np.float32).view(np.uint32)
    (kept,) = lanewise("cvt.rna.tf32.f32 %o, %a;", [special], [np.uint32])
    assert kept.tolist() == [0x7F800000, 0xFF800000, 0x7FFFFFFF]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u8"])
@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer(kind: str, rounding: str) -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, NAN, INF, -INF, 100.25, -100.75, 300.0], np.float32)
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    step = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    register = max(bits, 16)
    (got,) = lanewise(
        f"cvt.{rounding}.{kind}.f32 %o, %a;",
        [x.view(np.uint32)],
        [{16: np.uint16, 32: np.uint32, 64: np.uint64}[register]],
    )
    for value, result in zip(x.tolist(), got.tolist(), strict=True):
        want = (
            1 << 63
            if np.isnan(value) and bits == 64
            else 0
            if np.isnan(value)
            else low
            if value == -INF
            else high
            if value == INF
            else min(max(int(step(value)), low), high)
        )
        assert result == want & ((1 << register) - 1), f"{value} to {kind}"


def test_integer_to_float() -> None:
    a = np.array([0, 1, 0xFFFFFFFF, 0x80000000, 16777217, 33554435], np.uint32)
    (got,) = lanewise("cvt.rn.f32.s32 %o, %a;", [a], [np.uint32])
    np.testing.assert_array_equal(got.view(np.float32), a.view(np.int32).astype(np.float32))
    (got,) = lanewise("cvt.rn.f32.u32 %o, %a;", [a], [np.uint32])
    np.testing.assert_array_equal(got.view(np.float32), a.astype(np.float32))
    (got,) = lanewise("cvt.rz.f32.u32 %o, %a;", [a], [np.uint32])
    assert (got.view(np.float32).astype(np.float64) <= a).all()
    assert got.view(np.float32)[4] == 16777216
    (half,) = lanewise("cvt.rn.bf16.s32 %o, %a;", [np.array([257, 258, 259], np.uint32)], [np.uint16])
    np.testing.assert_array_equal(
        half, torch.tensor([256.0, 258.0, 260.0]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    )


@pytest.mark.parametrize(
    ("kind", "source"), [("u64", "u32"), ("s64", "s32"), ("u32", "u64"), ("s32", "s16"), ("u16", "u32"), ("s32", "s8")]
)
def test_extension_and_truncation(kind: str, source: str) -> None:
    have, want_bits = int(source[1:]), int(kind[1:])
    a = edge_values(max(have, 16), 64)
    (got,) = lanewise(f"cvt.{kind}.{source} %o, %a;", [a], [{16: np.uint16, 32: np.uint32, 64: np.uint64}[want_bits]])
    for value, result in zip(a.tolist(), got.tolist(), strict=True):
        value &= (1 << have) - 1
        read = signed(value, have) if source[0] == "s" else value
        assert result == read & ((1 << want_bits) - 1)


def test_saturating_integers() -> None:
    a = np.array([0, 5, 127, 128, 300, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0xFFFFFF80], np.uint32)
    (got,) = lanewise("cvt.sat.s8.s32 %o, %a;", [a], [np.uint32])
    assert got.view(np.int32).tolist() == [0, 5, 127, 127, 127, 127, -1, -128, -128]
    (got,) = lanewise("cvt.sat.u8.s32 %o, %a;", [a], [np.uint32])
    assert got.tolist() == [0, 5, 127, 128, 255, 255, 0, 0, 0]


def test_integral_rounding_and_saturation_of_floats() -> None:
    x = np.array([0.5, 1.5, -0.5, 2.7, NAN, -3.2], np.float32)
    (got,) = lanewise("cvt.rni.f32.f32 %o, %a;", [x.view(np.uint32)], [np.uint32])
    np.testing.assert_array_equal(got.view(np.float32), np.rint(x))
    (got,) = lanewise("cvt.sat.f32.f32 %o, %a;", [x.view(np.uint32)], [np.uint32])
    np.testing.assert_array_equal(got.view(np.float32), np.array([0.5, 1, 0, 1, 0, 0], np.float32))


@pytest.mark.parametrize(
    "text", ["cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;", "cvt.rm.f32.f64 %f1, %d1;", "cvt.s32.f32 %r1, %f1;"]
)
def test_unknown_conversions_are_refused(text: str) -> None:
    with pytest.raises(ptx_emulator.Unsupported, match=r"cvt\."):
        run(entry(text, 0), [])


@pytest.mark.parametrize(("source", "dtype"), [("f32", np.float32), ("f64", np.float64), ("f16", np.float16)])
@pytest.mark.parametrize("kind", ["s8", "u16", "s32", "u32", "s64", "u64"])
def test_not_a_number_to_integer(source: str, dtype: type, kind: str) -> None:
    """Zero from and to narrow types; the highest bit alone where the source is f64 or the destination has 64 bits."""
    bits = int(kind[1:])
    holds = {8: np.uint16, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    nan = np.array([NAN], dtype)
    (got,) = lanewise(f"cvt.rzi.{kind}.{source} %o, %a;", [nan.view(f"u{nan.itemsize}")], [holds])
    want = 1 << (bits - 1) if source == "f64" or bits == 64 else 0
    assert int(got[0]) & (1 << bits) - 1 == want


def test_tf32_kept_finite() -> None:
    x = np.array([INF, -INF, 3.4028235e38, 1.0, NAN], np.float32)
    (got,) = lanewise("cvt.rna.satfinite.tf32.f32 %o, %a;", [x.view(np.uint32)], [np.uint32])
    assert got[:4].tolist() == [0x7F7FE000, 0xFF7FE000, 0x7F7FE000, 0x3F800000]
    assert got[4] & 0x7F800000 == 0x7F800000
    assert got[4] & 0x007FFFFF
