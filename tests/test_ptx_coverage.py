"""Every instruction that the emulator takes is in a test's PTX: one that never runs may do anything."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import ptx_emulator  # noqa: F401  registers every builder
import pytest
from ptx_emulator.core.decode import BUILDERS, WAITS

FOLDER = Path(__file__).parent
SOURCES = sorted({*FOLDER.glob("test_ptx_*.py"), FOLDER / "ptx_snippets.py"} - {Path(__file__)})


def texts(source: str) -> list[str]:
    """The string constants of Python code, parts of f-strings too, without those that stand alone: docstrings."""
    tree = ast.parse(source)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in alone)
    return [node.value for node in constants if isinstance(node.value, str)]


def instructions_in(found: Iterable[str]) -> set[str]:
    """Names that begin a statement of PTX, after a label's brace or a guard, or are a text of their own, as parameters
    are."""
    begins = re.compile(r"(?:^|[;{}:\n])\s*(?:@!?%\w+\s+)?([a-z]\w*)(?=[.;]|$)")
    return {match[1] for text in found for match in begins.finditer(text)}


NAMED = instructions_in(text for path in SOURCES for text in texts(path.read_text()))


@pytest.mark.parametrize("name", sorted({*BUILDERS, *WAITS}))
def test_every_instruction_is_in_a_test(name: str) -> None:
    assert name in NAMED, f"no test_ptx_*.py has {name}: test it, or let the emulator refuse it"


def test_prose_and_names_of_variables_are_no_instructions() -> None:
    source = '"""ldu.global is not here."""\nldu = f"@!%p1 st.u32 {x}; {kind}: red.add; %r = {{ cnot }}" + "popc"\n'
    assert instructions_in(texts(source)) == {"st", "red", "popc"}
