"""The commands' problems by name. This module imports no tool."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cast_kernels.evidence.cases import Case
from cast_kernels.evidence.experts import ExpertCase

#: The architectures of `ptx_emulator.targets`.
COMPILED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
#: Default of `cast-kernels compile`.
GATED = ("sm_80", "sm_90", "sm_100", "gfx942")
#: Default of `cast-kernels compile --ptxas`, out of those with a ptxas.
ASSEMBLED = ("sm_80", "sm_90", "sm_100")
#: The architectures that the emulator executes.
EMULATED = ("sm_80", "sm_90")
#: The GPUs with constants in `ptx_emulator.predict.devices`.
PREDICTED = ("A100", "H100", "H200")

_PAPER = Case(batch=6)
AnyCase = Case | ExpertCase

#: The problems to compile. Step: a training step of the published sizes with default settings, with six clips and with
#: one, because some tables have separate tiles for few rows. Paper: also every recompute level and inference, and the
#: experts with both activations. All: also other windows, head dimensions 16 and 64, a wide bottleneck and a wide
#: adapter, each direction alone, drop-path, no positions.
PROBLEMS: dict[str, tuple[AnyCase, ...]] = {
    "step": (_PAPER, replace(_PAPER, batch=1), ExpertCase()),
    "paper": (
        *(replace(_PAPER, recompute=level) for level in ("cheap", "nothing", "all")),
        replace(_PAPER, backward=False),
        *(replace(_PAPER, batch=1, backward=train) for train in (True, False)),
        ExpertCase(),
        ExpertCase(activation="quick_gelu", recompute="nothing"),
    ),
}
PROBLEMS["all"] = (
    *PROBLEMS["paper"],
    replace(_PAPER, windows=("space-time", "space-time")),
    replace(_PAPER, windows=("space", "time")),
    replace(_PAPER, heads=24),
    replace(_PAPER, heads=6),
    replace(_PAPER, bottleneck=768),
    replace(_PAPER, directions=("t2s",), positions=False, scaled=True),
    replace(_PAPER, directions=("s2t",), positions=False, scaled=True),
    ExpertCase(scaled=True),
    ExpertCase(adapter=768),
)

_SMALL = Case(2, 3, 7, 64, 32, 2, scaled=True)

#: Its windows are longer than every tile of `attention_backward`.
_LONG = replace(_SMALL, batch=1, frames=2, patches=70, windows=("space", "space-time"))

#: The emulator's engines, the default first.
ENGINES = ("interpreter", "native")

#: Size -> the problems to run. Small: every window, each direction alone, awkward sizes. Paper: forward of one clip and
#: of three at the published size, backward of a smaller one. Full: forward and backward of both at the published size.
SIZES: dict[str, tuple[Case, ...]] = {
    "small": (
        _SMALL,
        replace(_SMALL, windows=("space-time", "space-time"), recompute="nothing"),
        replace(_SMALL, directions=("t2s",), recompute="all"),
        replace(_SMALL, directions=("s2t",), positions=False),
        _LONG,
        replace(_LONG, bottleneck=64, heads=1),  # here 64 channels a head have a separate tile
    ),
    "paper": (
        Case(batch=1, backward=False),
        Case(batch=3, backward=False),  # too many rows for sm_90's tiles for few
        Case(batch=1, frames=4, patches=36, dim=256, bottleneck=128, heads=4),
    ),
    "full": (Case(batch=1), Case(batch=3)),
}


@dataclass(frozen=True)
class Planted:
    """A problem for planting faults. Each fault runs a whole launch, so it is small."""

    case: AnyCase
    few_rows: bool = True  # whether its kernels have the tiles for few rows, if an architecture has such


#: Sizes that fill no tile: rows, channels of the streams and of the bottleneck, three steps of each contraction.
_RAGGED = Case(2, 3, 7, 96, 112, 7, scaled=True)
_RAGGED_EXPERT = ExpertCase(rows=37, dim=96, hidden=176, adapter=48, heads=3, scaled=True)

#: Name -> a problem for planting faults. A kernel is mutated in the first problem that launches it. Long windows: one
#: has a length that divides a tile, one is longer than every tile.
PLANTED: dict[str, Planted] = {
    "exchange": Planted(_RAGGED),
    "many rows": Planted(replace(_RAGGED, backward=False), few_rows=False),
    "long windows": Planted(Case(1, 4, 36, 64, 32, 2, windows=("time", "space-time"), scaled=True)),
    **{op: Planted(replace(_RAGGED_EXPERT, op=op)) for op in ("ffn", "self_attention", "adapter")},
}
