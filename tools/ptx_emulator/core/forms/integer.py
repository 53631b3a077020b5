"""Integer arithmetic, logic, shifts and bit fields. Source: PTX ISA, "Integer Arithmetic", "Logic and Shift"."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator.core.decode import Action, Decoder, Modifiers, assign, instruction
from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.spaces import SIGNED, UNSIGNED, Array
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction

INTEGER_TYPES = {f"{kind}{bits}" for kind in "us" for bits in (16, 32, 64)}


def view_type(kind: str) -> Any:
    """The NumPy integer type that reads a register as `kind`."""
    return (SIGNED if kind[0] == "s" else UNSIGNED)[TYPE_BYTES[kind]]


def as_type(function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    """A function of typed arrays as one of registers."""
    if kind[0] != "s":
        return function
    signed, unsigned = view_type(kind), UNSIGNED[TYPE_BYTES[kind]]
    return lambda *args: function(*(a.view(signed) for a in args)).view(unsigned)


def _plain(d: Decoder, ins: Instruction, kind: str, function: Callable[..., Array]) -> Action:
    out = d.destination(ins.operands[0], kind, ins)
    return assign(out, function, *(d.source(o, kind, ins) for o in ins.operands[1:]))


def _type_of(mods: Modifiers, ins: Instruction) -> str | None:
    """The single type of an integer instruction, or None when another builder is to answer."""
    types = mods.types()
    return types[0] if len(types) == 1 and types[0] in INTEGER_TYPES else None


@instruction("add", "sub")
def build_add(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _type_of(mods, ins)
    if kind is None:
        return None
    saturate = mods.take("sat")
    mods.end()
    plus = np.add if ins.root == "add" else np.subtract
    if saturate is None:
        return _plain(d, ins, kind, plus)
    if kind != "s32":
        raise Unsupported(f"unsupported: {ins.text}")

    def saturated(a: Array, b: Array) -> Array:
        wide = plus(a.view(np.int32).astype(np.int64), b.view(np.int32).astype(np.int64))
        return np.clip(wide, -(1 << 31), (1 << 31) - 1).astype(np.int32).view(np.uint32)

    return _plain(d, ins, kind, saturated)


def multiply_high(a: Array, b: Array, kind: str) -> Array:
    """The upper half of the product of two registers."""
    size = TYPE_BYTES[kind]
    if size < 8:
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * size]
        product = a.view(view_type(kind)).astype(wide) * b.view(view_type(kind)).astype(wide)
        return (product >> wide(8 * size)).astype(UNSIGNED[size])
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    al, ah, bl, bh = a & low, a >> half, b & low, b >> half
    middle = ah * bl + (al * bl >> half)
    cross = al * bh + (middle & low)
    high = ah * bh + (middle >> half) + (cross >> half)
    if kind[0] == "s":
        zero = np.uint64(0)
        high = high - np.where(a >> np.uint64(63), b, zero) - np.where(b >> np.uint64(63), a, zero)
    return high


@instruction("mul", "mad")
def build_multiply(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _type_of(mods, ins)
    if kind is None:
        return None
    part = mods.take("lo", "hi", "wide")
    mods.end()
    size = TYPE_BYTES[kind]
    if part is None or (part == "wide" and size == 8):
        raise Unsupported(f"unsupported: {ins.text}")
    result = kind if part != "wide" else f"{kind[0]}{16 * size}"
    wide = UNSIGNED[TYPE_BYTES[result]]

    def product(a: Array, b: Array) -> Array:
        if part == "lo":
            return a * b
        if part == "hi":
            return multiply_high(a, b, kind)
        signed = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * size]
        return (a.view(view_type(kind)).astype(signed) * b.view(view_type(kind)).astype(signed)).view(wide)

    out = d.destination(ins.operands[0], result, ins)
    sources = [d.source(o, kind, ins) for o in ins.operands[1:3]]
    if ins.root == "mul":
        return assign(out, product, *sources)
    sources.append(d.source(ins.operands[3], result, ins))
    return assign(out, lambda a, b, c: product(a, b) + c, *sources)


def divide(a: Array, b: Array, kind: str) -> Array:
    """Quotient truncated towards zero; for a zero divisor, where PTX leaves the value open, all ones."""
    full = np.array(np.iinfo(a.dtype).max, a.dtype)
    if kind[0] == "u":
        return np.where(b == 0, full, a // np.where(b == 0, np.ones_like(b), b))
    sa, sb = a.view(view_type(kind)), b.view(view_type(kind))
    quotient = np.abs(sa).view(a.dtype) // np.where(b == 0, np.ones_like(b), np.abs(sb).view(b.dtype))
    return np.where(b == 0, full, np.where((sa < 0) != (sb < 0), (~quotient) + np.ones_like(quotient), quotient))


@instruction("div", "rem")
def build_divide(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _type_of(mods, ins)
    if kind is None:
        return None
    mods.end()
    if ins.root == "div":
        return _plain(d, ins, kind, lambda a, b: divide(a, b, kind))
    return _plain(d, ins, kind, lambda a, b: np.where(b == 0, a, a - divide(a, b, kind) * b))


#: Functions of NumPy that mean what the type means: what is less, or below zero, depends on it.
_TYPED = {"min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs}


@instruction(*_TYPED)
def build_typed(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _type_of(mods, ins)
    if kind is None:
        return None
    mods.end()
    return _plain(d, ins, kind, as_type(_TYPED[ins.root], kind))


@instruction("and", "or", "xor", "not")
def build_logic(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    types = mods.types()
    mods.end()
    kind = types[0]
    functions: dict[str, Callable[..., Array]] = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
    }
    function = functions[ins.root]
    if kind != "pred":
        return _plain(d, ins, kind, function)
    sources = [d.predicate_source(o, ins) for o in ins.operands[1:]]
    flips = [negated for _, negated in sources]
    chosen = (
        function if not any(flips) else lambda *a: function(*(~x if f else x for x, f in zip(a, flips, strict=True)))
    )
    return assign(d.destination(ins.operands[0], "pred", ins), chosen, *(number for number, _ in sources))


@instruction("lop3")
def build_lop3(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    if mods.types() != ["b32"]:
        return None
    mods.end()
    table = int(ins.operands[4].text, 0)  # type: ignore[union-attr]

    def look(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros_like(a | b | c)
        for row in range(8):
            if table >> row & 1:
                out = out | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return out

    return assign(
        d.destination(ins.operands[0], "b32", ins), look, *(d.source(o, "b32", ins) for o in ins.operands[1:4])
    )


@instruction("shl", "shr")
def build_shift(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    types = mods.types()
    mods.end()
    kind = types[0]
    size, bits = TYPE_BYTES[kind], 8 * TYPE_BYTES[kind]
    unsigned, signed = UNSIGNED[size], SIGNED[size]

    def left(a: Array, count: Array) -> Array:
        return np.where(count < bits, a << np.minimum(count, bits - 1).astype(unsigned), unsigned(0))

    def right(a: Array, count: Array) -> Array:
        return np.where(count < bits, a >> np.minimum(count, bits - 1).astype(unsigned), unsigned(0))

    def arithmetic(a: Array, count: Array) -> Array:
        return (a.view(signed) >> np.minimum(count, bits - 1).astype(signed)).view(unsigned)

    function = left if ins.root == "shl" else arithmetic if kind[0] == "s" else right
    sources = d.source(ins.operands[1], kind, ins), d.source(ins.operands[2], "u32", ins)
    return assign(d.destination(ins.operands[0], kind, ins), function, *sources)


@instruction("shf")
def build_funnel(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    way, mode = mods.take("l", "r"), mods.take("wrap", "clamp")
    if mods.types() != ["b32"] or way is None or mode is None:
        return None
    mods.end()

    def shift(low: Array, high: Array, count: Array) -> Array:
        n = (count & np.uint32(31) if mode == "wrap" else np.minimum(count, np.uint32(32))).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return ((both << n) >> np.uint64(32) if way == "l" else both >> n).astype(np.uint32)

    return _plain(d, ins, "b32", shift)


@instruction("bfe")
def build_extract(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = _type_of(mods, ins)
    mods.end()
    if kind is None or kind[1:] == "16":
        return None
    bits, unsigned = 8 * TYPE_BYTES[kind], UNSIGNED[TYPE_BYTES[kind]]

    def extract(a: Array, start: Array, length: Array) -> Array:
        start, length = start & 0xFF, length & 0xFF
        inside = np.minimum(start, bits - 1).astype(unsigned)
        shifted = np.where(start < bits, a >> inside, unsigned(0))
        mask = np.where(
            length < bits, (unsigned(1) << np.minimum(length, bits - 1).astype(unsigned)) - unsigned(1), ~unsigned(0)
        )
        field = shifted & mask
        if kind[0] == "u":
            return field
        last = np.minimum(start + np.maximum(length, 1) - 1, bits - 1).astype(unsigned)
        sign = np.where(length == 0, unsigned(0), (a >> last) & unsigned(1))
        kept = np.where(start < bits, mask, unsigned(0)) & ~np.where(
            start < bits, ~(~unsigned(0) >> inside), unsigned(0)
        )
        return np.where(sign != 0, field | ~kept, field)

    sources = [d.source(ins.operands[1], kind, ins), *(d.source(o, "u32", ins) for o in ins.operands[2:4])]
    return assign(d.destination(ins.operands[0], kind, ins), extract, *sources)


@instruction("bfi")
def build_insert(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = mods.types()[0]
    mods.end()
    bits, unsigned = 8 * TYPE_BYTES[kind], UNSIGNED[TYPE_BYTES[kind]]

    def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = start & 0xFF, length & 0xFF
        ones = np.where(
            length < bits, (unsigned(1) << np.minimum(length, bits - 1).astype(unsigned)) - unsigned(1), ~unsigned(0)
        )
        inside = np.minimum(start, bits - 1).astype(unsigned)
        mask = np.where(start < bits, ones << inside, unsigned(0))
        return (b & ~mask) | ((a << inside) & mask)

    sources = [
        *(d.source(o, kind, ins) for o in ins.operands[1:3]),
        *(d.source(o, "u32", ins) for o in ins.operands[3:5]),
    ]
    return assign(d.destination(ins.operands[0], kind, ins), insert, *sources)


def reverse_bits(a: Array) -> Array:
    """The bits of each element in opposite order."""
    raw = np.ascontiguousarray(a)[..., None].view(np.uint8)
    bits = np.unpackbits(raw, axis=-1, bitorder="little")
    return np.packbits(bits[..., ::-1], axis=-1, bitorder="little").view(a.dtype)[..., 0]


def highest_bit(a: Array) -> Array:
    """Position of the highest set bit, all ones where there is none; uint32."""
    high = (a >> a.dtype.type(4 * a.dtype.itemsize)).astype(np.uint32)
    if a.dtype.itemsize == 4:
        _, exponent = np.frexp(a.astype(np.float64))
    else:
        low = a.astype(np.uint32)
        _, exponent = np.frexp(np.where(high != 0, high, low).astype(np.float64))
        exponent = exponent + np.where(high != 0, 32, 0)
    return (exponent.astype(np.int32) - 1).view(np.uint32)


@instruction("popc", "clz", "brev", "bfind")
def build_count(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = mods.types()[0]
    amount = mods.take("shiftamt")
    mods.end()
    last = np.uint32(8 * TYPE_BYTES[kind] - 1)

    def find(a: Array) -> Array:
        if kind[0] == "s":
            a = np.where(a.view(view_type(kind)) < 0, ~a, a)
        found = highest_bit(a)
        return np.where(found == np.uint32(0xFFFFFFFF), found, last - found) if amount else found

    function: Callable[..., Array] = {
        "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
        "clz": lambda a: last - highest_bit(a),
        "brev": reverse_bits,
        "bfind": find,
    }[ins.root]
    out = d.destination(ins.operands[0], kind if ins.root == "brev" else "u32", ins)
    return assign(out, function, d.source(ins.operands[1], kind, ins))


@instruction("prmt")
def build_permute(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    if mods.types() != ["b32"]:
        return None
    mods.end()
    eight, low = np.uint64(8), np.uint64(7)

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
        for place in range(4):
            choice = (selector >> np.uint32(4 * place)).astype(np.uint64)
            byte = (both >> ((choice & low) * eight)) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            out |= np.where(choice & np.uint64(8), sign, byte).astype(np.uint32) << np.uint32(8 * place)
        return out

    return _plain(d, ins, "b32", permute)
