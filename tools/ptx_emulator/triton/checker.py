"""Checks every launch of a program, and lets the program go on: findings are collected, not raised."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton

from ptx_emulator import Fault
from ptx_emulator.targets import EMULATED, Target, target
from ptx_emulator.triton.driver import Launch, offline_driver
from ptx_emulator.triton.launcher import EmulationFault, Emulator, kind_of
from ptx_emulator.triton.places import Place, launching, shown
from ptx_emulator.triton.tuning import Tuning


@dataclass
class Finding:
    """What was found in one place of a kernel, over all launches."""

    kind: str  #: of a race, or the name of the error that ended a launch
    kernel: str  #: name of the entry point
    message: str  #: with instructions and lines of the kernel's source
    ended: bool  #: whether the launch ended there, so that its results are not whole
    grid: tuple[int, int, int]  #: of the first launch that showed it, as what follows
    threads: int  #: of a CTA
    constants: dict[str, str]  #: compiled into the kernel
    places: tuple[Place, ...]  #: the line that launched it, and the script's
    launches: int = 1  #: how many showed it

    def lines(self) -> list[str]:
        """For a terminal."""
        constants = "".join(f", {name}={shortened(value)}" for name, value in self.constants.items())
        launched = " from ".join(map(str, self.places)) or "a line that is not known"
        times = f", the first of {self.launches} launches that show it" if self.launches > 1 else ""
        return [
            f"{self.kind} in {self.kernel}",
            f"  {self.message}",
            f"  launched by {launched}{times}",
            f"  grid {self.grid}, {self.threads} threads{constants}",
            *(["  the launch ended there: what it had not written yet is missing"] if self.ended else []),
        ]


@dataclass
class Checker(Emulator):
    """Launcher that executes PTX and collects what is found; the launch's results go to its tensors all the same.

    An error ends its launch. The program goes on with what the kernel wrote before, as it may on a GPU. A kernel that
    the emulator does not execute raises an exception in the program.
    """

    target: Target  #: what kernels are compiled for and run as; `checking` takes its name as well
    landing: str = "late"  #: when copies land: "early", "late" or "random"
    seed: int | None = None  #: of the warps' priorities and of landing="random"; None: warps run in program order
    checks: bool = True  #: look for races and data in flight; bounds, alignment and deadlocks are checked always
    first: bool = False  #: raise EmulationFault at the first finding
    all_configs: bool = False  #: of autotuned kernels; False: the first that fits
    script: str = ""  #: file of which the lines are wanted; "": the program's main one
    lane_order: bool = False  #: look at the order between the lanes of a warp as well
    findings: list[Finding] = field(default_factory=list)  #: in the order of appearance
    notes: list[str] = field(default_factory=list)  #: what is no finding: choices of configurations, values that agree
    noted: Counter[str] = field(default_factory=Counter)  #: kind -> how many of the notes

    def __post_init__(self) -> None:
        if self.target.name not in EMULATED:
            raise ValueError(f"target is {self.target.name!r}; the emulator executes {' and '.join(EMULATED)}")
        super().__init__(landing=self.landing, seed=self.seed, checks=self.checks, lane_order=self.lane_order)
        self.tuning: Tuning = Tuning(self.all_configs)
        self.begin: float = time.perf_counter()
        self._known: dict[tuple[Any, ...], Finding] = {}
        self._seen: set[tuple[Any, ...]] = set()  # in the launch that is under way

    def launch(self, launch: Launch) -> None:
        """Execute and collect."""
        if self.tuning.skips:
            return
        if not self.tuning.trying and (asked := self.tuning.ended()):
            self._note_tuning(launch, asked)
        faults, notes = self.execute(launch)
        for note in notes:
            self._note(note.kind, f"{launch.kernel}: {note.kind}, in shared memory{at(note)}")
        self._seen.clear()
        for fault in faults:
            self._add(launch, fault)
        if faults and self.first:
            raise EmulationFault(launch, faults)

    def _note_tuning(self, launch: Launch, asked: int) -> None:
        ran = "each was executed once" if self.all_configs else "the first that fits was executed, the others were not"
        chosen = ", ".join(f"{name}={value}" for name, value in constants_of(launch).items())
        self._note(
            "autotuned kernel",
            f"{launch.kernel} is autotuned over {asked} configurations: {ran}; the program goes on with {chosen}",
        )

    def _note(self, kind: str, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.noted[kind] += 1

    def _add(self, launch: Launch, fault: Any) -> None:
        ended = isinstance(fault, Exception)
        places = launching(self.script or str(getattr(sys.modules["__main__"], "__file__", "")))
        where = (places,) if ended else (fault.line, fault.other_line)
        if not any(where):
            where = (fault.instruction, fault.other)
        key = (launch.kernel, kind_of(fault), *where)
        if key in self._known:
            self._known[key].launches += key not in self._seen
            self._seen.add(key)
            return
        self._seen.add(key)
        self._known[key] = Finding(
            kind_of(fault), launch.kernel, str(fault), ended, launch.grid, launch.threads, constants_of(launch), places
        )
        self.findings.append(self._known[key])

    def taken(self) -> list[Finding]:
        """The findings since the last call; they are told again if they come again."""
        found, self.findings = self.findings, []
        self._known.clear()
        return found

    def text(self) -> str:
        """The report for a terminal."""
        kernels, launches = len(self.runs), sum(runs.launches for runs in self.runs.values())
        lines = [
            f"ptx_emulator: {counted(kernels, 'kernel')}, {counted(launches, 'launch', 'launches')} on "
            f"{self.target.name}, {self._seconds():.1f} s"
        ]
        if self.runs:
            width = max(6, *map(len, self.runs))
            lines.append(f"  {'kernel':{width}}  launches     CTAs  seconds  findings")
        for name, runs in self.runs.items():
            found = sum(finding.kernel == name for finding in self.findings)
            lines.append(f"  {name:{width}}  {runs.launches:8}  {runs.ctas:7}  {runs.seconds:7.1f}  {found:8}")
        for number, finding in enumerate(self.findings, 1):
            lines += ["", *_headed(f"{number}. ", finding.lines())]
        lines += self.noted_lines()
        end = counted(len(self.findings), "finding") if self.findings else "nothing found"
        return "\n".join([*lines, *([""] if self.findings else []), f"ptx_emulator: {end}"])

    def noted_lines(self) -> list[str]:
        """The notes, a line each, and how many there are of each kind."""
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.noted.items())
        return [*(f"note: {text}" for text in self.notes), *([f"notes: {kinds}"] if kinds else [])]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "target": self.target.name,
            "landing": self.landing,
            "seed": self.seed,
            "checks": self.checks,
            "lane_order": self.lane_order,
            "all_configs": self.all_configs,
            "seconds": round(self._seconds(), 2),
            "kernels": [vars(runs) | {"counters": dict(runs.counters)} for runs in self.runs.values()],
            "findings": [
                asdict(finding) | {"places": [p._asdict() | {"file": shown(p.file)} for p in finding.places]}
                for finding in self.findings
            ],
            "notes": self.notes,
            "noted": dict(self.noted),
        }

    def _seconds(self) -> float:
        return time.perf_counter() - self.begin


def at(note: Fault) -> str:
    """Where a note's instructions are: their lines, or the text of the later one."""
    lines = " and ".join(dict.fromkeys(filter(None, (note.line, note.other_line))))
    return f" ({lines})" if lines else f": {note.instruction}"


def _headed(head: str, lines: list[str]) -> list[str]:
    return [head + lines[0], *(" " * len(head) + line for line in lines[1:])]


def counted(number: int, one: str, many: str = "") -> str:
    """As in "1 kernel", "2 kernels"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def shortened(text: str, length: int = 40) -> str:
    """A constant for a line of text: a layout of Gluon's has hundreds of characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def constants_of(launch: Launch) -> dict[str, str]:
    """What was compiled into the kernel: its constants that are no None, and how many warps and stages."""
    found = {name: str(value) for name, value in launch.constexprs.items() if value is not None}
    for name in ("num_warps", "num_stages", "num_ctas"):
        value = getattr(launch.metadata, name, None)
        if value is not None and (name, value) != ("num_ctas", 1):
            found[name] = str(value)
    return found


@contextmanager
def checking(checker: Checker | str, cache: Path | None = None) -> Iterator[Checker]:
    """Make Triton's launches compile for the checker's target and run on it; `as` gives the checker.

    Args:
        checker: collects what is found; or the name of a target, "sm_80" or "sm_90".
        cache: folder of compiled kernels that may be used again; None: Triton's own.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, under which nothing is compiled.
        ValueError: there is no such target.
    """
    if isinstance(checker, str):
        checker = Checker(target(checker))
    kept = cache or Path(triton.knobs.cache.dir)
    with offline_driver(checker.target, checker, kept, checker.tuning.benchmark):
        yield checker
