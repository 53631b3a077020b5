"""The demo from its data to its report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cast import CAST
from cast.demo.clips import CachedClips, Stills
from cast.demo.controls import controls
from cast.demo.dataset import make_dataset
from cast.demo.estimate import estimate
from cast.demo.report import QUICKLY, Findings, html, verdict_of
from cast.demo.results import METRICS, summarise
from cast.demo.scale import Scale
from cast.demo.scene import SPLITS
from cast.demo.schedule import Schedule, duration, say
from cast.demo.study import MODELS, Data, Reporter, Study
from cast.demo.timing import step_times
from cast.ground.files import read_json, write_json, write_text
from cast.training import Progress as Training

#: File that identifies a directory's demo.
IDENTITY = "demo.json"


def run(out: Path, seeds: int, scale: Scale, console: Console) -> dict[str, Any]:
    """See :func:`cast.demo.main`; returns the content of metrics.json."""
    began = time.perf_counter()
    claim(out, scale)
    stages = estimate(out, seeds, scale)
    measured = time.perf_counter() - began
    with Schedule(stages, console, time.perf_counter) as schedule:
        expected = schedule.expected()
        say(console, f"Measured on this machine: about {duration(expected)} from here; {_where(schedule)}.")
        manifest = make_dataset(out / "data", scale.sizes, progress=_counter(schedule, "videos"), classes=scale.classes)
        data = _load(out / "data", scale, schedule)
        checks = controls(data.train, data.val, out / "data", progress=_counter(schedule, "controls"))
        outcomes = []
        for seed in range(seeds):
            suffix = f", seed {seed}" if seeds > 1 else ""
            study = Study(data, out / f"seed-{seed}", seed, scale.budget, _reporter(schedule, suffix), scale.config)
            outcomes.append(study.run(scale.classes.names()))
            schedule.advance("answers" + suffix, 1, 1)
        trained = CAST.from_pretrained(out / "seed-0" / "cast")
        times = step_times(trained, data.train, scale.budget.models.batch_size)
        metrics = {
            "demo": scale.name,
            **summarise(outcomes),
            "command": f"cast demo --out {out} --seeds {seeds}" + (" --quick" if scale.name == "quick" else ""),
            "step_ms": {"fused": times.medians[0], "eager": times.medians[1], "fused_backend": times.fused_backend},
            "dataset": manifest,
            "classes": scale.classes.names(),
            "controls": [asdict(control) for control in checks],
            "budget": asdict(scale.budget),
            "machine": machine(),
            "seconds_expected": round(measured + expected, 1),
            "seconds_of_this_run": round(time.perf_counter() - began, 1),
            "stages": [
                {"name": stage.name, "expected": round(stage.expected, 2), "took": round(stage.seconds, 2)}
                for stage in schedule.stages
            ],
        }
        write_text(out / "report.html", html(Findings(metrics, outcomes, checks, times, data.val, scale)))
        write_json(out / "metrics.json", metrics)
        schedule.finish()
    _print(console, metrics, out)
    return metrics


def claim(out: Path, scale: Scale) -> None:
    """Mark the directory as this demo's.

    Raises:
        ValueError: it belongs to another demo.
    """
    path, own = out / IDENTITY, scale.identity()
    before = {"demo": "full"} if (out / "data").exists() else {}  # an earlier version had only the full demo
    found = read_json(path) if path.exists() else own | before
    if found != own:
        other = found.get("demo", "unknown")
        what = f"the {other} demo" if other != scale.name else f"a {other} demo with other settings"
        raise ValueError(
            f"{out} holds {what}, and this is the {scale.name} one: choose another directory with --out, or remove "
            "that one"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, own)


def _where(schedule: Schedule) -> str:
    """The stages with the largest shares of the time."""
    seconds: dict[str, float] = {}
    for stage in schedule.stages:
        kind = stage.name.split(",")[0]  # for all seeds together
        seconds[kind] = seconds.get(kind, 0.0) + stage.expected
    total = sum(seconds.values())
    largest = sorted(seconds, key=lambda kind: -seconds[kind])[:4]
    return ", ".join(f"{kind} {100 * seconds[kind] / total:.0f} %" for kind in largest)


def _load(directory: Path, scale: Scale, schedule: Schedule) -> Data:
    size, read, total = scale.config.image_size, 0, sum(scale.sizes.of(split) for split in SPLITS)

    def clips(split: str, heads: tuple[str, ...] = ("verb", "noun")) -> CachedClips:
        nonlocal read
        before = read

        def count(done: int, of: int) -> None:
            schedule.advance("decoding", before + done, total)

        found = CachedClips(directory, split, size, heads, progress=count, frames=scale.config.num_frames)
        read += len(found)
        return found

    stills = Stills(scale.budget.stills, size, progress=_counter(schedule, "pictures"), classes=scale.classes)
    return Data(stills, clips("plain", ("verb",)), clips("train"), clips("val"))


def _counter(schedule: Schedule, name: str) -> Callable[[int, int], None]:
    return lambda done, total: schedule.advance(name, done, total)


def _reporter(schedule: Schedule, suffix: str) -> Reporter:
    def start(stage: str, steps: int) -> Callable[[Training, dict[str, float]], None]:
        epochs = 0

        def show(progress: Training, figures: dict[str, float]) -> None:
            nonlocal epochs
            ended, epochs = len(progress.history) > epochs, len(progress.history)
            note = f"epoch {epochs}: {_figures(progress.history[-1])}" if ended else _figures(figures)
            schedule.advance(stage + suffix, progress.step, steps, note, line=ended)

        return show

    return start


def _figures(figures: Mapping[str, float]) -> str:
    """The loss, and accuracies on validation clips if there are any, else on the training batches."""
    tested = any(name.startswith("val ") for name in figures)
    shown = [
        f"{name.removeprefix('val ').replace('_', ' ')} {value:.0f} %"
        for name, value in figures.items()
        if name not in ("loss", "epoch") and name.startswith("val ") == tested
    ]
    return ", ".join([f"loss {figures['loss']:.2f}", *shown]) if figures else ""


def machine() -> dict[str, Any]:
    """The run's machine: processor, cores, threads, versions."""
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
    for run in metrics["runs"]:
        say(console, verdict_of(run))
    if metrics["demo"] == "quick":
        say(console, QUICKLY)
    video = min((out / "data" / "val").glob("*.mp4"))
    say(console, f"report: {out / 'report.html'}\ntry:    cast predict {video} --checkpoint {out / 'seed-0' / 'cast'}")
