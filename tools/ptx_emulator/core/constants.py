"""`.const` variables of a module: declarations with their initialisers, laid out in one bank.

Source: PTX ISA, "State Spaces, Types and Variables: Constant State Space, Initializers". Without an initialiser: zeros.
"""

import math
import re

from ptx_emulator.core.errors import ParseError, Unsupported
from ptx_emulator.core.kernel import Constants
from ptx_emulator.core.literals import literal_bits, round_up
from ptx_emulator.core.syntax import TYPE_BYTES

BANK_BYTES = 65536
_DECLARATION = re.compile(
    r"\s*(?:\.(?:visible|weak|common)\s+)?\.const\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*"
    r"((?:\[\s*\d+\s*\]\s*)*)(?:=\s*(.*))?$",
    re.S,
)
_NUMBER = re.compile(r"-?\s*(?:0[fFdD][0-9a-fA-F]+|0[xX][0-9a-fA-F]+U?|\d[\d.eE+-]*U?)$")


def declare(constants: Constants, declaration: str) -> None:
    """Add a variable to the bank.

    One whose initialiser holds anything but numbers, such as an address, is left out: a kernel that uses it is refused.
    Raises ParseError for a declaration out of the grammar or too long, Unsupported for a bank above 64 KiB.
    """
    match = _DECLARATION.match(declaration)
    if match is None or match.group(2) not in TYPE_BYTES:
        raise ParseError(f"unreadable constant: {' '.join(declaration.split())[:80]!r}")
    align, kind, name, dimensions, given = match.groups()
    size = TYPE_BYTES[kind]
    count = math.prod(int(number) for number in re.findall(r"\d+", dimensions))
    numbers = [part.strip() for part in (given or "").replace("{", " ").replace("}", " ").split(",") if part.strip()]
    if any(not _NUMBER.match(number) for number in numbers):
        return
    if len(numbers) > count:
        raise ParseError(f"constant {name} has {count} elements, {len(numbers)} values were given")
    values = b"".join(
        (literal_bits(number.replace(" ", ""), kind) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        for number in numbers
    )
    start = round_up(len(constants.data), max(int(align or size), size))
    if start + size * count > BANK_BYTES:
        raise Unsupported(f"unsupported: constants beyond {BANK_BYTES} bytes: {name}")
    constants.symbols[name] = start
    constants.data.extend(bytes(start - len(constants.data)) + values.ljust(size * count, b"\0"))
