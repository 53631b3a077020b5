"""cvt between all types. Source: PTX ISA, "Data Movement and Conversion Instructions: cvt"."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator.core.decode import Action, Decoder, Modifiers, assign, instruction
from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.formats import FROM_F32, TO_F32, f32_to_tf32, sticky
from ptx_emulator.core.spaces import FLOAT, SIGNED, UNSIGNED, Array
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction

INTEGERS = {f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)}
FLOATS = ("f16", "bf16", "f32", "f64")
_ROUND: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _read(kind: str) -> Callable[[Array], Array]:
    """A register as an array of type `kind`; a wider register gives its low bits."""
    size = TYPE_BYTES[kind]
    if kind in TO_F32:
        return TO_F32[kind]
    if kind in FLOATS:
        return lambda a: a.view(FLOAT[size])
    integer = (SIGNED if kind[0] == "s" else UNSIGNED)[size]
    return lambda a: (a if a.dtype.itemsize == size else a.astype(UNSIGNED[size])).view(integer)


def _to_integer(kind: str, source: str, rounding: str) -> Callable[[Array], Array]:
    """Float to integer: rounds, clamps to the range; NaN to zero, or to the highest bit alone where one is wide."""
    size = TYPE_BYTES[kind]
    integer = (SIGNED if kind[0] == "s" else UNSIGNED)[size]
    of_nan = UNSIGNED[size](1 << (8 * size - 1) if size == 8 or source == "f64" else 0).view(integer)
    info = np.iinfo(integer)
    top = float(info.max) + 1 if size == 8 else float(info.max)

    def run(value: Array) -> Array:
        value = _ROUND[rounding](value.astype(np.float64))
        nan = value != value
        inside = np.clip(np.where(nan, 0.0, value), float(info.min), np.nextafter(top, 0) if size == 8 else top)
        out = inside.astype(integer)
        out = np.where(value >= top, info.max, out).astype(integer)
        return np.where(nan, of_nan, out)

    return run


def _integer_to_integer(kind: str, source: str, saturate: bool) -> Callable[[Array], Array]:
    integer: Any = (SIGNED if kind[0] == "s" else UNSIGNED)[TYPE_BYTES[kind]]
    if not saturate:
        return lambda value: value.astype(integer)
    low, high = np.iinfo(integer).min, np.iinfo(integer).max
    limits = np.iinfo((SIGNED if source[0] == "s" else UNSIGNED)[TYPE_BYTES[source]])
    low, high = max(low, limits.min), min(high, limits.max)
    return lambda value: np.clip(value, value.dtype.type(low), value.dtype.type(high)).astype(integer)


def _to_float(kind: str, rounding: str | None) -> Callable[[Array], Array]:
    """Any typed array to the bits of a float type."""
    if rounding == "rz" and kind not in FROM_F32:
        return lambda value: _towards_zero(value, kind)
    if kind in FROM_F32:
        down, mode = FROM_F32[kind], rounding or "rn"
        # a float64 or integer source is first cut to float32 with a sticky last bit, so that only `down` rounds
        return lambda value: down(value if value.dtype == np.float32 else sticky(value), mode)
    size = TYPE_BYTES[kind]
    return lambda value: value.astype(FLOAT[size]).view(UNSIGNED[size])


def _towards_zero(value: Array, kind: str) -> Array:
    size = TYPE_BYTES[kind]
    near = value.astype(FLOAT[size])
    wide = value.astype(np.longdouble)
    bits = near.view(UNSIGNED[size])
    return np.where(np.abs(near.astype(np.longdouble)) > np.abs(wide), bits - UNSIGNED[size](1), bits)


def _widen(bits: Array, size: int) -> Array:
    """An integer result in a register of `size` bytes: extended by its sign when signed."""
    if bits.dtype.itemsize == size:
        return bits.view(UNSIGNED[size])
    if bits.dtype.kind == "i":
        return bits.astype(SIGNED[size]).view(UNSIGNED[size])
    return bits.astype(UNSIGNED[size])


@instruction("cvt")
def build_convert(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    types = mods.types()
    rounding = mods.take("rn", "rz", "rna", "rni", "rzi", "rmi", "rpi")
    saturate, relu = mods.take("sat") is not None, mods.take("relu") is not None
    finite = types[0] == "tf32" and mods.take("satfinite") is not None
    mods.drop("ftz")
    mods.end()
    if len(types) != 2:
        raise Unsupported(f"unsupported: {ins.text}")
    kind, source = types
    if kind in ("f16x2", "bf16x2"):
        return _pack(d, ins, kind.removesuffix("x2"), source, rounding or "rn", relu)
    if kind == "tf32" and source == "f32" and rounding:
        out = d.destination(ins.operands[0], "b32", ins)
        number = d.source(ins.operands[1], "b32", ins)
        return assign(out, lambda a: f32_to_tf32(a.view(np.float32), rounding, finite), number)
    if not {kind, source} <= {*INTEGERS, *FLOATS} or (relu and kind not in FROM_F32):
        raise Unsupported(f"unsupported: {ins.text}")
    read = _read(source)
    step = _conversion(kind, source, rounding, saturate, relu, ins)
    out = d.destination(ins.operands[0], kind, ins, loose=kind in INTEGERS)
    size = d.widths[out] if out < len(d.widths) else TYPE_BYTES[kind]
    number = d.source(ins.operands[1], source, ins, loose=source in INTEGERS)
    return assign(out, lambda a: _widen(step(read(a)), size), number)


def _conversion(
    kind: str, source: str, rounding: str | None, saturate: bool, relu: bool, ins: Instruction
) -> Callable[[Array], Array]:
    """From a typed array to the result: integers typed, floats as bits."""
    if kind in INTEGERS and source in INTEGERS:
        return _integer_to_integer(kind, source, saturate)
    if kind in INTEGERS:
        if rounding not in _ROUND:
            raise Unsupported(f"unsupported: {ins.text}")
        return _to_integer(kind, source, rounding)
    convert = _to_float(kind, rounding if rounding in ("rn", "rz") else None)

    def run(value: Array) -> Array:
        if rounding in _ROUND:
            value = _ROUND[rounding](value)
        if saturate:
            value = np.where(value > 0, np.minimum(value, 1), np.zeros_like(value))
        if relu:
            value = np.where(value < 0, np.zeros_like(value), value)
        return convert(value)

    return run


def _pack(d: Decoder, ins: Instruction, kind: str, source: str, rounding: str, relu: bool) -> Action:
    """`cvt.rn.bf16x2.f32 d, a, b`: a becomes the upper half, b the lower."""
    if source != "f32" or len(ins.operands) != 3 or rounding not in ("rn", "rz"):
        raise Unsupported(f"unsupported: {ins.text}")
    down = FROM_F32[kind]

    def half(a: Array) -> Array:
        value = a.view(np.float32)
        return down(np.where(value < 0, np.float32(0), value) if relu else value, rounding).astype(np.uint32)

    sources = [d.source(o, "f32", ins) for o in ins.operands[1:]]
    return assign(d.destination(ins.operands[0], "b32", ins), lambda a, b: half(a) << np.uint32(16) | half(b), *sources)
