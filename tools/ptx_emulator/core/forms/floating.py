"""Floating-point arithmetic in f32, f64, f16 and bf16, packed pairs included, and comparisons of every type.

Source: PTX ISA, "Floating-Point Instructions", "Half Precision Floating-Point Instructions", "Comparison and
Selection". The approximate units (ex2, lg2, rcp, rsqrt, sqrt, tanh, sin, cos, div.full) are as exact here as NumPy, or
as float64 rounded once (ex2, rsqrt), and `.ftz` flushes nothing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator.core.decode import Action, Decoder, Modifiers, assign, instruction
from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.exact import fma_f32, fma_f64, sum_to_odd
from ptx_emulator.core.formats import FROM_F32, TO_F32, canonical, sticky
from ptx_emulator.core.forms.integer import view_type
from ptx_emulator.core.spaces import FLOAT, UNSIGNED, Array
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction, Pair

FLOAT_TYPES = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
Function = Callable[..., Array]


def _minimum(function: Function, other: Function) -> Function:
    """PTX min and max: a NaN loses against a number, and -0 is below +0."""

    def run(a: Array, b: Array) -> Array:
        value = other(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            first = np.signbit(a) if function is np.minimum else ~np.signbit(a)
            value = np.where(zeros, np.where(first, a, b), value)
        return value

    return run


def _wrap(function: Function, kind: str) -> Function:
    """A function of float arrays as one of registers of type `kind`;
    halves are computed in float32 and rounded once."""
    if kind == "f32":
        return lambda *args: canonical(function(*(a.view(np.float32) for a in args)))
    if kind == "f64":
        return lambda *args: function(*(a.view(np.float64) for a in args)).view(np.uint64)
    base = kind.removesuffix("x2")
    up, down = TO_F32[base], FROM_F32[base]
    if base == kind:
        return lambda *args: down(function(*(up(a) for a in args)))
    low, half = np.uint32(0xFFFF), np.uint32(16)

    def packed(*args: Array) -> Array:
        bottom = down(function(*(up((a & low).astype(np.uint16)) for a in args)))
        top = down(function(*(up((a >> half).astype(np.uint16)) for a in args)))
        return bottom.astype(np.uint32) | top.astype(np.uint32) << half

    return packed


def _float_type(mods: Modifiers) -> str | None:
    types = mods.types()
    return types[0] if len(types) == 1 and types[0] in FLOAT_TYPES else None


def _finish(function: Function, mods: Modifiers) -> Function:
    """Add `.sat` and `.relu`."""
    if mods.take("sat"):
        plain = function

        def function(*args: Array) -> Array:
            value = plain(*args)
            return np.where(value > 0, np.minimum(value, 1), np.zeros_like(value))  # NaN and -0 too become +0

    if mods.take("relu"):
        unclamped = function

        def function(*args: Array) -> Array:  # NaN stays NaN
            value = unclamped(*args)
            return np.where(value < 0, np.zeros_like(value), value)

    return function


def _directed(exact: Function, mode: str) -> Function:
    """A float32 operation rounded towards zero (rz), down (rm) or up (rp), from float64 values that lie on the same
    side of every float32 as the exact result."""

    def run(*args: Array) -> Array:
        value = exact(*(a.astype(np.float64) for a in args))
        near = value.astype(np.float32)
        below, above = np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))
        down = np.where(near > value, below, near)
        up = np.where(near < value, above, near)
        return down if mode == "rm" else up if mode == "rp" else np.where(value < 0, up, down)

    return run


def _sum(mode: str) -> Function:
    """A sum for `_directed`: towards minus infinity numbers that cancel leave -0."""
    return sum_to_odd if mode != "rm" else lambda a, b: -sum_to_odd(-a, -b)


def _operation(d: Decoder, ins: Instruction, kind: str, function: Function, mods: Modifiers) -> Action:
    function = _finish(function, mods)
    mods.drop("ftz", "rn", "approx", "full")
    mods.end()
    out = d.destination(ins.operands[0], kind, ins)
    return assign(out, _wrap(function, kind), *(d.source(o, kind, ins) for o in ins.operands[1:]))


@instruction("add", "sub", "mul", "div")
def build_arithmetic(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _float_type(mods)
    if kind is None:
        return None
    function: Function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[ins.root]
    mode = mods.take("rz", "rm", "rp") if kind == "f32" else None
    if mode:
        plus = _sum(mode)
        sums: dict[str, Function] = {"add": plus, "sub": lambda a, b: plus(a, -b)}
        return _operation(d, ins, kind, _directed(sums.get(ins.root, function), mode), mods)
    if kind not in ("f32", "f64") and ins.root in ("add", "sub"):
        exact = function  # in float64, so that the step to 16 bits is the only rounding
        return _operation(d, ins, kind, lambda a, b: sticky(exact(a.astype(np.float64), b)), mods)
    return _operation(d, ins, kind, function, mods)


@instruction("fma", "mad")
def build_fma(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _float_type(mods)
    if kind is None:
        return None
    if kind == "f64":
        return _operation(d, ins, kind, fma_f64, mods)
    if kind == "f32":
        mode = mods.take("rz", "rm", "rp")
        if mode is None:
            return _operation(d, ins, kind, fma_f32, mods)
        plus = _sum(mode)
        return _operation(d, ins, kind, _directed(lambda a, b, c: plus(a * b, c), mode), mods)
    return _operation(d, ins, kind, lambda a, b, c: sticky(sum_to_odd(a.astype(np.float64) * b, c)), mods)


@instruction("min", "max")
def build_extreme(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _float_type(mods)
    if kind is None:
        return None
    exact, lenient = (np.minimum, np.fmin) if ins.root == "min" else (np.maximum, np.fmax)
    function = _minimum(exact, exact if mods.take("NaN") else lenient)
    if mods.take("xorsign"):
        mods.drop("abs")
        magnitude = function

        def function(a: Array, b: Array) -> Array:
            return np.copysign(
                magnitude(np.abs(a), np.abs(b)), np.where(np.signbit(a) != np.signbit(b), -1.0, 1.0)
            ).astype(a.dtype)

    if len(ins.operands) == 4:
        two = function
        return _operation(d, ins, kind, lambda a, b, c: two(two(a, b), c), mods)
    return _operation(d, ins, kind, function, mods)


def _signs(kind: str) -> tuple[Any, Any]:
    """The bits of a register that are signs, and the others."""
    size = TYPE_BYTES[kind]
    sign = 1 << (8 * size - 1) | (1 << 15 if kind.endswith("x2") else 0)
    return UNSIGNED[size](sign), UNSIGNED[size](~sign & ((1 << 8 * size) - 1))


@instruction("neg", "abs")
def build_sign(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _float_type(mods)
    if kind is None:
        return None
    mods.drop("ftz")
    mods.end()
    flip, keep = _signs(kind)
    function: Function = (lambda a: a ^ flip) if ins.root == "neg" else (lambda a: a & keep)
    return assign(d.destination(ins.operands[0], kind, ins), function, d.source(ins.operands[1], kind, ins))


@instruction("copysign")
def build_copysign(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _float_type(mods)
    if kind is None:
        return None
    mods.end()
    flip, keep = _signs(kind)
    out = d.destination(ins.operands[0], kind, ins)
    return assign(out, lambda sign, a: sign & flip | a & keep, *(d.source(o, kind, ins) for o in ins.operands[1:]))


def _unary(function: Function) -> Function:
    """In float64, rounded once to the operand's precision."""
    return lambda a: function(a.astype(np.float64)).astype(a.dtype)


@instruction("sqrt", "rsqrt", "rcp", "ex2", "lg2", "tanh", "sin", "cos")
def build_transcendental(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _float_type(mods)
    if kind is None:
        return None
    functions: dict[str, Function] = {
        "sqrt": np.sqrt,
        "rsqrt": _unary(lambda a: 1.0 / np.sqrt(a)),
        "rcp": lambda a: a.dtype.type(1) / a,
        "ex2": _unary(np.exp2),
        "lg2": np.log2,
        "tanh": np.tanh,
        "sin": np.sin,
        "cos": np.cos,
    }
    return _operation(d, ins, kind, functions[ins.root], mods)


@instruction("testp")
def build_test(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    which = mods.take("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    kind = _float_type(mods)
    if kind not in ("f32", "f64") or which is None:
        return None
    mods.end()
    view: Any = FLOAT[TYPE_BYTES[kind]]
    tiny = np.finfo(view).tiny
    functions: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: a == a,
        "notanumber": lambda a: a != a,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    function = functions[which]
    source = d.source(ins.operands[1], kind, ins)
    return assign(d.destination(ins.operands[0], "pred", ins), lambda a: function(a.view(view)), source)


_ORDERED: dict[str, Function] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _ordered_not_equal(a: Array, b: Array) -> Array:
    return (a < b) | (a > b)


def comparison(name: str, kind: str) -> Function:
    """The comparison of two typed arrays, with PTX's rules for NaN. Raises KeyError for an unknown name."""
    floating = kind in FLOAT_TYPES
    if name == "ne":
        return _ordered_not_equal if floating else np.not_equal
    if floating and name == "num":
        return lambda a, b: (a == a) & (b == b)
    if floating and name == "nan":
        return lambda a, b: (a != a) | (b != b)
    if floating and name.endswith("u") and name[:-1] in ("eq", "ne", "lt", "le", "gt", "ge"):
        base = comparison(name[:-1], kind)
        return lambda a, b: base(a, b) | (a != a) | (b != b)
    return _ORDERED[name]


def typed(kind: str) -> Function:
    """A register as the array that comparisons of type `kind` work on."""
    if kind in TO_F32:
        return TO_F32[kind]
    if kind in ("f32", "f64"):
        view = FLOAT[TYPE_BYTES[kind]]
        return lambda a: a.view(view)
    integer = view_type("u" + kind[1:] if kind[0] == "b" else kind)
    return lambda a: a.view(integer)


@instruction("setp", "set")
def build_compare(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    types = mods.types()
    mods.drop("ftz")
    combine = mods.take("and", "or", "xor")
    kind = types[-1]
    if kind.endswith("x2") or not mods.left:
        raise Unsupported(f"unsupported: {ins.text}")
    name = mods.left.pop()
    mods.end()
    try:
        compare, view = comparison(name, kind), typed(kind)
    except KeyError:
        raise Unsupported(f"unsupported: {ins.text}") from None
    sources = [d.source(o, kind, ins) for o in ins.operands[1:3]]
    join: Function | None = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.get(combine or "")
    third, negated = d.predicate_source(ins.operands[3], ins) if join else (0, False)

    def both(*args: Array) -> tuple[Array, Array]:
        found = compare(view(args[0]), view(args[1]))
        if join is None:
            return found, ~found
        c = ~args[2] if negated else args[2]
        return join(found, c), join(~found, c)

    if join:
        sources.append(third)
    if ins.root == "set":
        return _set(d, ins, types[0], lambda *a: both(*a)[0], sources)
    target = ins.operands[0]
    if not isinstance(target, Pair):
        return assign(d.destination(target, "pred", ins), lambda *a: both(*a)[0], *sources)
    first = assign(d.destination(target.first, "pred", ins), lambda *a: both(*a)[0], *sources)
    # the complement is taken from the comparison again, so the second destination may be a source of the first
    second_out = d.destination(target.second, "pred", ins)

    def pair(m: Any, mask: Array | None) -> None:
        value = both(*[m.r[s] for s in sources])[1]
        first(m, mask)
        m.r[second_out] = value if mask is None else np.where(mask, value, m.r[second_out])

    return pair


def _set(d: Decoder, ins: Instruction, kind: str, function: Function, sources: list[int]) -> Action:
    true = {"u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF, "f32": 0x3F800000, "b32": 0xFFFFFFFF}.get(kind)
    if true is None:
        raise Unsupported(f"unsupported: {ins.text}")
    out = d.destination(ins.operands[0], kind, ins)
    return assign(out, lambda *a: np.where(function(*a), np.uint32(true), np.uint32(0)), *sources)
