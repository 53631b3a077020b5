"""Tile shapes, one table per architecture: exact entry, then the nearest older architecture, then the default.

No tuning at run time or import. `cast-kernels tune` measures on the GPU at hand and writes a table in this form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache


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
    programs: int = 1  # that `weight_gradient` wants: the GPU's multiprocessors, or 1 where rows are not to be split


#: Widths of a chunk of the bottleneck. Tensor cores want 16 at least; 128 fills a warpgroup's instruction.
CHUNKS = (128, 64, 32, 16)
#: Chunks that a row may have: 768 / 128.
MOST_CHUNKS = 6


@cache
def chunking(d: int) -> tuple[int, int]:
    """(CHUNK, CHUNKS) that cover d channels, at most 768, with the least padding; the widest chunk among equals."""
    covers = [(-(-d // chunk), chunk) for chunk in CHUNKS if -(-d // chunk) <= MOST_CHUNKS]
    count, chunk = min(covers, key=lambda cover: (cover[0] * cover[1], cover[0]))
    return chunk, count


#: Kernels whose steps `k` must be equal: h is added up by `exchange` in forward, by `exchange_backward` where backward
#: computes it again, to the same bits.
SAME_K = ("exchange", "exchange_short", "exchange_backward")


@dataclass(frozen=True)
class TileSet:
    """The tiles of all kernels for one architecture, operand size and width of the bottleneck."""

    source: str  # where the entries come from
    row: Tile  # of the kernels that hold a row of the bottleneck, unless they are named below
    weight_gradient: Tile
    attention_backward: Tile  # reads `queries`, `keys`, `warps` and `key_stages` alone
    project: Tile | None = None
    project_wide: Tile | None = None  # `project` where streams are wider than operands, as under autocast
    exchange: Tile | None = None
    #: `exchange` where a tile of queries holds whole windows. Beside longer windows only its rows and queries count.
    exchange_short: Tile | None = None
    attention_backward_short: Tile | None = None  # `attention_backward` where windows fit a tile, if unlike others
    attention_backward_wide: Tile | None = None  # where they don't, and heads have 64 channels, if unlike others
    exchange_backward: Tile | None = None
    project_backward: Tile | None = None
    adapter_forward: Tile | None = None
    adapter_backward: Tile | None = None
    few_rows: int = 0  # up to so many rows of both streams the kernels in `few` take its tiles
    few: Mapping[str, Tile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = {name: self.of(name).k for name in SAME_K}
        steps |= {f"few[{name!r}]": tile.k for name, tile in self.few.items() if name in SAME_K}
        if len(set(steps.values())) > 1:
            raise ValueError(
                f"the output projection's steps k are {steps}; they must be equal, or recompute levels differ in bits"
            )

    def of(self, kernel: str) -> Tile:
        """The tile of one kernel: its own, or the one that it shares."""
        own: Tile | None = getattr(self, kernel, None)
        if kernel == "project_wide" and own is None:
            return self.of("project")
        return own or (self.attention_backward if kernel.startswith("attention_backward_") else self.row)


_COMPILED = "compiled: the largest rows without spills inside a loop, within the shared memory of a CTA"
_BY_MODEL = "compiled and predicted: fewest bytes from L2 among tiles without spills inside a loop"
_FITS = "by arithmetic, then compiled: fits in shared memory, no spill inside a loop but by exception"
_BY_ARITHMETIC = "by arithmetic: operands and stages fit in shared memory; not compiled for this table yet"

#: `attention_backward` with 64 channels a head: four warps spill 254 times inside loops at 128 rows on sm_80 and 397 on
#: sm_90, three at 64 on sm_80.
_WIDE_HEADS = Tile(rows=128, k=64, columns=64, warps=8, stages=2, queries=128)

#: (architecture, bits of an operand, whether d is above 384) -> tiles. Nothing here was timed on a GPU.
_TABLE: dict[tuple[str, int, bool], TileSet] = {
    ("sm_80", 16, False): TileSet(
        _COMPILED,
        row=Tile(rows=64, k=32, columns=64, warps=8, stages=3),
        # Eight warps repeat products of 64 rows with 64 columns: 254 to 169 us, 232 to 148 (A100, six clips, traced).
        project=Tile(rows=64, k=32, columns=64, warps=4, stages=3),
        # Steps of 32 float32 channels spill 26 times inside loops; 8 warps spill never and repeat products.
        project_wide=Tile(rows=64, k=16, columns=64, warps=4, stages=3),
        exchange=Tile(rows=64, k=32, columns=64, warps=4, stages=3),
        exchange_short=Tile(rows=64, k=32, columns=64, warps=4, stages=3),
        weight_gradient=Tile(rows=128, k=32, columns=128, warps=8, stages=4, programs=108),
        # 131 us with 64 rows, 134 with 8 warps and two stages, 49 so (A100, six clips, predicted).
        attention_backward=Tile(rows=128, k=64, columns=64, warps=4, stages=2, queries=128),
        attention_backward_short=Tile(rows=64, k=64, columns=64, warps=4, stages=2),
        attention_backward_wide=_WIDE_HEADS,
    ),
    ("sm_80", 16, True): TileSet(
        _FITS,
        row=Tile(rows=32, k=32, columns=64, warps=8, stages=3, queries=32),
        weight_gradient=Tile(rows=128, k=32, columns=128, warps=8, stages=4, programs=108),
        attention_backward=Tile(rows=64, k=64, columns=64, warps=4, stages=2),
        attention_backward_wide=_WIDE_HEADS,
    ),
    ("sm_80", 32, False): TileSet(
        _COMPILED,
        # 32 rows spill 845 times inside `project`'s loops: tf32x3 wants the operand's row twice.
        row=Tile(rows=16, k=32, columns=64, warps=8, stages=2, queries=16, keys=32),
        project_backward=Tile(rows=16, k=16, columns=64, warps=8, stages=2),  # steps of 32: 24 spills inside loops
        adapter_backward=Tile(rows=16, k=16, columns=64, warps=8, stages=2),  # steps of 32: one
        weight_gradient=Tile(rows=64, k=32, columns=64, warps=4, stages=3, programs=108),
        attention_backward=Tile(rows=32, k=32, columns=32, warps=4, stages=2, queries=32, keys=32),
    ),
    ("sm_80", 32, True): TileSet(
        _FITS,
        row=Tile(rows=16, k=16, columns=32, warps=8, stages=2, queries=16, keys=32),
        weight_gradient=Tile(rows=64, k=32, columns=64, warps=4, stages=3, programs=108),
        attention_backward=Tile(rows=32, k=32, columns=32, warps=4, stages=2, queries=32, keys=32),
    ),
    ("sm_86", 16, False): TileSet(
        _COMPILED,
        row=Tile(rows=64, k=32, columns=64, warps=8, stages=3),
        weight_gradient=Tile(rows=128, k=32, columns=128, warps=8, stages=3, programs=84),
        attention_backward=Tile(rows=64, k=64, columns=64, warps=4, stages=2),
        attention_backward_wide=_WIDE_HEADS,
    ),
    ("sm_86", 16, True): TileSet(
        _BY_ARITHMETIC,
        row=Tile(rows=32, k=16, columns=64, warps=8, stages=3, queries=32),
        weight_gradient=Tile(rows=128, k=32, columns=128, warps=8, stages=3, programs=84),
        attention_backward=Tile(rows=64, k=64, columns=64, warps=4, stages=2),
        attention_backward_wide=_WIDE_HEADS,
    ),
    ("sm_86", 32, True): TileSet(
        _BY_ARITHMETIC,
        row=Tile(rows=16, k=16, columns=32, warps=8, stages=1, queries=16, keys=32),
        weight_gradient=Tile(rows=64, k=32, columns=64, warps=4, stages=3, programs=84),
        attention_backward=Tile(rows=32, k=32, columns=32, warps=4, stages=2, queries=32, keys=32),
    ),
    ("sm_90", 16, False): TileSet(
        _BY_MODEL,
        row=Tile(rows=128, k=64, columns=64, warps=8, stages=3, queries=128),
        # One stage: float32 rows are rounded in registers, from which wgmma takes them, and with two or three stages
        # ptxas before 13.3 writes the next step's into registers that a wgmma may still read (docs/ptxas.md). Steps of
        # 64 channels spill 20 times inside a loop.
        project_wide=Tile(rows=128, k=32, columns=64, warps=8, stages=1),
        exchange_short=Tile(rows=128, k=64, columns=64, warps=8, stages=3),
        # One or two clips are at most 50 programs of 128 rows for 132 SMs; half as large, a program takes half as long.
        few_rows=132 * 64,
        few={
            **dict.fromkeys(
                ("project", "exchange", "exchange_short"), Tile(rows=64, k=64, columns=64, warps=4, stages=3)
            ),
            # Steps of 64 float32 channels spill 20 times inside loops.
            "project_wide": Tile(rows=64, k=32, columns=64, warps=4, stages=1),
        },
        # 128 rows are 74 programs at six clips, for 132 SMs; in backward they spill outside of loops too.
        adapter_forward=Tile(rows=64, k=64, columns=64, warps=8, stages=3),
        adapter_backward=Tile(rows=64, k=64, columns=64, warps=8, stages=3),
        weight_gradient=Tile(rows=128, k=64, columns=384, warps=8, stages=3, programs=132),
        # A quarter of the tiles' score products, and K and V from L2 half as often, as 64 rows: 62 to 32 us.
        attention_backward=Tile(rows=128, k=64, columns=64, warps=4, stages=2, queries=128, key_stages=2),
        attention_backward_short=Tile(rows=64, k=64, columns=64, warps=4, stages=2),
        attention_backward_wide=replace(_WIDE_HEADS, key_stages=2),
    ),
    ("sm_90", 16, True): TileSet(
        _FITS,
        row=Tile(rows=64, k=32, columns=64, warps=8, stages=3),
        # One stage, as above: with three ptxas 12.9.86 writes registers that a wgmma may still read, under autocast.
        project_wide=Tile(rows=64, k=32, columns=64, warps=8, stages=1),
        weight_gradient=Tile(rows=128, k=64, columns=128, warps=8, stages=4, programs=132),
        attention_backward=Tile(rows=64, k=64, columns=64, warps=4, stages=2),
        attention_backward_wide=replace(_WIDE_HEADS, key_stages=2),
        adapter_backward=Tile(rows=32, k=32, columns=64, warps=8, stages=2),
    ),
    ("sm_100", 16, False): TileSet(
        # At 128 rows `project` and `exchange_backward` spill 57 and 63 times inside loops, `exchange` up to 18 times.
        _COMPILED,
        row=Tile(rows=64, k=64, columns=64, warps=8, stages=3),
        weight_gradient=Tile(rows=256, k=64, columns=128, warps=8, stages=3, programs=148),
        attention_backward=Tile(rows=64, k=64, columns=64, warps=4, stages=2),
    ),
    ("sm_100", 16, True): TileSet(
        _COMPILED,
        row=Tile(rows=64, k=32, columns=64, warps=8, stages=3),
        project=Tile(rows=32, k=32, columns=64, warps=8, stages=3),
        project_backward=Tile(rows=32, k=32, columns=64, warps=8, stages=3),
        adapter_backward=Tile(rows=32, k=32, columns=64, warps=8, stages=2),
        weight_gradient=Tile(rows=128, k=64, columns=128, warps=8, stages=4, programs=148),
        attention_backward=Tile(rows=64, k=64, columns=64, warps=4, stages=2),
    ),
    ("gfx942", 16, False): TileSet(
        _COMPILED,
        row=Tile(rows=64, k=32, columns=64, warps=4, stages=2),
        weight_gradient=Tile(rows=128, k=32, columns=128, warps=4, stages=2, programs=304),
        attention_backward=Tile(rows=64, k=64, columns=64, warps=4, stages=1),
    ),
    ("gfx942", 16, True): TileSet(
        _FITS,
        row=Tile(rows=32, k=16, columns=64, warps=4, stages=2, queries=32),
        weight_gradient=Tile(rows=128, k=32, columns=128, warps=4, stages=2, programs=304),
        attention_backward=Tile(rows=64, k=64, columns=64, warps=4, stages=1),
    ),
    ("gfx942", 32, False): TileSet(
        _COMPILED,
        row=Tile(rows=32, k=16, columns=32, warps=4, stages=2, queries=32, keys=32),
        weight_gradient=Tile(rows=64, k=16, columns=64, warps=4, stages=2, programs=304),
        attention_backward=Tile(rows=32, k=32, columns=32, warps=4, stages=1, queries=32, keys=32),
    ),
    ("gfx942", 32, True): TileSet(
        _BY_ARITHMETIC,
        row=Tile(rows=16, k=16, columns=32, warps=4, stages=1, queries=16, keys=32),
        weight_gradient=Tile(rows=64, k=16, columns=64, warps=4, stages=2, programs=304),
        attention_backward=Tile(rows=32, k=32, columns=32, warps=4, stages=1, queries=32, keys=32),
    ),
}

#: Newer than sm_90 and sm_100, with the shared memory of sm_86: compute capability 12 allows a CTA 101376 bytes (CUDA
#: programming guide, technical specifications per compute capability), and sm_100's tiles take 172080.
_LIKE_SM_86 = re.compile(r"sm_12\d")

#: Where nothing else is known: what the smallest shared memory takes.
_DEFAULT = TileSet(
    "a default: small enough for every architecture that was compiled for",
    row=Tile(rows=16, k=16, columns=32, warps=4, stages=1, queries=16, keys=32),
    weight_gradient=Tile(rows=32, k=32, columns=32, warps=4, stages=1),
    attention_backward=Tile(rows=32, k=32, columns=32, warps=4, stages=1, queries=32, keys=32),
)


@cache
def find_set(arch: str, bits: int, d: int) -> TileSet:
    """The tiles for an architecture: its own, then the nearest older one's of the same vendor, then the default.

    Older than sm_12x is sm_86, for its shared memory.

    Args:
        arch: "sm_90", "gfx942".
        bits: of an operand, 16 or 32.
        d: channels of the bottleneck.
    """
    wide = d > 384
    exact = _TABLE.get((arch, bits, wide))
    if exact is not None or not arch.startswith("sm_"):
        return exact or _DEFAULT
    version = 86 if _LIKE_SM_86.fullmatch(arch) else int(arch.removeprefix("sm_"))
    known = {int(a.removeprefix("sm_")): a for a, b, w in _TABLE if a.startswith("sm_") and (b, w) == (bits, wide)}
    older = [v for v in known if v <= version]
    return _TABLE[(known[max(older)], bits, wide)] if older else _DEFAULT


@contextmanager
def trying(arch: str, bits: int, d: int, tiles: TileSet) -> Iterator[None]:
    """Inside, the table has these tiles for the architecture: how candidates are measured."""
    key, before = (arch, bits, d > 384), dict(_TABLE)
    _TABLE[key] = tiles
    _table_changed()
    try:
        yield
    finally:
        _TABLE.clear()
        _TABLE.update(before)
        _table_changed()


#: How often the table changed, as `trying` does: what was made from it is kept by this number.
changes: int = 0


def _table_changed() -> None:
    global changes
    changes += 1
    find_set.cache_clear()


def find(arch: str, kernel: str, bits: int, d: int, rows: int | None = None) -> Tile:
    """The tile of one kernel; with `rows` of both streams, one for so few rows if the table has it."""
    tiles = find_set(arch, bits, d)
    few = kernel if kernel in tiles.few else kernel.removesuffix("_wide")
    if rows is not None and rows <= tiles.few_rows and few in tiles.few:
        return tiles.few[few]
    return tiles.of(kernel)
