"""PTX text to kernels: registers by number, instructions with their operands, labels, shared and local symbols.

Source of the grammar: PTX ISA, chapters "Syntax", "State Spaces, Types and Variables" and "Abstracting the ABI".
"""

import math
import re

from ptx_emulator.core.body import Body, braced, place_shared, variable
from ptx_emulator.core.constants import declare
from ptx_emulator.core.errors import ParseError, Unsupported
from ptx_emulator.core.kernel import Kernel, Module, Parameter
from ptx_emulator.core.pause import no_collection
from ptx_emulator.core.syntax import TYPE_BYTES

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
# Of lines: a pattern that begins with the end of the line before is found ten times as fast as one with an anchor.
_DEBUG_LINE = re.compile(r"\n\s*\.(?:(?:file|version|address_size)\b[^\n]*|pragma\b[^;]*;)")
_SOURCE_LINE = re.compile(r"\n\s*\.loc\s+(\d+\s+\d+)\b[^\n]*")  # made a statement of its own
_SOURCE_FILE = re.compile(r"\n\s*\.file\s+(\d+)\s+\"([^\"]*)\"")


def parse(text: str) -> Module:
    """Parse PTX text.

    Raises:
        ParseError: text that does not fit the grammar.
        Unsupported: device functions.
        TypeError: no text.
    """
    if not isinstance(text, str):
        raise TypeError(f"parse takes PTX text as str, not {type(text).__name__}")
    with no_collection():
        return _module(text)


def _module(text: str) -> Module:
    text = _COMMENT.sub(" ", f"\n{text}")
    files = {int(number): path.rsplit("/", 1)[-1] for number, path in _SOURCE_FILE.findall(text)}
    text = _SOURCE_LINE.sub(r"\n.loc \1;", _DEBUG_LINE.sub("", text))
    target = re.search(r"\.target\s+([\w]+)", text)
    module = Module(target.group(1) if target else "", {}, files=files)
    shared: list[tuple[str, str | None, int, int]] = []
    position = target.end() if target else 0
    head = re.compile(
        r"\s*(\.(?:extern|shared|visible|weak|entry|func|global|const|section|alias)\b)|\s*(,[^\n]*)|\s*\Z"
    )
    while True:
        match = head.match(text, position)
        if match is None:
            raise ParseError(f"unexpected text at module level: {text[position : position + 80].strip()!r}")
        if match.group(2):  # the rest of a .target line, e.g. ", debug"
            position = match.end()
            continue
        if match.group(1) is None:
            break
        if match.group(1) == ".section":
            _, position = braced(text, text.index("{", position))
            continue
        stop = re.compile(r"[;({=]").search(text, position)
        if stop is None:
            raise ParseError(f"unfinished declaration: {text[position : position + 80].strip()!r}")
        declaration = text[position : stop.start()].strip()
        if stop.group() == ";" and ".shared" in declaration:
            shared.append(variable(declaration.replace(".extern", "").replace(".visible", "").strip()))
            position = stop.end()
        elif ".entry" in declaration and stop.group() in "({":
            position = _entry(text, position, module, shared)
        elif ".const" in declaration and stop.group() in ";=":
            end = text.index(";", position)
            declare(module.constants, text[position:end])
            position = end + 1
        elif ".global" in declaration:
            # LLVM leaves strings there; a kernel that uses one is refused when it is decoded
            position = text.index(";", position) + 1
        else:
            raise Unsupported(f"unsupported: {declaration}")
    return module


def _entry(text: str, position: int, module: Module, shared: list[tuple[str, str | None, int, int]]) -> int:
    match = re.compile(r"[^{(]*?\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)").match(text, position)
    if match is None or text[match.end()] != "{":
        raise ParseError(f"entry without a body: {text[position : position + 80].strip()!r}")
    kernel = Kernel(match.group(1), constants=module.constants, files=module.files)
    _parameters(kernel, match.group(2) or "")
    for directive, numbers in re.findall(r"\.(\w+)\s*([\d\s,]*)", match.group(3)):
        _directive(kernel, directive, [int(number) for number in numbers.replace(",", " ").split()])
    body, end = braced(text, match.end())
    for name, _, align, size in shared:
        if re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", body):
            place_shared(kernel, name, align, size)
    Body(kernel).read(body)
    module.kernels[kernel.name] = kernel
    return end


def _directive(kernel: Kernel, name: str, numbers: list[int]) -> None:
    """A performance or cluster directive between a kernel's parameters and its body."""
    if name == "reqntid":
        kernel.required_threads = math.prod(numbers)
    elif name == "maxntid":
        kernel.max_threads = math.prod(numbers)
    elif name == "minnctapersm":
        kernel.min_ctas = numbers[0]
    elif name == "maxnreg":
        kernel.max_registers = numbers[0]
    elif name == "reqnctapercluster":
        x, y, z = (*numbers, 1, 1)[:3]
        kernel.cluster = (x, y, z)
    elif name not in ("noreturn", "explicitcluster", "maxclusterrank"):
        raise Unsupported(f"unsupported: .{name} {', '.join(map(str, numbers))} at entry {kernel.name}")


def _parameters(kernel: Kernel, text: str) -> None:
    offset = 0
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.\w+\s*)*(?:\.align\s+\d+|\d+)?\s*)?([\w$]+)(?:\[(\d+)\])?$",
            item,
        )
        if match is None or match.group(2) not in TYPE_BYTES:
            raise ParseError(f"unreadable parameter of {kernel.name}: {item!r}")
        size = TYPE_BYTES[match.group(2)]
        align = int(match.group(1) or size)
        total = size * int(match.group(4) or 1)
        offset = -(-offset // align) * align
        array = match.group(4) is not None
        kernel.parameter_list.append(Parameter(match.group(3), match.group(2), total, align, offset, array))
        offset += total
