"""Small things to train, for the tests of the engine: points by quadrant, and a net with dropout and a frozen layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cast.training import Checkpoints, Engine, Plan
from cast.training.distributed import make_accelerator


@dataclass
class Batch:
    """As cast.video.loader.Batch, without video."""

    video: Tensor
    labels: dict[str, Tensor]
    names: list[str]

    def to(self, device: torch.device) -> Batch:
        return self


class PointSource:
    """48 points in the plane in micro-batches, shuffled by epoch; labels are signs of the coordinates."""

    def __init__(self, micro_batch: int, dtype: torch.dtype = torch.float32) -> None:
        self.points = torch.randn(48, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        self.micro_batch = micro_batch

    def __len__(self) -> int:
        return len(self.points) // self.micro_batch

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(epoch))
        for position in range(start, len(self)):
            chosen = order[position * self.micro_batch : (position + 1) * self.micro_batch]
            points = self.points[chosen]
            labels = {name: (points[:, axis] > 0).long() for axis, name in enumerate(("verb", "noun"))}
            yield Batch(points, labels, [f"{int(index)}.mp4" for index in chosen])


class PointNet(nn.Module):
    """Logits of verb and noun; the layer in the middle is frozen."""

    def __init__(self, dropout: float = 0.0, frozen_seed: int = 2) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Dropout(dropout))
        self.heads = nn.ModuleDict({"verb": nn.Linear(16, 2), "noun": nn.Linear(16, 2)})
        torch.manual_seed(frozen_seed)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.frozen(self.body(x))
        return {name: head(x) for name, head in self.heads.items()}


#: Six steps of 8 points an epoch.
PLAN = Plan(epochs=2, steps_per_epoch=6, accumulate=1, micro_batch=8, rate=lambda step: 1e-2)


def engine(directory: Path, model: nn.Module, source: Any = None, plan: Plan = PLAN, **options: Any) -> Engine:
    """An engine on points; `options` are Engine's mix, and Checkpoints' weights and keep."""
    mix = options.pop("mix", None)
    accelerator = make_accelerator(accumulate=plan.accumulate, micro_batch=plan.micro_batch, clip_grad=plan.clip_grad)
    checkpoints = Checkpoints(directory, accelerator, {"plan": "test"}, model, **options)
    source = source if source is not None else PointSource(plan.micro_batch)
    return Engine(model, source, plan, accelerator, checkpoints, mix)


def planned(**changes: Any) -> Plan:
    return replace(PLAN, **changes)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
