"""The gates for every compiled kernel, and the exceptions: their limits and reasons.

A gate is a number that a kernel's code must not exceed. An exception names one kernel of one table of tiles. Unneeded
exceptions must be removed, because they would hide the next spill.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ptx_emulator.predict.resources import Resources
from ptx_emulator.targets import target

from cast_kernels.evidence.cases import DTYPES, KINDS

#: (architecture, kernel, bits of an operand, whether its bottleneck is above 384).
Key = tuple[str, str, int, bool]


class Allowance(NamedTuple):
    """An exception for one kernel in `cast-kernels compile`, and the reason to keep its tile."""

    reason: str
    loop_spills: int = 0  # spill instructions inside loops, at most
    tensor_core: str = ""  # opcode that may replace the architecture's own, as "HMMA" on sm_90


Exceptions = Mapping[Key, Allowance]

_MMA_SYNC = (
    "wgmma and tcgen05 take 64 rows, tf32x3 the operand's row twice: on sm_90 `project` takes 229376 of 232448 bytes "
    "and spills 48 times inside loops, `attention_backward` 9 times; 16 and 32 rows with mma.sync do neither"
)

#: (target, kernel, bits of an operand, whether d is above 384) -> the exception, which `cast-kernels compile` prints.
EXCEPTIONS: dict[Key, Allowance] = {
    ("sm_80", "exchange", 16, False): Allowance(
        "one word once a step of 64 output columns, two with windows of (space, time); eight warps spill none and take "
        "1.6 times as long by the model",
        loop_spills=2,
    ),
    ("sm_90", "exchange", 16, False): Allowance(
        "words of addresses once a step of 64 output columns: two at 128 rows, where half the rows read every weight "
        "twice as often; in fp16 four at the 64 rows and 4 warps for few rows, where 8 warps repeat 40 % of products",
        loop_spills=4,
    ),
    ("sm_90", "project", 16, False): Allowance(
        "in fp16 four words once a step of 64 channels, at the 64 rows and 4 warps for few rows only; 8 warps repeat "
        "40 % of the products",
        loop_spills=4,
    ),
    **{
        (arch, "weight_gradient", 32, False): Allowance(
            "one word once a step of 32 rows, of sm_80's tile, which spills none there", loop_spills=1
        )
        for arch in ("sm_86", "sm_89")
    },
    ("sm_80", "adapter_backward", 32, True): Allowance(
        "nine words once a step of 16 channels; a product takes no fewer rows and channels than these 16", loop_spills=9
    ),
    ("sm_90", "project_backward", 16, False): Allowance(
        "one word once a step of 64 channels; 64 rows spill none there and read every weight twice as often",
        loop_spills=1,
    ),
    ("sm_90", "adapter_backward", 16, True): Allowance(
        "wgmma takes 64 rows, whose two rows of 768 channels spill 160 times inside loops", tensor_core="HMMA"
    ),
    ("sm_100", "project_backward", 16, False): Allowance(
        "eight words once a step of 64 channels, 50 with the direction s2t alone; of 32 channels twelve and 52; "
        "tcgen05 takes no fewer than these 64 rows",
        loop_spills=50,
    ),
    ("sm_100", "adapter_backward", 16, False): Allowance(
        "in fp16 seven words once a step of 64 channels, in bf16 none; tcgen05 takes no fewer than these 64 rows",
        loop_spills=7,
    ),
    **{
        ("sm_100", kernel, 16, True): Allowance(
            "tcgen05 takes 64 rows, which spill 51 (`project`) and 279 times (`project_backward`) inside loops; 32 "
            "rows with mma.sync spill none",
            tensor_core="HMMA",
        )
        for kernel in ("project", "project_backward", "adapter_backward")
    },
    **{
        (arch, "position_products", 16, wide): Allowance(
            "sums in fp32, as tf32 products of 16 rows: a table of eight positions has no 64 for wgmma or tcgen05",
            tensor_core="HMMA",
        )
        for arch in ("sm_90", "sm_100")
        for wide in (False, True)
    },
    **{
        (arch, kernel, 32, wide): Allowance(_MMA_SYNC, tensor_core="HMMA")
        for arch in ("sm_90", "sm_100")
        for wide in (False, True)
        for kernel in (
            "project",
            "exchange",
            "exchange_backward",
            "project_backward",
            "attention_backward",
            "position_products",
            "adapter_forward",
            "adapter_backward",
        )
    },
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    target: str
    dtype: str
    kernel: str
    tile: str  # constexprs and warps
    cases: tuple[str, ...]  # that launch it
    resources: Resources
    dots: int  # matrix products in Triton's IR
    wide: bool = False  # a bottleneck above 384; False for a kernel without one
    failures: tuple[str, ...] = field(default=())
    allowed: str = ""  # the exception used, with its reason

    @property
    def key(self) -> Key:
        """The row's key in the tile table."""
        return self.target, self.kernel, 8 * KINDS[self.dtype].compute.itemsize, self.wide


def judge(row: Row, exceptions: Exceptions) -> Row:
    """The row with its failed gates and its used exception."""
    goal, used = target(row.target), row.resources
    allowance = exceptions.get(row.key)
    failures, needed = list(row.failures), []
    if used.shared_bytes > goal.shared_limit:
        failures.append(f"{used.shared_bytes} bytes of shared memory; {goal.name} allows {goal.shared_limit}")
    if used.loop_spills:
        spilled = f"{used.loop_spills} spill instructions inside loops"
        if allowance and used.loop_spills <= allowance.loop_spills:
            needed.append(f"{spilled}, {allowance.loop_spills} allowed")
        else:
            failures.append(spilled + (f"; the exception allows {allowance.loop_spills}" if allowance else ""))
    # Every kind counts: in "HGMMA+HMMA" one of several products fell back to mma.sync.
    kinds = used.tensor_core.split("+")
    others = [kind for kind in kinds if not re.fullmatch(goal.tensor_core, kind)]
    if row.dots and others:
        also = " as well as" if len(others) < len(kinds) else " instead of"
        came = f"{'+'.join(others) or 'no tensor-core instruction'}{also} {goal.instruction}"
        if allowance and allowance.tensor_core and others == [allowance.tensor_core]:
            needed.append(came)
        else:
            failures.append(came)
    reason = f"{'; '.join(needed)}: {allowance.reason}" if needed and allowance else ""
    return replace(row, failures=tuple(failures), allowed=reason)


def unused(rows: Sequence[Row], exceptions: Exceptions) -> list[Key]:
    """Exceptions that no compiled kernel needed. They must be removed, because they would hide the next spill."""
    needed = {row.key for row in rows if row.allowed}
    compiled = {(row.key[0], *row.key[2:]) for row in rows}
    return [key for key in exceptions if (key[0], *key[2:]) in compiled and key not in needed]


def loose(rows: Sequence[Row], exceptions: Exceptions) -> list[tuple[Key, int]]:
    """Exceptions that allow more spill instructions than any kernel has, each with the largest number found. The
    difference would hide the next spill.

    Args:
        rows: judged, of every problem. Operand sizes without a compiled dtype are unknown.
        exceptions: without those of :func:`unused`.
    """
    compiled = {(row.target, row.dtype) for row in rows}
    found = []
    for key, allowance in exceptions.items():
        dtypes = [name for name, dtype in DTYPES.items() if 8 * dtype.itemsize == key[2]]
        own = [row for row in rows if row.key == key]
        largest = max((row.resources.loop_spills for row in own), default=0)
        known = compiled >= {(key[0], dtype) for dtype in dtypes} and any(row.allowed for row in own)
        if known and largest < allowance.loop_spills:
            found.append((key, largest))
    return found
