"""The declarations in a benchmark file: groups of rows with the same result, listed before any measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cast_kernels.gpu.machine import Machine, Step


@dataclass(frozen=True)
class Kind:
    """Dtypes of a group: of streams and parameters, and autocast's."""

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def compute(self) -> torch.dtype:
        """Dtype of dense products."""
        return self.autocast or self.dtype

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of forward."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


#: `amp` is the setting of `cast train`: parameters and residual streams in float32, bfloat16 autocast.
KINDS = {
    kind.name: kind
    for kind in (
        Kind("fp32", torch.float32),
        Kind("amp", torch.float32, torch.bfloat16),
        Kind("bf16", torch.bfloat16),
        Kind("fp16", torch.float16),
    )
}


@dataclass
class Candidate:
    """One way to do a group's work.

    Args:
        step: the function to time.
        results: results by name, to compare with fp64.
        kept_bytes: bytes that autograd keeps from forward to backward, if there is a backward.
        figures: figures that are measured already.
    """

    step: Step
    results: Callable[[], dict[str, Tensor]]
    kept_bytes: Callable[[], int] | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """The measurement of a group.

    Args:
        builders: row -> a function that makes its candidate; candidates have memory only while their group is measured.
            The first is the baseline.
        exact: the results in fp64; None if another group checks them.
        flops: counts the floating-point operations of one step.
        bytes: least bytes that a step must read and write; 0 if unknown.
        kind: of the group.
        samples: most samples of each row.
        seconds: target for all samples together.
        predicted: row -> milliseconds predicted by a model of the GPU.
        memory_alone: whether only the peak memory of a step is measured.
    """

    builders: Mapping[str, Callable[[], Candidate]]
    exact: Callable[[], dict[str, Tensor]] | None
    flops: Callable[[], int]
    kind: Kind
    bytes: int = 0
    samples: int = 15
    seconds: float = 10.0
    predicted: Mapping[str, float] = field(default_factory=dict)
    memory_alone: bool = False


@dataclass(frozen=True)
class First:
    """A group's place in tier `first`.

    Args:
        worth: groups with a lower number are measured earlier on a GPU, because its minutes may be few.
        attention: kernels whose rows are included.
        levels: of recompute, in addition to the default.
        peers: whether other rows than ours and the baseline are included.
    """

    worth: int
    attention: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    peers: bool = True

    def of(self, rows: tuple[str, ...], without: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The group's rows in tier `first`."""

        def wanted(row: str) -> bool:
            if not self.peers and row != rows[0] and not row.startswith("cast_kernels"):
                return False
            attention, level = row.partition(" by ")[2], row.partition("recompute=")[2]
            return (not attention or attention in self.attention) and (not level or level in self.levels)

        return tuple(row for row in rows if wanted(row) and row not in without)


@dataclass(frozen=True)
class Group:
    """Rows that are measured side by side.

    Args:
        name: unique; `-k` selects it.
        title: of its table.
        rows: their names, the baseline first.
        work: makes the measurement on a machine.
        first: its place in tier `first`; None if it is only in tier `full`.
        without: rows that are only in tier `full`.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    work: Callable[[Machine], Work]
    first: First | None = None
    without: tuple[str, ...] = ()

    def of_tier(self, tier: str) -> tuple[str, ...]:
        if tier == "full":
            return self.rows
        return self.first.of(self.rows, self.without) if self.first else ()

    @property
    def worth(self) -> int:
        return self.first.worth if self.first else 1 << 20


class Row(NamedTuple):
    """One row of a table, which is one test."""

    group: Group
    name: str

    def __str__(self) -> str:
        return f"{self.group.name}-{self.name}"


@dataclass(frozen=True, eq=False)
class Sizes:
    """Sizes of the problems. `small` is for a rehearsal: its figures mean nothing.

    Its bottleneck is valid for every backend. Ops and model have the same sizes, and so the same kernels.
    """

    name: str
    frames: int
    patches: int
    dim: int
    bottleneck: int
    heads: int
    hidden: int
    adapter: int
    most_clips: int
    model: dict[str, Any]
    variant: str = "base"

    def clips(self, batch: int) -> int:
        return min(batch, self.most_clips)


PAPER = Sizes("paper", 8, 196, 768, 384, 12, 3072, 192, 1 << 10, {})
SMALL = Sizes(
    "small", 2, 4, 96, 192, 6, 96, 48, 2,
    {
        "image_size": 16, "patch_size": 8, "num_frames": 4, "embed_dim": 96, "depth": 2, "num_heads": 6,
        "mlp_ratio": 1.0, "adapter_ratio": 0.5, "down_ratio": 0.5, "exchange_layers": (0,),
        "heads": {"verb": 64, "noun": 48},
    },
    "tiny",
)  # fmt: skip
SIZES = {sizes.name: sizes for sizes in (PAPER, SMALL)}

#: Batches of clips in each tier of a GPU's groups.
GPU_BATCHES = (1, 6, 32)
