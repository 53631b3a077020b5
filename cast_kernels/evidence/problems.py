"""The problems that commands compile and emulate, by the names that they are asked for. It loads no tool."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cast_kernels.evidence.cases import Case
from cast_kernels.evidence.experts import ExpertCase

#: The architectures that are compiled for: those of `ptx_emulator.targets`.
COMPILED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
#: What `cast-kernels compile` checks unless some are named.
GATED = ("sm_80", "sm_90", "sm_100", "gfx942")
#: What `cast-kernels compile --ptxas` compares unless some are named: those of them that a ptxas assembles.
ASSEMBLED = ("sm_80", "sm_90", "sm_100")
#: Those whose PTX the emulator executes, as it says itself.
EMULATED = ("sm_80", "sm_90")
#: GPUs whose times are predicted: those that `ptx_emulator.predict.devices` has constants of.
PREDICTED = ("A100", "H100", "H200")

_PAPER = Case(batch=6)
AnyCase = Case | ExpertCase

#: What is compiled. Step: one training step of the published sizes with default settings, with six clips and with one,
#: for which some tables have tiles of their own. Paper: every recompute level
#: and inference too, the experts with both of their activations. All: also other windows, head dimensions 16 and 64, a
#: wide bottleneck and a wide adapter, each direction alone, drop-path, no positions.
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

#: No tile of `attention_backward` holds a window.
_LONG = replace(_SMALL, batch=1, frames=2, patches=70, windows=("space", "space-time"))

#: What the emulator executes kernels by, the default first.
ENGINES = ("interpreter", "native")

#: Size -> what is run. Small: every window, each direction alone, awkward sizes. Paper: forward of one clip and of
#: three at the published size, backward of a smaller one. Full: both of both at the published size.
SIZES: dict[str, tuple[Case, ...]] = {
    "small": (
        _SMALL,
        replace(_SMALL, windows=("space-time", "space-time"), recompute="nothing"),
        replace(_SMALL, directions=("t2s",), recompute="all"),
        replace(_SMALL, directions=("s2t",), positions=False),
        _LONG,
        replace(_LONG, bottleneck=64, heads=1),  # 64 channels a head have a tile of their own there
    ),
    "paper": (
        Case(batch=1, backward=False),
        Case(batch=3, backward=False),  # too many rows for the tiles that sm_90 has for few
        Case(batch=1, frames=4, patches=36, dim=256, bottleneck=128, heads=4),
    ),
    "full": (Case(batch=1), Case(batch=3)),
}


@dataclass(frozen=True)
class Planted:
    """A problem in whose kernels faults are planted: each runs a whole launch, so it is small."""

    case: AnyCase
    few_rows: bool = True  # whether its kernels have the tiles for few rows, where an architecture has such


#: Sizes that fill no tile: rows, channels of the streams and of the bottleneck, three steps of each contraction.
_RAGGED = Case(2, 3, 7, 96, 112, 7, scaled=True)
_RAGGED_EXPERT = ExpertCase(rows=37, dim=96, hidden=176, adapter=48, heads=3, scaled=True)

#: Name -> where faults are planted. A kernel is mutated in the first problem that launches it. Long windows: one whose
#: length divides a tile, and one that no tile holds.
PLANTED: dict[str, Planted] = {
    "exchange": Planted(_RAGGED),
    "many rows": Planted(replace(_RAGGED, backward=False), few_rows=False),
    "long windows": Planted(Case(1, 4, 36, 64, 32, 2, windows=("time", "space-time"), scaled=True)),
    **{op: Planted(replace(_RAGGED_EXPERT, op=op)) for op in ("ffn", "self_attention", "adapter")},
}
