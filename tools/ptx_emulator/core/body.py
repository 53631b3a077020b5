"""The body of one entry to instructions: scopes, labels, declarations.

Most bodies have one scope. Then the names of all registers are looked up in one pass over the text, and a statement
that was met before but for its registers is known by its text.
"""

import re
from collections import ChainMap
from collections.abc import Mapping

from ptx_emulator.core.code import Code, Form, Named, Numbering, form_of, mark, marks_in, with_names
from ptx_emulator.core.errors import ParseError, Unsupported
from ptx_emulator.core.grammar import Grammar
from ptx_emulator.core.kernel import Kernel
from ptx_emulator.core.syntax import TYPE_BYTES

_LABEL = r"([A-Za-z_$%][\w$]*)\s*:(?!:)"
_LEAD = re.compile(rf"\s*(?:([{{}}])|{_LABEL})")  # a brace or a label in front of a statement
_INNER_LABEL = re.compile(rf"(?:^|[;{{}}])\s*{_LABEL}")
_INNER_SCOPE = re.compile(rf"\s*(?:{_LABEL}\s*)*\{{")  # a statement that begins with one
_DECLARATION = re.compile(r"\.reg\b[^;]*")
_VARIABLE = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[\s*(\d*)\s*\])?\s*$")
_NAME = re.compile(r"(%[A-Za-z_$][\w$]*)")  # of a register, or of a predefined one up to its dot


def braced(text: str, start: int) -> tuple[str, int]:
    """The text inside the braces that open at `start`, and the position after them."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return text[start + 1 : match.start()], match.end()
    raise ParseError(f"brace without its end: {text[start : start + 80]!r}")


def variable(declaration: str) -> tuple[str, str | None, int, int]:
    """(name, space, align, bytes) of a `.shared` or `.local` declaration; bytes is -1 for an extern array."""
    match = _VARIABLE.match(declaration)
    if match is None:
        raise Unsupported(f"unsupported: {declaration}")
    space, align, kind, name, count = match.groups()
    size = TYPE_BYTES[kind]
    total = size if count is None else -1 if count == "" else size * int(count)
    return name, space, max(int(align or size), size), total


def place_shared(kernel: Kernel, name: str, align: int, size: int) -> None:
    """Give a variable its place in static shared memory; size -1 is the start of dynamic shared memory."""
    if size < 0:
        kernel.dynamic_symbols.add(name)
        return
    align = max(align, 128)
    offset = -(-kernel.shared_bytes // align) * align
    kernel.shared_symbols[name] = offset
    kernel.shared_bytes = offset + size


class Body:
    """Reads the statements of one entry, with the register names of nested scopes."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel: Kernel = kernel
        self.code: Code = kernel.instructions
        self.scopes: list[dict[str, int]] = [{}]  # the number of each register
        self.label_scopes: list[dict[str, str]] = [{}]
        self.scope_count: int = 0
        self.source: tuple[int, int] = (0, 0)
        self.bare: bool = False  # a register was declared whose name could be a variable's
        self.labelled: bool = False  # a scope has labels of its own
        self.visible: Mapping[str, int] = self.scopes[0]  # what all open scopes name

    def read(self, body: str) -> None:
        """Read all statements. Raises ParseError or Unsupported."""
        if not body.isascii():
            raise ParseError(f"{self.kernel.name} has characters beyond ASCII, which PTX has not")
        for declaration in _DECLARATION.findall(body):
            self._declare(" ".join(declaration.split()))
        if not self.bare:
            pieces, numbers = self._marked(body)
            if not any(map(_INNER_SCOPE.match, set(pieces))):
                self._read_flat(pieces, numbers)
                return
        self.bare = False
        self.scopes[0].clear()
        self.kernel.registers.clear()
        self._read_scopes(body)

    def _marked(self, body: str) -> tuple[list[str], list[int]]:
        """The statements, with marks for the registers, and the numbers of these, where one scope declares them all."""
        tokens = _NAME.split(body)
        names = tokens[1::2]
        marks = {name: mark(kind) for name, kind in self.kernel.registers}
        tokens[1::2] = [marks.get(name, name) for name in names]
        numbers = [number for number in map(self.visible.get, names) if number is not None]
        return "".join(tokens).split(";"), numbers

    def _read_flat(self, pieces: list[str], numbers: list[int]) -> None:
        """The statements of a body of one scope, whose registers have been declared."""
        forms: dict[str, Form] = {}
        sources: dict[str, tuple[int, int]] = {}
        code, at = self.code, 0
        for piece in pieces[:-1]:
            form = forms.get(piece)
            if form is None:
                if piece in sources:
                    self.source = sources[piece]
                    continue
                statement = self._behind_labels(piece)
                if not statement or statement.startswith("."):
                    del numbers[at : at + marks_in(piece)]
                    self._directive(statement, declared=True)
                    if statement.startswith(".loc ") and ":" not in piece:
                        sources[piece] = self.source
                    continue
                form = self._form(statement, numbers, at)
                if ":" not in piece:
                    forms[piece] = form
            code.forms.append(form)
            code.sources.append(self.source)
            at += form.count
        code.name(numbers)
        rest = self._behind_labels(pieces[-1])
        if rest:
            raise ParseError(f"statement without its semicolon: {rest[:80]!r}")

    def _behind_labels(self, piece: str) -> str:
        """A statement without the labels in front of it, which belong to the next instruction."""
        position = 0
        while ":" in piece and (match := _LEAD.match(piece, position)):
            if match.group(2) is None:
                raise ParseError(f"brace without its start: {piece[position:].strip()[:80]!r}")
            self.kernel.labels[match.group(2)] = len(self.code)
            position = match.end()
        return " ".join(piece[position:].split())

    def _read_scopes(self, body: str) -> None:
        position = 0
        for piece in body.split(";"):
            stop = position + len(piece)
            if piece.lstrip()[:1] in ("{", "}") or ":" in piece:
                position = self._lead(body, position, stop)
            statement = " ".join(body[position:stop].split())
            if stop == len(body) and statement:
                raise ParseError(f"statement without its semicolon: {statement[:80]!r}")
            if statement and not statement.startswith("."):
                self._instruction(statement)
            else:
                self._directive(statement)
            position = stop + 1

    def _lead(self, body: str, position: int, stop: int) -> int:
        """Enter and leave scopes and note the labels in front of a statement -> where it begins."""
        while match := _LEAD.match(body, position, stop):
            position = match.end()
            brace, label = match.groups()
            if brace == "{":
                self._open(body, position)
            elif brace == "}":
                if len(self.scopes) == 1:
                    raise ParseError(f"brace without its start: {body[position - 1 : position + 79]!r}")
                self.scopes.pop()
                self.label_scopes.pop()
                self._look()
            else:
                self.kernel.labels[self._label(label)] = len(self.code)
        return position

    def _open(self, body: str, start: int) -> None:
        """Enter a scope; the labels it declares belong to it, so that inlined assembly may repeat them."""
        self.scope_count += 1
        inner, _ = braced(body, start - 1)
        names = {m.group(1) for m in _INNER_LABEL.finditer(inner)}
        self.scopes.append({})
        self.label_scopes.append({name: f"{name}@{self.scope_count}" for name in names})
        self._look()

    def _look(self) -> None:
        """See what the present scopes name."""
        self.visible = self.scopes[0] if len(self.scopes) == 1 else ChainMap(*reversed(self.scopes))
        self.labelled = any(self.label_scopes)

    def _label(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.label_scopes) if name in scope), name)

    def _directive(self, statement: str, declared: bool = False) -> None:
        """A statement that is no instruction. declared: registers have been."""
        if not statement:
            return
        if statement.startswith(".loc "):
            _, file, line = statement.split()
            self.source = (int(file), int(line))
        elif statement.startswith(".reg"):
            if not declared:
                self._declare(statement)
        elif statement.startswith((".shared", ".local")):
            name, space, align, size = variable(statement)
            if space == "shared":
                place_shared(self.kernel, name, align, size)
            else:
                offset = -(-self.kernel.local_bytes // align) * align
                self.kernel.local_symbols[name] = offset
                self.kernel.local_bytes = offset + size
        else:
            raise Unsupported(f"unsupported: {statement}")

    def _declare(self, statement: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement)
        if match is None or match.group(1) not in TYPE_BYTES:
            raise Unsupported(f"unsupported: {statement}")
        kind, scope, registers = match.group(1), self.scopes[-1], self.kernel.registers
        for name in (part.strip() for part in match.group(2).split(",")):
            ranged = re.match(r"([%\w$]+)<(\d+)>$", name)
            names = [f"{ranged.group(1)}{i}" for i in range(int(ranged.group(2)))] if ranged else [name]
            self.bare |= not name.startswith("%")
            first = len(registers)
            scope.update(zip(names, range(first, first + len(names)), strict=True))
            registers.extend([(one, kind) for one in names])

    def _instruction(self, statement: str) -> None:
        """One instruction; its form is shared where nothing but registers can make a difference."""
        parts = _NAME.split(statement)
        found = [self.visible.get(name) for name in parts[1::2]]
        if self.bare or self.labelled:
            ins = Grammar(Named(self.visible), self._label).read(statement, self.source)
            self.code.keep(ins, Grammar(Numbering(self.visible, ins.registers)).read(statement))
            return
        kinds = self.kernel.registers
        parts[1::2] = [
            name if number is None else mark(kinds[number][1]) for name, number in zip(parts[1::2], found, strict=True)
        ]
        numbers = [number for number in found if number is not None]
        self.code.add(self._form("".join(parts), numbers), numbers, self.source)

    def _form(self, marked: str, numbers: list[int], at: int = 0) -> Form:
        """The form of a marked text, whose registers are `numbers` from the place `at` on."""
        try:
            return form_of(marked)
        except (ParseError, Unsupported):
            text = with_names(marked, [self.kernel.registers[number][0] for number in numbers[at:]])
            Grammar(Named(self.visible), self._label).read(text)  # raises the same, with the names of the registers
            raise
