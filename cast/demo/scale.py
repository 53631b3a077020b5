"""The two sizes of the demo: the full one, and a quick one that shows the same in a minute or two."""

from __future__ import annotations

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
    """How large an experiment is. `name` is what messages and the report call it."""

    name: str
    sizes: Sizes
    budget: Budget
    classes: Classes = ALL
    config: CASTConfig = CONFIG

    def identity(self) -> dict[str, Any]:
        """What a run must share with an earlier one to go on from it; plain values."""
        return {
            "demo": self.name,
            "sizes": asdict(self.sizes),
            "classes": self.classes.names(),
            "budget": asdict(self.budget),
            "model": {name: value for name, value in asdict(self.config).items() if name in ("embed_dim", "depth")},
        }


FULL = Scale("full", Sizes(), Budget())

QUICK = Scale(
    "quick",
    Sizes(plain=240, train=480, val=240),
    Budget(
        stills=960,
        spatial=Recipe(epochs=6, batch_size=16, lr=2e-3, warmup=0.5),
        temporal=Recipe(epochs=6, batch_size=8, lr=2e-3, warmup=0.5),
        models=Recipe(epochs=4, batch_size=8, lr=2e-3, warmup=0.5),
    ),
    Classes(("appear", "disappear"), ("zero", "one")),
    replace(CONFIG, depth=2, heads={"verb": 2, "noun": 2}),
)
