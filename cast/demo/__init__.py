"""`cast demo`: data, trained models, their comparison and a report, on two CPU cores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cast.ground.optional import require

if TYPE_CHECKING:
    from cast.demo.scale import Scale


def main(
    out: str | os.PathLike[str] | None = None,
    seeds: int = 1,
    quick: bool = False,
    scale: Scale | None = None,
) -> dict[str, Any]:
    """Make the data set, train experts, baselines and CAST, evaluate, and write a report.

    A killed run continues from its last checkpoint when it is started again with the same directory.

    Args:
        out: receives `data/` (videos), `seed-*/` (checkpoints, and the finished model in `seed-*/cast`),
            `metrics.json` and `report.html`; if None, `runs/demo`, or `runs/demo-quick` if `quick`.
        seeds: number of trainings, with seeds 0, 1, ...; the data set stays the same.
        quick: fewer classes, clips and frames, for a first look.
        scale: another size of data and trainings, instead of `quick`.

    Returns:
        The content of `metrics.json`; accuracies in percent.

    Raises:
        MissingExtraError: the extra `demo` is not installed.
        ValueError: `seeds` is below 1, or `out` has a run with other settings.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be at least 1")
    from rich.console import Console

    console = Console()
    # Printed before PyTorch loads, which takes seconds.
    console.print(
        f"CAST demo{' (quick)' if quick else ''}: makes videos, trains two experts, the baselines and CAST, writes a "
        "report. No download, no GPU.",
        soft_wrap=True,
        highlight=False,
    )
    for module in ("sklearn", "PIL", "matplotlib"):
        require(module, "demo")  # fails now, and not after minutes of work

    from cast.demo.run import run
    from cast.demo.scale import FULL, QUICK

    folder = Path(out if out is not None else "runs/demo-quick" if quick else "runs/demo")
    return run(folder, seeds, scale or (QUICK if quick else FULL), console)
