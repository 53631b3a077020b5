"""One running stage: its processes, its rows, its time."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from first_contact.outputs import Outputs
from first_contact.rows import BROKEN
from first_contact.stages import Stage

#: File of all results, one JSON object a line.
RESULTS = "results.jsonl"
#: The reason of a stage that ended incomplete.
OUT_OF_TIME = "its time was over"
#: Bytes kept of one stage's output, from its beginning.
_MOST_LOG = 2 << 20
#: Bytes in one read.
_CHUNK = 1 << 20
#: Most processes of one stage; each fault needs a new one.
_MOST_PROCESSES = 8
#: From Linux's <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1
#: pytest's exit status after failed tests.
_SOME_FAILED = 1
#: Seconds to wait for a killed process; one that hangs in the driver does not end.
_PATIENCE = 5.0


@dataclass
class Found:
    """The state of a stage."""

    stage: str
    about: str
    ended: str = ""  # why it is incomplete
    broken: bool = False  # whether the stage itself caused that
    seconds: float = 0.0
    planned: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """Rows with a wrong result."""
        return [row for row in self.rows if row.get("ok") is False]

    @property
    def late(self) -> bool:
        """Whether the time was too short for some row."""
        return bool(self.ended or self.missing or any(row.get("late") for row in self.rows))

    @property
    def missing(self) -> list[str]:
        """Rows that were not begun."""
        return [name for name in self.planned if name not in self.begun]


class Running:
    """A stage from its first process to its last.

    Args:
        stage: the stage to run.
        seconds: its time limit.
        scratch: folder for the files of its processes.
        outputs: takes rows and output at once.
        environment: of its processes.
        clock: returns seconds.
    """

    def __init__(
        self, stage: Stage, seconds: float, scratch: Path, outputs: Outputs, environment: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.stage, self.outputs, self._scratch, self._clock = stage, outputs, scratch, clock
        self.found = Found(stage.name, stage.about)
        self._begin = self._row_begin = clock()
        self._end = self._begin + seconds
        self._log, self._lines = (_Tail(scratch / f"{stage.name}.{kind}") for kind in ("log", "jsonl"))
        self._begun = scratch / f"{stage.name}.begun"
        self._environment = {
            **environment, "FIRST_CONTACT_ROWS": str(self._lines.path), "FIRST_CONTACT_BEGUN": str(self._begun),
        }  # fmt: skip
        self._row, self._logged, self._processes = "", 0, 0
        outputs.append(stage.file, f"==== {stage.name}: {stage.about}\n")
        self._start()

    def _start(self) -> None:
        self._begun.write_text("".join(f"{name}\n" for name in self.found.begun))
        self._row, self._row_begin = "", self._clock()
        self._count = len(self.found.begun)
        self._processes += 1
        seconds = self._end - self._clock()
        places = {"{scratch}": str(self._scratch), "{minutes}": f"{seconds / 60:.3f}"}
        command = [_filled(part, places) for part in self.stage.command]
        with self._log.path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0,
                env={**self._environment, "FIRST_CONTACT_UNTIL": str(time.time() + seconds)},
                preexec_fn=_end_with_parent,  # safe, because this process has one thread
            )  # fmt: skip

    def finished(self) -> bool:
        """Collect output and check time limits -> whether the stage is over."""
        code = self._process.poll()
        self._collect()
        now = self._clock()
        if code is None:
            if now >= self._end:
                return self._finish(OUT_OF_TIME)
            if now - self._row_begin >= self.stage.row_seconds:
                return self._lost(f"killed after {self.stage.row_seconds:g} s without an end")
            return False
        if code == 0 and not self._row:
            return self._finish(OUT_OF_TIME if self.found.missing else "")
        if not self._row and code != BROKEN and not (code == _SOME_FAILED and self.found.wrong):
            self._keep({"row": "the process", "ok": False, "why_not": f"exit status {code}: {self._log.last}"})
        return self._lost(f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}")

    def _lost(self, why: str) -> bool:
        """A process ended: its row failed, and another process continues if there is reason to."""
        self.kill()
        self._collect()
        if self._row:
            self._keep({"row": self._row, "ok": False, "why_not": f"its process ended: {why}"})
        if len(self.found.begun) == self._count:  # no row was begun, so the next process would end in the same way
            return self._finish(f"{why}: {self._log.last}" if self._log.last else why, broken=True)
        if not self.found.missing:
            return self._finish("")
        if self._processes == _MOST_PROCESSES:
            return self._finish(f"{why}, as {_MOST_PROCESSES - 1} processes before", broken=True)
        if self._clock() + self.stage.needs >= self._end:
            return self._finish(OUT_OF_TIME)
        self._start()
        return False

    def _finish(self, why: str, broken: bool = False) -> bool:
        self.kill()
        self._collect()
        self.outputs.append(self.stage.file, self._log.rest())
        self.bring()
        if self._row:
            self._keep({"row": self._row, "ok": None, "why_not": f"not finished: {why}"})
        self.found.ended, self.found.broken = why, broken
        self.found.seconds = self._clock() - self._begin
        return True

    def bring(self) -> None:
        """Copy the extra file of the processes."""
        path = self._scratch / self.stage.brings
        if self.stage.brings and path.exists():
            self.outputs.replace(path.name, path.read_text(errors="replace"))

    def stop(self, why: str) -> None:
        """End the stage now; its results stay."""
        self._finish(why)

    def kill(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)

    def _collect(self) -> None:
        """Read new output of the process."""
        while lines := self._log.new_lines():
            self._logged += len(lines)
            if self._logged <= _MOST_LOG:
                self.outputs.append(self.stage.file, lines)
        while lines := self._lines.new_lines():
            for line in lines.splitlines():
                self._take(_parsed(line))

    def _take(self, entry: dict[str, Any]) -> None:
        if "rows" in entry:
            self.found.planned += [name for name in entry["rows"] if name not in self.found.planned]
        elif entry.get("begins"):
            self._row, self._row_begin = entry["row"], self._clock()
            self.found.begun.append(entry["row"])
        else:
            self._keep(entry)

    def _keep(self, entry: dict[str, Any]) -> None:
        self.found.rows.append(entry)
        self.outputs.append(RESULTS, json.dumps({"stage": self.stage.name, **entry}) + "\n")
        self._row, self._row_begin = "", self._clock()


def _end_with_parent() -> None:
    """Run in the child: make Linux kill it when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _filled(text: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(name, value)
    return text


def _parsed(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):  # a process was killed while it wrote, or other output
        return {"row": "?", "ok": False, "why_not": f"no line of JSON: {line[:200]}"}


class _Tail:
    """Reads new lines of a growing file."""

    def __init__(self, path: Path) -> None:
        self.path, self.last, self._read = path, "", 0
        path.touch()

    def new_lines(self) -> str:
        """New whole lines, at most a mebibyte."""
        return self._since(lambda data: data.rfind(b"\n") + 1 or (len(data) if len(data) == _CHUNK else 0))

    def rest(self) -> str:
        """The last line, which may lack its end."""
        text = self._since(len)
        return text + "\n" if text else ""

    def _since(self, count: Callable[[bytes], int]) -> str:
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read(_CHUNK)
        data = data[: count(data)]
        self._read += len(data)
        text = data.decode(errors="replace")
        self.last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), self.last)
        return text
