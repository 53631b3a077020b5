"""Operations for floating point: arithmetic, comparisons, conversions."""

from ptx_emulator.core.decode import Modifiers
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction, Pair
from ptx_emulator.native.encode import Encoder, Operation, encoder, signed, simple
from ptx_emulator.native.integers import INTEGERS
from ptx_emulator.native.library import NONE

HALVES = ("bf16", "f16", "bf16x2", "f16x2")
NEUTRAL = ("rn", "ftz", "approx", "full")  # change nothing here, as in the core
UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
COMPARED = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"}
COMPARED |= {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"} | {name: name for name in UNORDERED}


def _float_type(ins: Instruction) -> tuple[str, Modifiers]:
    mods = Modifiers(ins)
    types = mods.types()
    mods.drop(*NEUTRAL)
    return (types[0] if len(types) == 1 else ""), mods


@encoder("add", "sub", "mul", "div", "fma", "mad", "sqrt", "rsqrt", "rcp", "ex2")
def encode_arithmetic(e: Encoder, ins: Instruction) -> Operation | None:
    kind, mods = _float_type(ins)
    if kind not in ("f32", *HALVES) or mods.left:
        return None
    return simple(e, ins, f"{'fma' if ins.root == 'mad' else ins.root}.{kind}", kind)


@encoder("min", "max")
def encode_extreme(e: Encoder, ins: Instruction) -> Operation | None:
    kind, mods = _float_type(ins)
    nan = ".NaN" if mods.take("NaN") else ""
    if kind != "f32" or mods.left:
        return None
    return simple(e, ins, f"{ins.root}{'3' if len(ins.operands) == 4 else ''}{nan}.f32", kind)


@encoder("neg", "abs")
def encode_sign(e: Encoder, ins: Instruction) -> Operation | None:
    kind, mods = _float_type(ins)
    if kind not in ("f32", *HALVES) or mods.left:
        return None
    size = TYPE_BYTES[kind]
    sign = 1 << (8 * size - 1) | (1 << 15 if kind.endswith("x2") else 0)
    name, bits = ("flip", sign) if ins.root == "neg" else ("keep", ~sign & 0xFFFFFFFF)
    out, value = e.target(ins.operands[0], kind, ins), e.source(ins.operands[1], kind, ins)
    return Operation(f"{name}.{size}", (out, value, signed(bits)))


@encoder("setp")
def encode_compare(e: Encoder, ins: Instruction) -> Operation | None:
    mods = Modifiers(ins)
    types = mods.types()
    mods.drop("ftz")
    combine = mods.take("and", "or", "xor")
    if len(types) != 1 or len(mods.left) != 1 or mods.left[0] not in COMPARED or types[0] == "pred":
        return None
    kind = f"u{types[0][1:]}" if types[0][0] == "b" and types[0] != "bf16" else types[0]
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    out = e.target(first, "pred", ins)
    complement = NONE if second is None else e.target(second, "pred", ins)
    a, b = (e.source(o, types[0], ins) for o in ins.operands[1:3])
    with_predicate, negated = e.predicate(ins.operands[3], ins) if combine else (0, 0)
    mode = {None: 0, "and": 1, "or": 2, "xor": 3}[combine]
    name = f"setp.{COMPARED[mods.left[0]]}.{kind}"
    return Operation(name, (out, a, b, complement, mode, with_predicate, negated))


@encoder("cvt")
def encode_convert(e: Encoder, ins: Instruction) -> Operation | None:
    mods = Modifiers(ins)
    types = mods.types()
    rounding = mods.take("rn", "rz", "rna", "rni", "rzi", "rmi", "rpi")
    relu = int(mods.take("relu") is not None)
    mods.drop("ftz")
    if len(types) != 2 or mods.left:
        return None
    kind, source = types
    cut = "rz." if rounding == "rz" else ""
    if kind in ("bf16x2", "f16x2") and source == "f32" and rounding in ("rn", "rz"):
        sources = (e.source(o, "f32", ins) for o in ins.operands[1:])
        return Operation(f"cvt.{cut}{kind}.f32", (e.target(ins.operands[0], "b32", ins), *sources, relu))
    if kind in ("bf16", "f16") and source == "f32" and rounding in ("rn", "rz"):
        return _one(e, ins, f"cvt.{cut}{kind}.f32", kind, source, relu)
    if relu:
        return None
    if kind == "tf32":
        return _one(e, ins, "cvt.rna.tf32.f32", "b32", "b32") if rounding == "rna" else None
    if kind == "f32" and source in ("bf16", "f16") and rounding is None:
        return _one(e, ins, f"cvt.f32.{source}", kind, source)
    if source == "f32" and rounding in ("rni", "rzi", "rmi", "rpi"):
        return _one(e, ins, f"cvt.{rounding}.{kind}.f32", kind, source)
    if kind == "f32" and source in INTEGERS and rounding in (None, "rn"):
        return _one(e, ins, f"cvt.f32.{source}", kind, source)
    return None


def _one(e: Encoder, ins: Instruction, name: str, kind: str, source: str, *more: int) -> Operation | None:
    """A conversion between registers of exactly these types."""
    if e.width(ins.operands[0], TYPE_BYTES[kind]) != TYPE_BYTES[kind]:
        return None
    if e.width(ins.operands[1], TYPE_BYTES[source]) != TYPE_BYTES[source]:
        return None
    return Operation(name, (e.target(ins.operands[0], kind, ins), e.source(ins.operands[1], source, ins), *more))
