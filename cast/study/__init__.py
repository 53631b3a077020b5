"""`cast study`: the paper's ablation tables on the digits data, in minutes a row on one core."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cast.ground.optional import require

if TYPE_CHECKING:
    from cast.study.jobs import Settings


def main(
    rows: Sequence[str],
    out: str | os.PathLike[str] = "runs/study",
    seeds: int = 3,
    workers: int = 1,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Train the rows of one or more tables, each with several seeds, and compare them with the paper.

    A killed run continues from its last checkpoint when it is started again with the same directory. Finished rows and
    seeds are not trained again.

    Args:
        rows: tables of the paper (`table1a` to `table1h`, `table5`, `table7`, `table8`, or `all`), or YAML files
            in the form of the package's `rows.yaml`.
        out: receives `data/`, `seed-*/` (results and probabilities) and `study.json`.
        seeds: number of trainings of everything, with seeds 0, 1, ...
        workers: trainings in parallel, each in a process with one thread.
        settings: data, sizes and budget.

    Returns:
        The content of `study.json`; accuracies in percent.

    Raises:
        MissingExtraError: the extra `study` is not installed.
        ValueError: unknown rows, numbers below 1, or `out` has results with other settings.
    """
    for name, value in (("seeds", seeds), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    from rich.console import Console

    from cast.study.jobs import Settings
    from cast.study.models import EXPERTS, needed_experts
    from cast.study.run import run
    from cast.study.tables import select

    plan = select(rows)
    experts = {expert for name in plan.trained() for expert in needed_experts(plan.models[name])}
    if unknown := sorted(experts - EXPERTS.keys()):
        raise ValueError(
            f"no miniature of the expert {', '.join(unknown)}; there are {', '.join(EXPERTS)}. A model that is not "
            "trained gives the reason under 'miniature'"
        )
    for module in ("sklearn", "PIL", *(["timm"] if any(name.startswith("timm:") for name in experts) else [])):
        require(module, "study")  # fails now, and not after minutes of work
    return run(plan, Path(out), seeds, workers, settings or Settings(), Console())
