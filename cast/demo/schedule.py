"""The progress of a demo's run, and an estimate of its remaining time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

#: Seconds after which a log file gets a line even if nothing has ended.
_SILENCE = 30.0
#: A stage's own speed is used once it has run for so many seconds or so large a share; before, the other stages' speed.
_ENOUGH_SECONDS, _ENOUGH_SHARE = 2.0, 0.2
#: Weight of the earlier measurement against the run itself, as a share of the run.
_TRUST = 0.1


@dataclass
class Stage:
    """A part of the run.

    Args:
        name: shown to the user.
        units: work at the start of the run: clips, steps, probes.
        each: seconds of a unit, measured before the run.
    """

    name: str
    units: int
    each: float
    done: int = 0
    seconds: float = 0.0

    @property
    def expected(self) -> float:
        """Seconds of the whole stage, from the earlier measurement."""
        return self.units * self.each

    def left(self, pace: float) -> float:
        """Seconds of the rest; `pace` is the time of the run so far over its estimate."""
        rest = self.units - self.done
        if self.done and (self.seconds >= _ENOUGH_SECONDS or self.done >= _ENOUGH_SHARE * self.units):
            return rest * self.seconds / self.done
        return rest * self.each * pace


class Schedule:
    """The stages of a run in their order, shown as bars on a terminal and as plain lines elsewhere.

    Args:
        stages: all of the run.
        console: output of bars and lines.
        clock: returns seconds.
    """

    def __init__(
        self, stages: Sequence[Stage], console: Console, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.stages: list[Stage] = list(stages)
        self.console: Console = console
        self.clock: Callable[[], float] = clock
        self.began: float = clock()
        self.turned: float = self.began
        self.last: float = self.began
        self.spoke: float = self.began
        self.current: str = ""
        self.shown: float = 0.0
        self.bars: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}", style="cyan"),
            console=console,
            disable=not console.is_terminal,
        )
        self.whole: TaskID = self.bars.add_task("all", total=1.0, note="")
        self.part: TaskID = self.bars.add_task("", total=1.0, note="")

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()
        if kind is not None:
            self._say("stopped; the same command continues from the last checkpoint")

    def expected(self) -> float:
        """Seconds of the whole run, from the earlier measurement."""
        return sum(stage.expected for stage in self.stages)

    def left(self) -> float:
        """Seconds of the rest, from the earlier measurement and the run so far."""
        began = [stage for stage in self.stages if stage.done]
        # The present speed of the machine predicts its later speed. A little work predicts little, hence the weight.
        trusted = _TRUST * self.expected()
        expected = trusted + sum(stage.done * stage.each for stage in began)
        pace = (trusted + sum(stage.seconds for stage in began)) / expected if expected else 1.0
        return sum(stage.left(pace) for stage in self.stages)

    def share(self) -> float:
        """The finished share of the run, 0 to 1; it never decreases."""
        passed, left = self.clock() - self.began, self.left()
        if left:
            self.shown = max(self.shown, min(passed / (passed + left), 0.99))
        return self.shown

    def advance(self, name: str, done: int, total: int, note: str = "", line: bool = False) -> None:
        """Report a stage's progress.

        Args:
            name: of a stage.
            done: finished units, including those of an earlier run.
            total: all units, including those of an earlier run.
            note: figures to show.
            line: whether to print a line, for example at the end of an epoch.
        """
        now, stage = self.clock(), next(stage for stage in self.stages if stage.name == name)
        if name != self.current:
            self.current, self.turned = name, self.last
        self.last = now
        ended = done >= total and stage.done < stage.units
        stage.done, stage.seconds = max(0, stage.units - (total - done)), now - self.turned
        share = self.share()
        left = f"{duration(self.left())} left"
        self.bars.update(self.whole, completed=share, note=left)
        self.bars.update(self.part, description=name, completed=done / max(total, 1), note=note)
        silent = not self.console.is_terminal and now - self.spoke > _SILENCE
        if line or silent or (ended and not note):
            place = self.stages.index(stage) + 1
            counted = note or f"{done} of {total} in {duration(stage.seconds)}"
            self._say(f"{place} of {len(self.stages)}, {name}: {counted}; {left}")

    def finish(self) -> float:
        """Report the end; returns the seconds since the beginning."""
        for stage in self.stages:
            stage.done = stage.units
        self.shown, seconds = 1.0, self.clock() - self.began
        self.bars.update(self.whole, completed=1.0, note="")
        self.bars.update(self.part, visible=False)
        self._say(f"finished in {duration(seconds)}")
        return seconds

    def _say(self, text: str) -> None:
        self.spoke = self.clock()
        say(self.console, f"{100 * self.shown:3.0f} %  {text}")


def say(console: Console, text: str) -> None:
    """Print a line without colours and line breaks."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in a readable unit: `45 s`, `11 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
