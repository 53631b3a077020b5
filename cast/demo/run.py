"""The demo from nothing to a report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cast import CAST
from cast.demo.clips import CachedClips, Stills
from cast.demo.controls import controls
from cast.demo.dataset import Sizes, make_dataset
from cast.demo.models import CONFIG
from cast.demo.report import Findings, html
from cast.demo.results import METRICS, summarise
from cast.demo.scene import NOUNS, VERBS
from cast.demo.study import MODELS, Budget, Data, Reporter, Study
from cast.demo.timing import step_times
from cast.files import write_json, write_text
from cast.training import Progress as Training

LABELS = {"verb": list(VERBS), "noun": list(NOUNS)}


def run(out: Path, seeds: int, sizes: Sizes, budget: Budget, console: Console) -> dict[str, Any]:
    """See :func:`cast.demo.main`; returns the content of metrics.json."""
    began = time.perf_counter()
    with _bars(console) as bars:
        manifest = make_dataset(out / "data", sizes, progress=_counter(bars, "videos"))
        data = _load(out / "data", budget, bars)
        task = bars.add_task("controls", total=1)
        checks = controls(data.train, data.val, out / "data")
        bars.update(task, completed=1)
        outcomes = []
        for seed in range(seeds):
            study = Study(data, out / f"seed-{seed}", seed, budget, _reporter(bars, seed, seeds))
            outcomes.append(study.run(LABELS))
    trained = CAST.from_pretrained(out / "seed-0" / "cast")
    times = step_times(trained, data.train, budget.models.batch_size)
    metrics = summarise(outcomes) | {
        "command": f"cast demo --out {out} --seeds {seeds}",
        "step_ms": {"fused": times.medians[0], "eager": times.medians[1], "fused_backend": times.fused_backend},
        "dataset": manifest,
        "controls": [asdict(control) for control in checks],
        "budget": asdict(budget),
        "machine": machine(),
        "seconds_of_this_run": round(time.perf_counter() - began, 1),
    }
    write_json(out / "metrics.json", metrics)
    write_text(out / "report.html", html(Findings(metrics, outcomes, checks, times, data.val)))
    _print(console, metrics, out)
    return metrics


def _load(directory: Path, budget: Budget, bars: Progress) -> Data:
    size = CONFIG.image_size
    return Data(
        stills=Stills(budget.stills, size, progress=_counter(bars, "pictures")),
        plain=CachedClips(directory, "plain", size, heads=("verb",), progress=_counter(bars, "decode plain")),
        train=CachedClips(directory, "train", size, progress=_counter(bars, "decode train")),
        val=CachedClips(directory, "val", size, progress=_counter(bars, "decode val")),
    )


class _Figures(ProgressColumn):
    """Loss and accuracies of a task that has any."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("figures", ""), style="cyan")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        _Figures(),
        console=console,
    )


def _counter(bars: Progress, name: str) -> Callable[[int, int], None]:
    task = bars.add_task(name, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


def _reporter(bars: Progress, seed: int, seeds: int) -> Reporter:
    def start(stage: str, steps: int) -> Callable[[Training, dict[str, float]], None]:
        name = f"{stage}, seed {seed}" if seeds > 1 else stage
        task, printed = bars.add_task(name, total=steps), 0

        def show(progress: Training, figures: dict[str, float]) -> None:
            nonlocal printed
            bars.update(task, completed=progress.step, figures=_figures(figures))
            # A line per epoch stays on the screen, and is all that a log file gets.
            for entry in progress.history[printed:]:
                rest = {name: value for name, value in entry.items() if name != "epoch"}
                bars.console.print(f"{name}  epoch {entry['epoch']:.0f}  {_figures(rest)}", highlight=False)
            printed = len(progress.history)

        return show

    return start


def _figures(figures: dict[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.3f}" if name == "loss" else f"{name} {value:.1f}%" for name, value in figures.items()
    )


def machine() -> dict[str, Any]:
    """What the run is on: processor, cores, threads, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _print(console: Console, metrics: dict[str, Any], out: Path) -> None:
    seeds = len(metrics["runs"])
    table = Table(title=f"Validation accuracy in percent, {seeds} seed{'s' if seeds > 1 else ''}")
    table.add_column("model")
    for metric in METRICS:
        table.add_column(metric.replace("_", " "), justify="right")
    for model in MODELS:
        spread = metrics["spread"][model]
        cells = [f"{metrics[model][m]:.1f}" + (f" ± {spread[m]:.1f}" if seeds > 1 else "") for m in METRICS]
        table.add_row(model, *cells, style="bold" if model == "cast" else None)
    console.print(table)
    gain, step = metrics["gain"]["action"], metrics["step_ms"]
    console.print(f"CAST over the ensemble, action: {gain['mean']:+.1f} points, by seed {gain['by_seed']}")
    console.print(
        f"training step: fused {step['fused']:.1f} ms (backend {step['fused_backend']}), eager {step['eager']:.1f} ms"
    )
    video = next((out / "data" / "val").glob("*.mp4"))
    console.print(f"report: {out / 'report.html'}\ntry:    cast predict {video} --checkpoint {out / 'seed-0' / 'cast'}")
