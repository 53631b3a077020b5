"""Which lines of a program launched a kernel."""

from __future__ import annotations

import os
import runpy
import sys
import sysconfig
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import triton

import ptx_emulator

#: Where files lie that are between a program's line and the launch, and are no part of the program.
_MACHINERY = (*(f"{Path(str(module.__file__)).parent}{os.sep}" for module in (triton, torch, ptx_emulator)), "<")
_INSTALLED = (sysconfig.get_path("purelib") + os.sep, sysconfig.get_path("stdlib") + os.sep)


class Place(NamedTuple):
    """A line of a program."""

    file: str  #: its path, whole
    line: int  #: from 1
    function: str  #: that the line is in; "<module>" outside of all

    def __str__(self) -> str:
        return f"{shown(self.file)}:{self.line} in {self.function}"


def shown(file: str) -> str:
    """A file's path as a reader wants it: from here, or from where packages are installed."""
    here = os.getcwd() + os.sep
    for folder in (here, *_INSTALLED, *(f"{path}{os.sep}" for path in sys.path if path)):
        if file.startswith(folder):
            return file.removeprefix(folder)
    return file


def launching(script: str) -> tuple[Place, ...]:
    """The line that launched what is launched now, and the next line of `script` on the way to it, if there is one."""
    frames = _frames()
    return (*frames[:1], *[place for place in frames[1:] if place.file == script][:1])


def _frames() -> list[Place]:
    """The program's own lines that are being executed, innermost first."""
    found, frame = [], sys._getframe()
    at: FrameType | None = frame
    while at is not None:
        file = at.f_code.co_filename
        if not file.startswith(_MACHINERY) and file != runpy.__file__:
            found.append(Place(os.path.abspath(file), at.f_lineno, at.f_code.co_name))
        at = at.f_back
    return found
