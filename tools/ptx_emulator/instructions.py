"""Every module that registers instructions, imported once."""

from ptx_emulator import (
    atomics,
    barriers,
    bulk_forms,
    clusters,
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
    "barriers",
    "bulk_forms",
    "clusters",
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
