"""Operations for integers: arithmetic, logic, shifts, moves, packing, selection, conversions between integers."""

from ptx_emulator.core.decode import Modifiers
from ptx_emulator.core.syntax import TIMER, TYPE_BYTES, Instruction, Literal, Vector
from ptx_emulator.native.encode import Encoder, Operation, encoder, simple

INTEGERS = {f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)}


def _one_type(ins: Instruction) -> tuple[str, Modifiers]:
    """(the single type, the other modifiers); "" where there are several."""
    mods = Modifiers(ins)
    types = mods.types()
    return (types[0] if len(types) == 1 else ""), mods


def unsigned(kind: str) -> str:
    """The unsigned type of the same width."""
    return f"u{8 * TYPE_BYTES[kind]}"


@encoder("add", "sub")
def encode_add(e: Encoder, ins: Instruction) -> Operation | None:
    kind, mods = _one_type(ins)
    return simple(e, ins, f"{ins.root}.{unsigned(kind)}", kind) if kind in INTEGERS and not mods.left else None


@encoder("mul", "mad")
def encode_multiply(e: Encoder, ins: Instruction) -> Operation | None:
    kind, mods = _one_type(ins)
    if kind not in INTEGERS or mods.left not in (["lo"], ["hi"], ["wide"]):
        return None
    part = mods.left[0]
    result = kind if part != "wide" else f"{kind[0]}{16 * TYPE_BYTES[kind]}"
    operands = [e.target(ins.operands[0], result, ins), *(e.source(o, kind, ins) for o in ins.operands[1:3])]
    if ins.root == "mad":
        operands.append(e.source(ins.operands[3], result, ins))
    return Operation(f"{ins.root}.{part}.{unsigned(kind) if part == 'lo' else kind}", tuple(operands))


@encoder("div", "rem", "min", "max", "neg", "abs")
def encode_arithmetic(e: Encoder, ins: Instruction) -> Operation | None:
    kind, mods = _one_type(ins)
    return simple(e, ins, f"{ins.root}.{kind}", kind) if kind in INTEGERS and not mods.left else None


@encoder("and", "or", "xor", "not")
def encode_logic(e: Encoder, ins: Instruction) -> Operation | None:
    kind, _ = _one_type(ins)
    if kind != "pred":
        return simple(e, ins, f"{ins.root}.{unsigned(kind)}", kind)
    out = e.target(ins.operands[0], "pred", ins)
    sources = [e.predicate(o, ins) for o in ins.operands[1:]]
    if ins.root == "not":
        return Operation("not.pred", (out, sources[0][0])) if not sources[0][1] else None
    (a, a_negated), (b, b_negated) = sources
    return Operation(f"{ins.root}.pred", (out, a, b, a_negated, b_negated))


@encoder("lop3")
def encode_lop3(e: Encoder, ins: Instruction) -> Operation | None:
    table = ins.operands[4]
    if not isinstance(table, Literal) or len(ins.operands) != 5:
        return None
    sources = (e.source(o, "b32", ins) for o in ins.operands[1:4])
    return Operation("lop3", (e.target(ins.operands[0], "b32", ins), *sources, int(table.text, 0)))


@encoder("shl", "shr")
def encode_shift(e: Encoder, ins: Instruction) -> Operation | None:
    kind, _ = _one_type(ins)
    name = kind if ins.root == "shr" and kind[0] == "s" else unsigned(kind)
    out, value = e.target(ins.operands[0], kind, ins), e.source(ins.operands[1], kind, ins)
    return Operation(f"{ins.root}.{name}", (out, value, e.source(ins.operands[2], "u32", ins)))


@encoder("shf", "bfe", "bfi", "popc", "clz", "prmt")
def encode_bits(e: Encoder, ins: Instruction) -> Operation | None:
    kind, mods = _one_type(ins)
    if TYPE_BYTES.get(kind) != 4 or (ins.root != "shf" and mods.left):
        return None
    name = {"shf": ".".join(["shf", *mods.left]), "bfe": f"bfe.{kind}", "prmt": "prmt"}.get(ins.root, f"{ins.root}.b32")
    return simple(e, ins, name, "b32")


@encoder("mov")
def encode_move(e: Encoder, ins: Instruction) -> Operation | None:
    kind, _ = _one_type(ins)
    target, source = ins.operands
    if isinstance(target, Vector) or source == TIMER:
        return None  # several operations: see unpacked; or what changes while a kernel runs
    if isinstance(source, Vector):
        size, count = TYPE_BYTES[kind], len(source.items)
        parts = (e.source(o, f"b{8 * size // count}", ins) for o in source.items)
        return Operation(f"pack.{size // count}.{size}", (e.target(target, kind, ins), *parts))
    size = 1 if kind == "pred" else TYPE_BYTES[kind]
    return Operation(f"mov.{size}", (e.target(target, kind, ins), e.source(source, kind, ins)))


def unpacked(e: Encoder, ins: Instruction) -> list[Operation]:
    """The operations of `mov` to a vector, one for each part; none for any other instruction."""
    if ins.root != "mov" or not isinstance(ins.operands[0], Vector):
        return []
    kind, _ = _one_type(ins)
    parts = ins.operands[0].items
    size, part = TYPE_BYTES[kind], TYPE_BYTES[kind] // len(parts)
    name = f"unpack.{size}.{part}"
    if name not in e.codes:
        return []
    source = e.source(ins.operands[1], kind, ins)
    return [
        Operation(name, (e.target(o, f"b{8 * part}", ins), source, 8 * part * place)) for place, o in enumerate(parts)
    ]


@encoder("selp")
def encode_select(e: Encoder, ins: Instruction) -> Operation | None:
    kind, _ = _one_type(ins)
    choice, negated = e.predicate(ins.operands[3], ins)
    first, second = (e.source(o, kind, ins) for o in ins.operands[1:3])
    if negated:
        first, second = second, first
    return Operation(f"selp.{TYPE_BYTES[kind]}", (e.target(ins.operands[0], kind, ins), choice, first, second))


@encoder("cvta")
def encode_convert_address(e: Encoder, ins: Instruction) -> Operation | None:
    if "global" not in ins.modifiers:
        return None
    return Operation("mov.8", (e.target(ins.operands[0], "u64", ins), e.source(ins.operands[1], "u64", ins)))


@encoder("cvt")
def encode_convert(e: Encoder, ins: Instruction) -> Operation | None:
    """Between integers: the low bits of a register, extended by their sign to the width of the target."""
    mods = Modifiers(ins)
    types = mods.types()
    if len(types) != 2 or not set(types) <= INTEGERS or mods.left:
        return None
    kind, source = types
    width = e.width(ins.operands[0], TYPE_BYTES[kind])
    if TYPE_BYTES[kind] > TYPE_BYTES[source]:
        if TYPE_BYTES[kind] != width:
            return None
        kept = source
    else:
        kept = kind
    held = e.width(ins.operands[1], TYPE_BYTES[source])
    out = e.target(ins.operands[0], kind, ins, loose=True)
    return Operation(f"extend.{kept}.{held}.{width}", (out, e.source(ins.operands[1], source, ins, loose=True)))
