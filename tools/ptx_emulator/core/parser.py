"""PTX text to kernels: registers by number, instructions with their operands, labels, shared and local symbols.

Source of the grammar: PTX ISA, chapters "Syntax", "State Spaces, Types and Variables" and "Abstracting the ABI".
"""

import math
import re

from ptx_emulator.core.constants import declare
from ptx_emulator.core.errors import ParseError, Unsupported
from ptx_emulator.core.pause import no_collection
from ptx_emulator.core.syntax import (
    TYPE_BYTES,
    Address,
    Instruction,
    Kernel,
    Literal,
    Module,
    Not,
    Operand,
    Pair,
    Parameter,
    Register,
    Sink,
    Special,
    Symbol,
    Tile,
    Vector,
)

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_DEBUG_LINE = re.compile(r"^\s*\.(?:file|version|address_size)\b[^\n]*$|^\s*\.pragma\b[^;]*;", re.M)
_SOURCE_LINE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\b[^\n]*$", re.M)  # made a statement of its own
_SOURCE_FILE = re.compile(r"^\s*\.file\s+(\d+)\s+\"([^\"]*)\"", re.M)
_LABEL = re.compile(r"\s*([A-Za-z_$%][\w$]*)\s*:(?!:)")
_VARIABLE = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[\s*(\d*)\s*\])?\s*$")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\s*(?:0x[0-9a-fA-F]+|\d+))|(-\s*\d+))?\s*\]$")
_TILE = re.compile(r"\[\s*([%\w$]+)\s*,\s*\{([^}]*)\}\s*\]$")
_BRACKETS = set("{[()]}")
_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)


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
    text = _COMMENT.sub(" ", text)
    files = {int(number): path.rsplit("/", 1)[-1] for number, path in _SOURCE_FILE.findall(text)}
    text = _SOURCE_LINE.sub(r".loc \1 \2;", _DEBUG_LINE.sub("", text))
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
            _, position = _braced(text, text.index("{", position))
            continue
        stop = re.compile(r"[;({=]").search(text, position)
        if stop is None:
            raise ParseError(f"unfinished declaration: {text[position : position + 80].strip()!r}")
        declaration = text[position : stop.start()].strip()
        if stop.group() == ";" and ".shared" in declaration:
            shared.append(_variable(declaration.replace(".extern", "").replace(".visible", "").strip()))
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


def _braced(text: str, start: int) -> tuple[str, int]:
    """The text inside the braces that open at `start`, and the position after them."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return text[start + 1 : match.start()], match.end()
    raise ParseError(f"brace without its end: {text[start : start + 80]!r}")


def _variable(declaration: str) -> tuple[str, str | None, int, int]:
    """(name, space, align, bytes) of a `.shared` or `.local` declaration; bytes is -1 for an extern array."""
    match = _VARIABLE.match(declaration)
    if match is None:
        raise Unsupported(f"unsupported: {declaration}")
    space, align, kind, name, count = match.groups()
    size = TYPE_BYTES[kind]
    total = size if count is None else -1 if count == "" else size * int(count)
    return name, space, max(int(align or size), size), total


def _place_shared(kernel: Kernel, name: str, align: int, size: int) -> None:
    if size < 0:
        kernel.dynamic_symbols.add(name)
        return
    align = max(align, 128)
    offset = -(-kernel.shared_bytes // align) * align
    kernel.shared_symbols[name] = offset
    kernel.shared_bytes = offset + size


def _entry(text: str, position: int, module: Module, shared: list[tuple[str, str | None, int, int]]) -> int:
    match = re.compile(r"[^{(]*?\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)").match(text, position)
    if match is None or text[match.end()] != "{":
        raise ParseError(f"entry without a body: {text[position : position + 80].strip()!r}")
    kernel = Kernel(match.group(1), constants=module.constants, files=module.files)
    _parameters(kernel, match.group(2) or "")
    for directive, numbers in re.findall(r"\.(\w+)\s*([\d\s,]*)", match.group(3)):
        _directive(kernel, directive, [int(number) for number in numbers.replace(",", " ").split()])
    body, end = _braced(text, match.end())
    used = set(re.findall(r"[\w$]+", body))
    for name, _, align, size in shared:
        if name in used:
            _place_shared(kernel, name, align, size)
    _Body(kernel).read(body)
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


class _Body:
    """Reads the statements of one entry, with the register names of nested scopes."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, Register]] = [{}]
        self.label_scopes: list[dict[str, str]] = [{}]
        self.scope_count = 0
        self.source = (0, 0)

    def read(self, body: str) -> None:
        position, end = 0, len(body)
        boundary = re.compile(r"\s*([{}])|\s*\Z")
        while position < end:
            match = boundary.match(body, position)
            if match is not None:
                if match.group(1) == "{":
                    self._open(body, match.end())
                elif match.group(1) == "}":
                    self.scopes.pop()
                    self.label_scopes.pop()
                position = match.end()
                continue
            label = _LABEL.match(body, position)
            if label is not None:
                name = self._label(label.group(1))
                self.kernel.labels[name] = len(self.kernel.instructions)
                position = label.end()
                continue
            stop = body.find(";", position)
            if stop < 0:
                raise ParseError(f"statement without its semicolon: {body[position:].strip()[:80]!r}")
            self._statement(" ".join(body[position:stop].split()))
            position = stop + 1

    def _open(self, body: str, start: int) -> None:
        """Enter a scope; the labels it declares belong to it, so that inlined assembly may repeat them."""
        self.scope_count += 1
        inner, _ = _braced(body, start - 1)
        names = {m.group(1) for m in re.finditer(r"(?:^|[;{}])\s*([A-Za-z_$%][\w$]*)\s*:(?!:)", inner)}
        self.scopes.append({})
        self.label_scopes.append({name: f"{name}@{self.scope_count}" for name in names})

    def _label(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.label_scopes) if name in scope), name)

    def _statement(self, statement: str) -> None:
        if not statement:
            return
        if statement.startswith(".loc "):
            _, file, line = statement.split()
            self.source = (int(file), int(line))
        elif statement.startswith(".reg"):
            self._declare(statement)
        elif statement.startswith((".shared", ".local")):
            name, space, align, size = _variable(statement)
            if space == "shared":
                _place_shared(self.kernel, name, align, size)
            else:
                offset = -(-self.kernel.local_bytes // align) * align
                self.kernel.local_symbols[name] = offset
                self.kernel.local_bytes = offset + size
        elif statement.startswith("."):
            raise Unsupported(f"unsupported: {statement}")
        else:
            self.kernel.instructions.append(self._instruction(statement))

    def _declare(self, statement: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement)
        if match is None or match.group(1) not in TYPE_BYTES:
            raise Unsupported(f"unsupported: {statement}")
        for name in (part.strip() for part in match.group(2).split(",")):
            ranged = re.match(r"([%\w$]+)<(\d+)>$", name)
            names = [f"{ranged.group(1)}{i}" for i in range(int(ranged.group(2)))] if ranged else [name]
            for one in names:
                self.scopes[-1][one] = Register(len(self.kernel.registers))
                self.kernel.registers.append((one, match.group(1)))

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def _instruction(self, statement: str) -> Instruction:
        match = _INSTRUCTION.match(statement)
        if match is None:
            raise ParseError(f"unreadable instruction: {statement!r}")
        negated, guard_name, opcode, rest = match.groups()
        guard = self._register(guard_name) if guard_name else None
        if guard_name and guard is None:
            raise ParseError(f"undeclared guard: {statement!r}")
        root, *modifiers = opcode.split(".")
        operands = tuple(self._operand(part, statement) for part in _split(rest))
        return Instruction(statement, root, tuple(modifiers), operands, guard, bool(negated), self.source)

    def _operand(self, text: str, statement: str) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part, statement) for part in _split(text[1:-1])))
        if text.startswith("["):
            tile = _TILE.match(text)
            if tile is not None:
                coordinates = tuple(self._operand(part, statement) for part in _split(tile.group(2)))
                return Tile(self._operand(tile.group(1), statement), coordinates)
            match = _ADDRESS.match(text)
            if match is None:
                raise Unsupported(f"unsupported address {text} in: {statement}")
            offset = (match.group(2) or match.group(3) or "0").replace(" ", "")
            return Address(self._operand(match.group(1), statement), int(offset, 0))
        if "|" in text:
            first, second = (part.strip() for part in text.split("|"))
            return Pair(self._operand(first, statement), self._operand(second, statement))
        if text.startswith("!"):
            register = self._register(text[1:].strip())
            if register is None:
                raise ParseError(f"undeclared register {text} in: {statement}")
            return Not(register)
        register = self._register(text)
        if register is not None:
            return register
        if text.startswith("%"):
            return Special(text[1:])
        if re.match(r"-?\s*\d", text):
            return Literal(text.replace(" ", ""))
        return Symbol(self._label(text))


def _split(text: str) -> list[str]:
    """Split at the commas outside braces and brackets."""
    if not _BRACKETS & set(text):
        parts = [part.strip() for part in text.split(",")]
        return parts if parts[-1] else parts[:-1]
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
