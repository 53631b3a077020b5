"""`cast demo`: from nothing to trained models, their comparison and a report, on two CPU cores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cast.optional import require

if TYPE_CHECKING:
    from cast.demo.dataset import Sizes
    from cast.demo.study import Budget


def main(
    out: str | os.PathLike[str] = "runs/demo",
    seeds: int = 1,
    sizes: Sizes | None = None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Make the data set, train experts, baselines and CAST, evaluate, and write a report.

    A run that was killed continues from its last checkpoint when it is started again with the same directory.

    Args:
        out: receives `data/` (videos), `seed-*/` (checkpoints, and the finished model in `seed-*/cast`),
            `metrics.json` and `report.html`.
        seeds: how many times to train, with seeds 0, 1, ...; the data set is the same.
        sizes: clips of the data set.
        budget: how long to train.

    Returns:
        The content of `metrics.json`; accuracies in percent.

    Raises:
        MissingExtraError: the extra `demo` is not installed.
        ValueError: `seeds` is below 1, or `out` holds a run with other settings.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be at least 1")
    for module in ("sklearn", "PIL", "matplotlib"):
        require(module, "demo")  # before minutes of work
    from rich.console import Console

    from cast.demo.dataset import Sizes
    from cast.demo.run import run
    from cast.demo.study import Budget

    return run(Path(out), seeds, sizes or Sizes(), budget or Budget(), Console())
