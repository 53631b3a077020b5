"""Integer PTX of one thread: as much as a loop's counter and a branch's condition need. What is not known is None."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

#: A register's value, None where it depends on what a tensor holds.
Value = int | None

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


def evaluate(
    opcode: tuple[str, ...], operands: tuple[str, ...], registers: dict[str, Value], parameters: Mapping[str, Value]
) -> None:
    """Execute one instruction: its destination's value, or None, is written.

    Args:
        opcode: split at its dots.
        operands: as written.
        registers: name -> value. Those never written are not known.
        parameters: name -> value.
    """
    value = _value(opcode, operands, registers, parameters)
    for name in re.findall(r"%\w+", operands[0]):
        registers[name] = value


def _value(
    opcode: tuple[str, ...], operands: tuple[str, ...], registers: Mapping[str, Value], parameters: Mapping[str, Value]
) -> Value:
    kind = opcode[-1]
    if not _TYPE.fullmatch(kind) or not operands[0].startswith("%"):
        return None
    if opcode[:2] == ("ld", "param"):
        parameter = _parameter(operands[1].strip("[] "), registers, parameters)
        return None if parameter is None else _wrap(parameter, kind)
    if opcode[0] == "mov" and operands[1] in parameters:
        return _ADDRESSES + list(parameters).index(operands[1])
    kinds = ["pred" if opcode[0] == "selp" and i == 2 else kind for i in range(len(operands) - 1)]
    values = [_read(operand, registers, kind) for operand, kind in zip(operands[1:], kinds, strict=True)]
    known = [value for value in values if value is not None]
    return _result(opcode, known) if len(known) == len(values) else None


def _parameter(where: str, registers: Mapping[str, Value], parameters: Mapping[str, Value]) -> Value:
    """A parameter by its name, or by an address that a `mov` took."""
    if where in parameters:
        return parameters[where]
    address = registers.get(where)
    return None if address is None else list(parameters.values())[address - _ADDRESSES]


def can_follow(opcode: tuple[str, ...]) -> bool:
    """Whether :func:`evaluate` knows the instruction at all."""
    if not _TYPE.fullmatch(opcode[-1]):
        return False
    return opcode[:2] == ("ld", "param") or opcode[0] in (*_INTEGER, "setp")


def _result(opcode: tuple[str, ...], values: list[int]) -> Value:
    name, modifiers, kind = opcode[0], opcode[1:-1], opcode[-1]
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


def _read(operand: str, registers: Mapping[str, Value], kind: str) -> Value:
    if operand.startswith("%"):
        value = registers.get(operand)
        return None if value is None else _wrap(value, kind)
    try:
        return _wrap(int(operand.rstrip("U"), 0), kind)  # a u32's literal may have a minus
    except ValueError:  # a float, or the address of shared memory
        return None


def _wrap(value: int, kind: str) -> int:
    """The value as the type holds it: signed types below zero, all others from zero on."""
    if kind == "pred":
        return value & 1
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value
