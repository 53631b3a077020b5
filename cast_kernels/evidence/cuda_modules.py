"""The PTX embedded in `cast_kernels._cuda`, by kernel."""

from __future__ import annotations

import re
import zlib
from functools import cache
from typing import NamedTuple

from cast_kernels import _native

_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(", re.MULTILINE)
_DEBUGGING = re.compile(r"^\s*\.section\b", re.MULTILINE)


class Entry(NamedTuple):
    """One kernel."""

    module: str  # name of its source
    ptx: str  # a module with only this kernel, with the names of source files, without debuggers' sections


@cache
def modules() -> dict[str, str]:
    """The text of each module, by the name of its source.

    Raises:
        RuntimeError: the CUDA kernels are not built; the message says why and how to build them.
    """
    return {name: zlib.decompress(packed).decode() for name, packed in _native.cuda().packed_ptx().items()}


@cache
def entries() -> dict[str, Entry]:
    """All kernels by name.

    Raises:
        RuntimeError: the CUDA kernels are not built.
    """
    return {kernel: Entry(name, ptx) for name, text in modules().items() for kernel, ptx in split(text).items()}


def split(text: str) -> dict[str, str]:
    """A module's text -> for each kernel a module with the shared text and only this kernel.

    Raises:
        ValueError: the braces of a kernel are not balanced.
    """
    bodies, common, at = {}, [], 0
    for found in _ENTRY.finditer(text):
        stop = _end(text, found.end())
        common.append(text[at : found.start()])
        bodies[found[1]] = text[found.start() : stop]
        at = stop
    common.append(_DEBUGGING.split(text[at:], maxsplit=1)[0])
    shared = "".join(common)
    return {kernel: f"{shared}\n{body}\n" for kernel, body in bodies.items()}


def _end(text: str, start: int) -> int:
    """The position after the brace that closes the first one from `start` on."""
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.end()
    raise ValueError("the braces of a kernel are not balanced")
