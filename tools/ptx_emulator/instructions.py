"""Every module that registers instructions, imported once."""

from ptx_emulator import (
    atomics,
    convert,
    copies,
    floating,
    integer,
    loads,
    matrix,
    mma,
    moves,
    register_file,
    waits,
    warp,
    wgmma,
)

__all__ = [
    "atomics",
    "convert",
    "copies",
    "floating",
    "integer",
    "loads",
    "matrix",
    "mma",
    "moves",
    "register_file",
    "waits",
    "warp",
    "wgmma",
]
