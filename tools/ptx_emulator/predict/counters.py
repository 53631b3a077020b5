"""What a launch executes, in the terms of the speed model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from ptx_emulator.core import counters as core

SECTOR = 32  # bytes


@dataclass(frozen=True)
class Counters:
    """What a launch executes, over all CTAs. Instructions are PTX's, one a warp."""

    tensor_flops: Mapping[str, float] = field(default_factory=dict)  # "mma", "wgmma", either with ".tf32"
    shared_wavefronts: float = 0.0  # loads and stores
    load_sectors: float = 0.0
    store_sectors: float = 0.0
    warp_instructions: float = 0.0

    @property
    def flops(self) -> float:
        return sum(self.tensor_flops.values())

    def times(self, factor: float) -> Counters:
        """Each of them multiplied."""
        return Counters(
            {kind: flops * factor for kind, flops in self.tensor_flops.items()},
            *(getattr(self, item.name) * factor for item in fields(self)[1:]),
        )


def total(counters: Sequence[Counters]) -> Counters:
    """Each counter summed."""
    flops: dict[str, float] = defaultdict(float)
    for one in counters:
        for kind, value in one.tensor_flops.items():
            flops[kind] += value
    rest = (sum(getattr(one, item.name) for one in counters) for item in fields(Counters)[1:])
    return Counters(dict(flops), *rest)


def executed(counted: core.Counters) -> Counters:
    """The emulator's counters in these terms."""
    return Counters(
        {"all": counted.tensor_flops},
        shared_wavefronts=counted.shared_load_wavefronts + counted.shared_store_wavefronts,
        load_sectors=counted.global_load_sectors,
        store_sectors=counted.global_store_sectors,
        warp_instructions=counted.warp_instructions,
    )
