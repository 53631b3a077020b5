"""The two sizes of the demo: the full one, and a quick one of the same stages in one to three minutes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from cast import CASTConfig
from cast.demo.dataset import Sizes
from cast.demo.models import CONFIG
from cast.demo.scene import ALL, Classes
from cast.demo.study import Budget
from cast.training import Recipe


@dataclass(frozen=True)
class Scale:
    """The size of an experiment. Messages and the report use `name`."""

    name: str
    sizes: Sizes
    budget: Budget
    classes: Classes = ALL
    config: CASTConfig = CONFIG

    def identity(self) -> dict[str, Any]:
        """The settings that must be equal to resume an earlier run, as JSON values."""
        settings = {
            "demo": self.name,
            "sizes": asdict(self.sizes),
            "classes": self.classes.names(),
            "budget": asdict(self.budget),
            "model": self.config.to_dict(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain


FULL = Scale("full", Sizes(), Budget())

_FEW = Classes(("move_left", "move_right", "grow", "shrink"), ("zero", "one"))

QUICK = Scale(
    "quick",
    Sizes(plain=480, train=480, val=360),
    Budget(
        stills=640,
        spatial=Recipe(epochs=8, batch_size=16, lr=2e-3, warmup=0.5),
        temporal=Recipe(epochs=8, batch_size=8, lr=1e-3, warmup=0.5),
        models=Recipe(epochs=7, batch_size=16, lr=2e-3, warmup=0.5),
    ),
    _FEW,
    replace(CONFIG, num_frames=8, heads=_FEW.heads()),
)
