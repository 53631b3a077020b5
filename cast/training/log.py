"""A training's output: progress bars, `log.jsonl`, and trackers if asked for."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections import deque
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from cast.ground.files import printable, text_lines
from cast.ground.optional import require
from cast.ground.processes import peak_memory
from cast.training.plain import flat
from cast.training.progress import Progress, Step

#: The file in the training's directory with the run's id at Weights & Biases.
WANDB_ID = "wandb-id.txt"
#: Module that a tracker needs; the extra has the tracker's name.
_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_trackers(names: list[str]) -> None:
    """Raise for a missing tracker; accelerate would silently omit it.

    Raises:
        MissingExtraError: a tracker is not installed; the message has the command that installs it.
    """
    for name in names:
        require(_TRACKERS[name], name)


class JsonLines:
    """A file with one JSON object a line; steps that a resumed training repeats have one line each.

    Args:
        path: the file. Lines of later steps or epochs than the two below are removed, and an incomplete last line.
        step: the training's present step.
        epochs: number of finished epochs. If the last validation failed or was killed before the checkpoint had it,
            this is one fewer than the steps give: the validation runs again and writes its line again.
    """

    def __init__(self, path: Path, step: int, epochs: int) -> None:
        self.path = path

        def stays(line: dict[str, Any]) -> bool:
            return line.get("step", 0) <= step and (line["kind"] != "epoch" or line["epoch"] <= epochs)

        kept = [line for line in self._whole_lines() if stays(json.loads(line))] if step else []
        part = path.with_name(f"{path.name}.part")
        part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(part, path)

    def write(self, kind: str, **values: Any) -> None:
        """Append a line and pass it to the system at once, so that a kill loses no earlier line.

        An infinite figure or NaN becomes null, because JSON has neither.

        Raises:
            OSError: the disk is full, or the write failed for another reason.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_valid({"kind": kind, **values}), allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(
                f"cannot write {self.path}: {error.strerror or error}. The checkpoints are not affected: make room, "
                "then start again with --resume"
            ) from None

    def _whole_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = []
        for line in text_lines(self.path.read_text(encoding="utf-8")):
            try:
                json.loads(line)
            except ValueError:
                break
            lines.append(line)
        return lines


class Log:
    """Reports a training on its main process; silent on the others.

    Args:
        directory: receives `log.jsonl`, and the trackers' files.
        accelerator: of the training, made with the trackers.
        steps: all optimizer steps of the training.
        settings: written to the log's first line and to the trackers.
        bars: whether to show progress bars on a terminal.
        every: steps between lines of the file, and between trackers' points.
        console: output for bars and lines of text.
    """

    directory: Path
    accelerator: Any
    steps: int
    settings: dict[str, Any]
    every: int

    def __init__(
        self,
        directory: Path,
        accelerator: Accelerator,
        steps: int,
        settings: dict[str, Any],
        bars: bool = True,
        every: int = 1,
        console: Console | None = None,
    ) -> None:
        self.directory, self.accelerator, self.steps = directory, accelerator, steps
        self.settings, self.every = settings, every
        self.speaks: Any = accelerator.is_main_process
        self.console: Console = console or Console(stderr=True)
        self._bars = _bars(self.console) if self.speaks and bars and self.console.is_terminal else None
        self._speeds: deque[tuple[int, float]] = deque(maxlen=20)
        self._lines: JsonLines | None = None

    def start(self, progress: Progress, note: str) -> None:
        """Open everything, and print `note`.

        Raises:
            ValueError: Weights & Biases refuses; the message says why, and what to do.
        """
        parameters = {key: _plain(value) for key, value in flat(self.settings).items()}
        options = {"wandb": self._wandb_run(progress)} if "wandb" in map(str, self.accelerator.log_with) else {}
        try:
            self.accelerator.init_trackers("cast", config=parameters, init_kwargs=options)
        except Exception as error:
            if not type(error).__module__.startswith("wandb"):
                raise
            raise ValueError(
                f"Weights & Biases cannot start: {' '.join(str(error).split())}. Run wandb login, set "
                "WANDB_MODE=offline, or leave wandb out of log.trackers"
            ) from None
        if not self.speaks:
            return
        self._lines = JsonLines(self.directory / "log.jsonl", progress.step, len(progress.history))
        self._lines.write("start", step=progress.step, steps=self.steps, settings=self.settings, note=note)
        self.console.print(note, highlight=False, markup=False, soft_wrap=True)
        if self._bars is not None:
            self._bars.start()
            self._task = self._bars.add_task("training", total=self.steps, completed=progress.step)

    def _wandb_run(self, progress: Progress) -> dict[str, str]:
        """Directory and id for Weights & Biases. A resumed training continues the run that it began."""
        if not self.speaks:
            return {}
        path = self.directory / WANDB_ID
        name = path.read_text(encoding="utf-8").strip() if progress.step and path.is_file() else ""
        if not name:
            name = secrets.token_hex(4)
            path.write_text(f"{name}\n", encoding="utf-8")
        directory = self.directory.resolve()
        return {"dir": str(directory), "name": directory.name, "id": name, "resume": "allow"}

    def step(self, progress: Progress, step: Step) -> None:
        """Report one optimizer step."""
        if not self.speaks or self._lines is None:
            return
        self._speeds.append((step.clips, step.seconds))
        if self._bars is not None:
            figures = f"{_figures(step.figures)}  {self.speed:.1f} clips/s  {self.memory_gb:.1f} GB"
            self._bars.update(self._task, completed=progress.step, figures=figures)
        if progress.step % self.every == 0 or progress.step == self.steps:
            values: dict[str, Any] = {**step.figures, "lr": step.lr, "grad_norm": step.grad_norm}
            values |= {"clips_per_s": round(self.speed, 3), "memory_gb": round(self.memory_gb, 3)}
            if step.skipped:
                values["skipped"] = True
            self._lines.write("step", step=progress.step, **values)
            points = {f"train/{name}": value for name, value in values.items() if value is not None}
            self.accelerator.log(points, step=progress.step)

    def epoch(self, progress: Progress, entry: dict[str, float]) -> None:
        """Report one finished epoch; `entry` is its entry in the history."""
        if not self.speaks or self._lines is None:
            return
        self._lines.write("epoch", step=progress.step, **entry)
        rest = {name: value for name, value in entry.items() if name != "epoch"}
        self.accelerator.log({f"epoch/{name}": value for name, value in rest.items()}, step=progress.step)
        self.console.print(
            f"epoch {entry['epoch']:.0f}  step {progress.step} of {self.steps}  {_figures(rest)}  "
            f"{self.speed:.1f} clips/s  {self.memory_gb:.1f} GB",
            highlight=False,
            soft_wrap=True,
        )

    def end(self, note: str = "") -> None:
        """Close everything after the training finished or failed."""
        if self._bars is not None:
            self._bars.stop()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.speaks and note:
            self.console.print(note, highlight=False, markup=False, soft_wrap=True)

    @property
    def memory_gb(self) -> float:
        """Peak memory of this process, in 10^9 bytes."""
        return peak_memory(self.accelerator.device) / 1e9

    @property
    def speed(self) -> float:
        """Clips a second over the last steps, of all processes together."""
        seconds = sum(seconds for _, seconds in self._speeds)
        return sum(clips for clips, _ in self._speeds) / seconds if seconds else 0.0


def _valid(value: Any) -> Any:
    """The value with null for infinity, which an overflowed fp16 gradient has, and for NaN; JSON has neither."""
    if isinstance(value, dict):
        return {key: _valid(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_valid(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Figures(ProgressColumn):
    """Loss, accuracies, speed and memory."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("figures", ""), style="cyan")


def _bars(console: Console) -> Bars:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    return Bars(*columns, _Figures(), console=console)


def _figures(figures: dict[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.3f}" if name.endswith("loss") else f"{name} {value:.1f}%" for name, value in figures.items()
    )


def _plain(value: Any) -> Any:
    """The value in a form that every tracker takes as a hyper-parameter."""
    return value if isinstance(value, bool | int | float) else printable(str(value))
