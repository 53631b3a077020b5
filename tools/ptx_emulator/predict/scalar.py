"""Integer PTX of one thread: as much as a loop's counter and a branch's condition need. What is not known is None."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

from ptx_emulator.core.syntax import (
    Address,
    Instruction,
    Literal,
    Operand,
    Register,
    Special,
    Symbol,
    parts_of,
)

#: A register's value, None where it depends on what a tensor holds.
Value = int | None
#: What names a register: its number in `Kernel.registers`, or a predefined one's name, such as "ctaid.x".
Name = int | str

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
_INTEGER: dict[str, Callable[..., int]] = {
    "mov": lambda a: a, "cvt": lambda a: a, "not": operator.invert, "neg": operator.neg,
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "min": min, "max": max, "mul": operator.mul, "mad": lambda a, b, c: a * b + c,
    "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "rem": lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1),
    "shl": lambda a, b: a << min(b & 0xFFFFFFFF, 64), "shr": lambda a, b: a >> min(b & 0xFFFFFFFF, 64),
    "selp": lambda a, b, chosen: a if chosen else b,
}  # fmt: skip
_TYPE = re.compile(r"([bsu])(\d+)|pred")
#: Where the parameters' own addresses begin, one apart.
_ADDRESSES = 1 << 40
#: Modifiers that change nothing here; an instruction with any other is not known.
_HARMLESS = {"lo", "wide", "hi", "sat", "uni"}


def evaluate(instruction: Instruction, values: dict[Name, Value], parameters: Mapping[str, Value]) -> None:
    """Execute one instruction: the values of its destinations, or None, are written.

    Args:
        instruction: as parsed.
        values: of registers, by number, and of predefined registers, by name. Those never written are not known.
        parameters: name -> value.
    """
    value = _value(instruction, values, parameters)
    for name in names(instruction.operands[0]):
        values[name] = value


def names(operand: Operand) -> list[Name]:
    """The registers in an operand, a predefined one by its name."""
    found: list[Name] = []
    for part in parts_of(operand):
        found += [part.index] if isinstance(part, Register) else [part.name] if isinstance(part, Special) else []
    return found


def _value(instruction: Instruction, values: Mapping[Name, Value], parameters: Mapping[str, Value]) -> Value:
    kind, (target, *sources) = instruction.modifiers[-1], instruction.operands
    if not _TYPE.fullmatch(kind) or not isinstance(target, Register):
        return None
    if _loads_parameter(instruction):
        parameter = _parameter(sources[0], values, parameters)
        return None if parameter is None else _wrap(parameter, kind)
    if instruction.root == "mov" and isinstance(sources[0], Symbol) and sources[0].name in parameters:
        return _ADDRESSES + list(parameters).index(sources[0].name)
    kinds = ["pred" if instruction.root == "selp" and i == 2 else kind for i in range(len(sources))]
    read = [_read(operand, values, kind) for operand, kind in zip(sources, kinds, strict=True)]
    known = [value for value in read if value is not None]
    return _result(instruction, known) if len(known) == len(read) else None


def _loads_parameter(instruction: Instruction) -> bool:
    return instruction.root == "ld" and instruction.modifiers[:1] == ("param",)


def _parameter(where: Operand, values: Mapping[Name, Value], parameters: Mapping[str, Value]) -> Value:
    """A parameter by its name, or by an address that a `mov` took."""
    if not isinstance(where, Address) or where.offset:
        return None
    if isinstance(where.base, Symbol):
        return parameters.get(where.base.name)
    address = values.get(where.base.index) if isinstance(where.base, Register) else None
    return None if address is None else list(parameters.values())[address - _ADDRESSES]


def can_follow(instruction: Instruction) -> bool:
    """Whether :func:`evaluate` knows the instruction at all."""
    if not instruction.modifiers or not _TYPE.fullmatch(instruction.modifiers[-1]):
        return False
    return _loads_parameter(instruction) or instruction.root in (*_INTEGER, "setp")


def _result(instruction: Instruction, values: list[int]) -> Value:
    name, (*modifiers, kind) = instruction.root, instruction.modifiers
    if name == "setp" and len(modifiers) == 1:
        return int(_COMPARE[modifiers[0]](values[0], values[1])) if modifiers[0] in _COMPARE else None
    if name == "cvt" and len(modifiers) == 1:
        return _wrap(values[0], modifiers[0]) if _TYPE.fullmatch(modifiers[0]) else None
    if name not in _INTEGER or not set(modifiers) <= _HARMLESS or (name in ("div", "rem") and not values[1]):
        return None
    value, bits = _INTEGER[name](*values), int(kind[1:]) if kind != "pred" else 1
    if "hi" in modifiers:
        return _wrap(value >> bits, kind)
    return _wrap(value, f"{kind[0]}{2 * bits}" if "wide" in modifiers else kind)


def _read(operand: Operand, values: Mapping[Name, Value], kind: str) -> Value:
    if isinstance(operand, Register | Special):
        value = values.get(operand.index if isinstance(operand, Register) else operand.name)
        return None if value is None else _wrap(value, kind)
    if not isinstance(operand, Literal):
        return None  # the address of shared memory
    try:
        return _wrap(int(operand.text.rstrip("U"), 0), kind)  # a u32's literal may have a minus
    except ValueError:  # a float
        return None


def _wrap(value: int, kind: str) -> int:
    """The value as the type holds it: signed types below zero, all others from zero on."""
    if kind == "pred":
        return value & 1
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value
