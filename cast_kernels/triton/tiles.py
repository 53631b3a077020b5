"""Tile shapes, one table per architecture: exact entry, then the nearest older architecture, then the default.

No tuning at run time or import. `cast-kernels tune` measures on the GPU at hand and writes a table in this form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its problem."""

    rows: int  # BM: rows of a program
    k: int  # BK: channels of one step of a contraction from memory
    columns: int  # BN: output columns of one step of `widen`
    warps: int
    stages: int  # of the contraction from memory
    widen_stages: int = 1  # of the loop over output columns: more needs shared memory that the row's operand takes
    queries: int = 64  # BQ: rows that attend together
    keys: int = 64  # BKEY: keys at a time
    key_stages: int = 1


#: Widths of a chunk of the bottleneck. Tensor cores want 16 at least; 128 fills a warpgroup's instruction.
CHUNKS = (128, 64, 32, 16)
#: Chunks that a row may have: 768 / 128.
MOST_CHUNKS = 6


def chunking(d: int) -> tuple[int, int]:
    """(CHUNK, CHUNKS) that cover d channels, at most 768, with the least padding; the widest chunk among equals."""
    covers = [(-(-d // chunk), chunk) for chunk in CHUNKS if -(-d // chunk) <= MOST_CHUNKS]
    count, chunk = min(covers, key=lambda cover: (cover[0] * cover[1], cover[0]))
    return chunk, count


class Allowance(NamedTuple):
    """What the gates of `cast-kernels compile` allow one kernel, and why the tile is kept all the same."""

    reason: str
    loop_spills: int = 0  # spill instructions inside loops, at most
    tensor_core: str = ""  # opcode that may stand for the architecture's own, as "HMMA" on sm_90


#: (architecture, kernel, bits of an operand) -> what it is allowed. One that nothing needs is named by the command.
EXCEPTIONS: dict[tuple[str, str, int], Allowance] = {}

#: (architecture, kernel, bits of an operand) -> tile, for bottlenecks up to 384.
_TABLE: dict[tuple[str, str, int], Tile] = {}

#: Kernel -> tile where no table has an entry: small enough for every architecture and dtype.
_DEFAULT: dict[str, Tile] = {
    "project": Tile(rows=32, k=32, columns=64, warps=4, stages=2),
    "exchange": Tile(rows=32, k=32, columns=64, warps=4, stages=2, queries=32, keys=32),
    "exchange_backward": Tile(rows=32, k=32, columns=64, warps=4, stages=2),
    "attention_backward": Tile(rows=32, k=32, columns=64, warps=4, stages=2, queries=32, keys=32),
    "project_backward": Tile(rows=32, k=32, columns=64, warps=4, stages=2),
    "weight_gradient": Tile(rows=64, k=32, columns=64, warps=4, stages=2),
}


def find(arch: str, kernel: str, bits: int, d: int) -> Tile:
    """The tile of a kernel: exact, then the nearest older architecture of the same vendor, then the default."""
    return _DEFAULT[kernel]
