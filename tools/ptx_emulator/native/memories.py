"""Operations that move data: ld, st, cp.async, ldmatrix, stmatrix, mma, and what a warp's threads exchange."""

from ptx_emulator.core.decode import Modifiers, items
from ptx_emulator.core.forms.loads import CACHING, ORDERING, space_of
from ptx_emulator.core.forms.warp import EVERY
from ptx_emulator.core.literals import literal_bits
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction, Literal, Not, Pair, Register
from ptx_emulator.native.encode import Encoder, Operation, encoder
from ptx_emulator.native.library import NONE


@encoder("ld")
def encode_load(e: Encoder, ins: Instruction) -> Operation | None:
    mods = Modifiers(ins)
    space = space_of(mods)
    mods.take("v2", "v4", "v8")
    mods.drop(*ORDERING, *CACHING)
    kind = mods.types()[0]
    if space not in ("global", "shared", "param", "const"):
        return None
    unit, targets = TYPE_BYTES[kind], items(ins.operands[0])
    widths = {e.width(o, unit) for o in targets}
    if len(widths) != 1:
        return None
    (width,) = widths
    sign = "s" if kind[0] == "s" and width > unit else "u"
    outs = e.list_of([e.target(o, kind, ins, loose=True) for o in targets])
    bank = "bank" if space in ("param", "const") else space
    operands = (*e.address(ins.operands[1], ins), len(targets), outs, int(space == "const"))
    return Operation(f"ld.{bank}.{sign}{8 * unit}.{width}", operands, steps=space == "shared")


@encoder("st")
def encode_store(e: Encoder, ins: Instruction) -> Operation | None:
    mods = Modifiers(ins)
    space = space_of(mods)
    mods.take("v2", "v4", "v8")
    mods.drop(*ORDERING, *CACHING)
    kind = mods.types()[0]
    if space not in ("global", "shared") or mods.left:
        return None
    unit, sources = TYPE_BYTES[kind], items(ins.operands[1])
    widths = {e.width(o, unit) for o in sources}
    if len(widths) != 1:
        return None
    values = e.list_of([e.source(o, kind, ins, loose=True) for o in sources])
    operands = (*e.address(ins.operands[0], ins), len(sources), values)
    return Operation(f"st.{space}.u{8 * unit}.{widths.pop()}", operands, steps=space == "shared")


@encoder("cp")
def encode_copy(e: Encoder, ins: Instruction) -> Operation | None:
    if "bulk" in ins.modifiers or "mbarrier" in ins.modifiers or not e.shared:
        return None
    if "commit_group" in ins.modifiers:
        return Operation("cp.async.commit_group", ())
    if "wait_all" in ins.modifiers:
        return Operation("cp.async.wait", (-1,), steps=True)
    if "wait_group" in ins.modifiers:
        keep = ins.operands[0]
        assert isinstance(keep, Literal)
        return Operation("cp.async.wait", (int(keep.text, 0),), steps=True)
    size = ins.operands[2]
    assert isinstance(size, Literal)
    limit = (0, 0)
    if len(ins.operands) > 3:
        last = ins.operands[3]
        if isinstance(last, Not) or (isinstance(last, Register) and e.decoder.predicate[last.index]):
            flag, negated = e.predicate(last, ins)
            limit = flag, 2 + negated
        elif "L2::cache_hint" not in ins.modifiers or len(ins.operands) > 4:
            limit = e.source(last, "u32", ins), 1
    places = (*e.address(ins.operands[0], ins), *e.address(ins.operands[1], ins))
    return Operation("cp.async", (*places, int(size.text, 0), *limit), steps=True)


@encoder("ldmatrix")
def encode_load_matrix(e: Encoder, ins: Instruction) -> Operation | None:
    targets = items(ins.operands[0])
    outs = e.list_of([e.target(o, "b32", ins) for o in targets])
    operands = (*e.address(ins.operands[1], ins), len(targets), outs, int("trans" in ins.modifiers))
    return Operation("ldmatrix", operands, steps=True)


@encoder("stmatrix")
def encode_store_matrix(e: Encoder, ins: Instruction) -> Operation | None:
    sources = items(ins.operands[1])
    values = e.list_of([e.source(o, "b32", ins) for o in sources])
    operands = (*e.address(ins.operands[0], ins), len(sources), values, int("trans" in ins.modifiers))
    return Operation("stmatrix", operands, steps=True)


@encoder("mma")
def encode_mma(e: Encoder, ins: Instruction) -> Operation | None:
    mods = Modifiers(ins)
    mods.drop("sync", "aligned", "row", "col")
    kind, shape = mods.types()[1], mods.left[0]
    d, a, b, c = (items(o) for o in ins.operands)
    numbers = [e.target(o, "f32", ins) for o in d]
    numbers += [e.source(o, "b32", ins) for o in (*a, *b)] + [e.source(o, "f32", ins) for o in c]
    name = f"mma.{shape}.{kind}"
    return Operation(f"mma.{kind}.{len(a)}.{len(b)}", (e.list_of(numbers), e.counter(name)))


def _names_all(ins: Instruction) -> bool:
    """Whether the member mask, the last operand, is an immediate that names every lane."""
    last = ins.operands[-1]
    return isinstance(last, Literal) and literal_bits(last.text, "b32") & EVERY == EVERY


@encoder("shfl")
def encode_shuffle(e: Encoder, ins: Instruction) -> Operation | None:
    if not _names_all(ins):
        return None
    mode = {"up": 0, "down": 1, "bfly": 2, "idx": 3}[next(m for m in ins.modifiers if m not in ("sync", "b32"))]
    target = ins.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    inside = NONE if second is None else e.target(second, "pred", ins)
    sources = (e.source(o, "b32", ins) for o in ins.operands[1:4])
    return Operation("shfl", (e.target(first, "b32", ins), inside, *sources, mode))


@encoder("vote")
def encode_vote(e: Encoder, ins: Instruction) -> Operation | None:
    if not _names_all(ins):
        return None
    name = next(m for m in ins.modifiers if m not in ("sync", "b32", "pred"))
    out = e.target(ins.operands[0], "b32" if name == "ballot" else "pred", ins)
    mode = {"ballot": 0, "any": 1, "all": 2, "uni": 3}[name]
    return Operation("vote", (out, *e.predicate(ins.operands[1], ins), mode))


@encoder("activemask")
def encode_active(e: Encoder, ins: Instruction) -> Operation | None:
    return Operation("activemask", (e.target(ins.operands[0], "b32", ins),))


@encoder("elect")
def encode_elect(e: Encoder, ins: Instruction) -> Operation | None:
    target = ins.operands[0]
    assert isinstance(target, Pair)
    if not _names_all(ins):
        return None
    return Operation("elect", (e.target(target.first, "b32", ins), e.target(target.second, "pred", ins)))
