"""mov, pack and unpack, cvta, selp, trap, and what has no effect on values. Source: PTX ISA, "Data Movement"."""

import numpy as np

from ptx_emulator.core.decode import Action, Decoder, Modifiers, assign, choose, instruction
from ptx_emulator.core.errors import Trap, Unsupported
from ptx_emulator.core.spaces import UNSIGNED, WINDOWS, Array
from ptx_emulator.core.state import State
from ptx_emulator.core.syntax import TIMER, TYPE_BYTES, Instruction, Vector


@instruction("mov")
def build_clock(d: Decoder, ins: Instruction) -> Action | None:
    """%globaltimer: time passes only where no thread can go on, see `Machine._time_passes`."""
    if len(ins.operands) != 2 or ins.operands[1] != TIMER or ins.modifiers != ("u64",):
        return None
    out = d.destination(ins.operands[0], "u64", ins)
    return lambda m, mask: m.set(out, np.full((1, 1), m.nanoseconds, np.uint64), mask)


@instruction("mov")
def build_move(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    types = mods.types()
    mods.end()
    if len(types) != 1:
        raise Unsupported(f"unsupported: {ins.text}")
    kind = types[0]
    target, source = ins.operands
    if isinstance(source, Vector):
        return _pack(d, ins, kind, source)
    if isinstance(target, Vector):
        return _unpack(d, ins, kind, target)
    return _copy(d.destination(target, kind, ins), d.source(source, kind, ins))


def _copy(out: int, number: int) -> Action:
    """A register under another name. Which one is remembered: the check of wgmma.fence asks."""

    def copy(m: State, mask: Array | None) -> None:
        value = m.r[number]
        m.r[out] = value if mask is None else np.where(mask, value, m.r[out])
        m.renamed[out] = m.r[out], value

    return copy


def _pack(d: Decoder, ins: Instruction, kind: str, source: Vector) -> Action:
    size, part = TYPE_BYTES[kind], TYPE_BYTES[kind] // len(source.items)
    unsigned = UNSIGNED[size]
    numbers = [d.source(o, f"b{8 * part}", ins) for o in source.items]

    def join(*parts: Array) -> Array:
        value = parts[0].astype(unsigned)
        for place, item in enumerate(parts[1:], 1):
            value = value | item.astype(unsigned) << unsigned(8 * part * place)
        return value

    return assign(d.destination(ins.operands[0], kind, ins), join, *numbers)


def _unpack(d: Decoder, ins: Instruction, kind: str, target: Vector) -> Action:
    size, part = TYPE_BYTES[kind], TYPE_BYTES[kind] // len(target.items)
    number = d.source(ins.operands[1], kind, ins)
    narrow = UNSIGNED[part]
    outs = [d.destination(o, f"b{8 * part}", ins) for o in target.items]

    def split(m: State, mask: Array | None) -> None:
        value = m.r[number]
        for place, out in enumerate(outs):
            item = (value >> UNSIGNED[size](8 * part * place)).astype(narrow)
            m.r[out] = item if mask is None else np.where(mask, item, m.r[out])

    return split


@instruction("cvta")
def build_convert_address(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    back = mods.take("to") is not None
    space = mods.take("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")
    types = mods.types()
    mods.end()
    if types != ["u64"] or space is None:
        raise Unsupported(f"unsupported: {ins.text}")
    window = np.uint64(0 if space == "global" else WINDOWS[space.split("::")[0]])
    out, source = d.destination(ins.operands[0], "u64", ins), d.source(ins.operands[1], "u64", ins)
    return assign(out, (lambda a: a - window) if back else (lambda a: a + window), source)


@instruction("selp")
def build_select(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    kind = mods.types()[0]
    mods.end()
    number, negated = d.predicate_source(ins.operands[3], ins)
    first, second = (d.source(o, kind, ins) for o in ins.operands[1:3])
    if negated:
        first, second = second, first
    return assign(d.destination(ins.operands[0], kind, ins), lambda p, a, b: choose(p, a, b), number, first, second)


@instruction("slct")
def build_select_sign(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    types = mods.types()
    mods.drop("ftz")
    mods.end()
    if len(types) != 2 or types[1] not in ("s32", "f32"):
        raise Unsupported(f"unsupported: {ins.text}")
    view = np.int32 if types[1] == "s32" else np.float32
    sources = [d.source(o, types[0], ins) for o in ins.operands[1:3]]
    sources.append(d.source(ins.operands[3], types[1], ins))
    out = d.destination(ins.operands[0], types[0], ins)
    return assign(out, lambda a, b, c: choose(c.view(view) >= 0, a, b), *sources)


@instruction("createpolicy")
def build_policy(d: Decoder, ins: Instruction) -> Action | None:
    """A cache policy changes no value: the register gets a number that only cache hints read."""
    zero = d.constant(0, 8)
    return assign(d.destination(ins.operands[0], "b64", ins), lambda a: a, zero)


def _nothing(m: State, mask: Array | None) -> None:
    return None


@instruction("griddepcontrol")
def build_dependence(d: Decoder, ins: Instruction) -> Action | None:
    """One launch has none before it to wait for, and none after it that might begin early: both forms do nothing."""
    if ins.modifiers not in (("wait",), ("launch_dependents",)) or ins.operands:
        raise Unsupported(f"unsupported: {ins.text}")
    return _nothing


@instruction("trap")
def build_trap(d: Decoder, ins: Instruction) -> Action | None:
    """The launch ends with an error."""

    def trap(m: State, mask: Array | None) -> None:
        cta, thread = (int(i[0]) for i in np.nonzero(np.broadcast_to(True if mask is None else mask, m.shape)))
        raise Trap(f"trap, reached first by thread {thread} of CTA {int(m.cta_numbers[cta])}")

    return trap


@instruction("prefetch")
def build_nothing(d: Decoder, ins: Instruction) -> Action | None:
    """A caching hint has no effect on values. Not among them: discard, which destroys what lies there."""
    return _nothing
