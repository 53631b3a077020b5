"""The whole run: stage after stage within the minutes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from first_contact.budget import RESERVE, Budget
from first_contact.outputs import Outputs
from first_contact.running import Found, Running
from first_contact.stages import MINUTES, ROOT, Stage, stages
from first_contact.summary import markdown, status

SUMMARY = "summary.md"
#: Exit status of bad usage.
_USAGE = 2
#: Seconds between two checks of the processes.
_LOOK = 0.1
#: Seconds between two summaries while a stage runs.
_SUMMARY_EVERY = 5.0


class StoppedError(Exception):
    """The run is stopped from outside; the message names the cause."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages -> exit status: 0 right, 1 something wrong, 2 bad usage, 3 right but incomplete."""
    parser = argparse.ArgumentParser(
        prog="first_contact.sh", description="What the first minutes with a GPU bring back."
    )
    parser.add_argument("out", type=Path, help="folder for at most 8 files; made if it is not there")
    parser.add_argument(
        "--minutes", type=_minutes, default=MINUTES, help="of the whole run, half a minute of it for the end"
    )
    parser.add_argument("--emulated", action="store_true", help="rehearse without a GPU, at small sizes")
    names = [stage.name for wave in stages(emulated=False) for stage in wave]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE",
                        help=f"only these, in the order in which they are done, out of {', '.join(names)}")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        outputs = Outputs(options.out)
    except OSError as error:
        print(f"first_contact.sh: {options.out} cannot be written to: {error}", file=sys.stderr)
        return _USAGE
    budget = Budget(60 * options.minutes)
    waves = [
        tuple(stage for stage in wave if stage.name in options.stages)
        for wave in stages(options.emulated, options.minutes)
    ]
    return Contact(outputs, budget, environment(options.emulated), options.emulated).run(waves)


def environment(emulated: bool) -> dict[str, str]:
    """The processes' environment, so that they find the checkout's packages without an installation."""
    folders = [ROOT, *(ROOT / name for name in ("tools", "benchmarks", *(["tests"] if emulated else [])))]
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    # pytest-benchmark is disabled in a worker of pytest-xdist, and this may run in one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    made = {**own, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    return {**made, "FIRST_CONTACT_EMULATED": "1"} if emulated else made


def _minutes(text: str) -> float:
    """An option's minutes; they must exceed the reserve for the end."""
    least = 2 * RESERVE / 60
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not least <= minutes <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to 600")
    return minutes


class Contact:
    """One run.

    Args:
        outputs: takes the results.
        budget: the run's seconds.
        environment: of the processes.
        emulated: whether there is no GPU; the processes read it from the environment.
    """

    def __init__(self, outputs: Outputs, budget: Budget, environment: Mapping[str, str], emulated: bool) -> None:
        self.outputs, self.budget, self.environment, self.emulated = outputs, budget, environment, emulated
        self.running: list[Running] = []
        self.found: list[Found] = []
        self.skipped: list[str] = []

    def run(self, waves: Sequence[tuple[Stage, ...]]) -> int:
        """Run all stages that the time allows -> exit status."""
        self.skipped = [stage.name for wave in waves for stage in wave]
        previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
        # The alarm ends this process if it hangs itself, for example in a write that does not return.
        signal.setitimer(signal.ITIMER_REAL, self.budget.left() + RESERVE / 2)
        try:
            with tempfile.TemporaryDirectory(prefix="first-contact-", ignore_cleanup_errors=True) as scratch:
                try:
                    for wave in waves:
                        self._wave(wave, Path(scratch))
                except StoppedError as error:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    for one in self.running:
                        one.stop(str(error))
                finally:
                    for one in self.running:
                        one.kill()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._summarise()
        if SUMMARY in self.outputs.cut:  # the file may be older
            print(self._summary())
        code = status(self.found, self.skipped)
        print(f"first contact: exit status {code}; the report: {self.outputs.folder / SUMMARY}", flush=True)
        return code

    def _wave(self, wave: tuple[Stage, ...], scratch: Path) -> None:
        """Run stages in parallel until the last has ended."""
        for stage in wave:
            seconds = self.budget.allow(stage.seconds, stage.needs)
            if seconds:
                self._say(f"{stage.name} begins, for {seconds:.0f} s at most")
                one = Running(stage, seconds, scratch, self.outputs, self.environment)
                self.running.append(one)
                self.found.append(one.found)
                self.skipped.remove(stage.name)  # last, so that a signal before it leaves the stage in the list
            else:
                self._say(f"{stage.name} is not begun: {self.budget.left():.0f} s are left")
        due = time.monotonic() + _SUMMARY_EVERY
        while self.running:
            self._look()
            if time.monotonic() >= due:
                for one in self.running:
                    one.bring()
                self._summarise()
                due = time.monotonic() + _SUMMARY_EVERY
            time.sleep(_LOOK)
        self._summarise()

    def _look(self) -> None:
        """Remove and report the stages that have ended."""
        for one in [one for one in self.running if one.finished()]:
            self.running.remove(one)
            found = one.found
            wrong = "".join(f"\n  {row['row']}: {row.get('why_not', 'wrong')}" for row in found.wrong)
            how = f", {found.ended}" if found.ended else ""
            self._say(f"{found.stage} took {found.seconds:.0f} s, {len(found.rows)} rows{how}{wrong}")

    def _summarise(self) -> None:
        self.outputs.replace(SUMMARY, self._summary())

    def _summary(self) -> str:
        return markdown(self.found, self.skipped, self.budget.used(), self.emulated, self.outputs.cut)

    def _say(self, what: str) -> None:
        print(f"{self.budget.used():6.1f} s  {what}", flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    raise StoppedError("the alarm at the end" if number == signal.SIGALRM else signal.Signals(number).name)
