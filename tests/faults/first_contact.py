"""Faults in what runs a GPU's first minutes."""

from __future__ import annotations

from faults.base import Fault, fault

_RUNNING, _OUTPUTS = "tools/first_contact/running.py", "tools/first_contact/outputs.py"
_TESTS = "tests/test_first_contact.py -k "

FAULTS: list[Fault] = [
    fault(
        "first contact: nothing is kept for the end",
        _TESTS + "reserved",
        ("tools/first_contact/budget.py", "self._begin + seconds - reserve", "self._begin + seconds"),
    ),
    fault(
        "first contact: a row that hangs takes the stage's time",
        _TESTS + "costs_that_row",
        (_RUNNING, "now - self._row_begin >= self.stage.row_seconds", "now - self._begin >= 1e9"),
    ),
    fault(
        "first contact: a lost process ends its stage",
        _TESTS + "costs_that_row",
        (_RUNNING, "        self._start()\n        return False\n", '        return self._finish("")\n'),
    ),
    fault(
        "first contact: the row of a lost process is forgotten",
        _TESTS + "costs_that_row",
        (_RUNNING, '"ok": False, "why_not": f"its process ended', '"ok": None, "why_not": f"its process ended'),
    ),
    fault(
        "first contact: processes that end at once are begun for ever",
        _TESTS + "given_up",
        (_RUNNING, "if self._processes == _MOST_PROCESSES:", "if self._processes < 0:"),
    ),
    fault(
        "first contact: a stage's children outlive it",
        _TESTS + "outlives",
        (_RUNNING, "os.killpg(self._process.pid, signal.SIGKILL)", "os.kill(self._process.pid, signal.SIGKILL)"),
    ),
    fault(
        "first contact: processes outlive what looks after them",
        _TESTS + "after_a_kill",
        (_RUNNING, "preexec_fn=_end_with_parent", "preexec_fn=None"),
    ),
    fault(
        "first contact: rows that were not begun count as done",
        _TESTS + "not_begun_are_not_done",
        (_RUNNING, 'bool(self.ended or self.missing or any(row.get("late") for row in self.rows))', "bool(self.ended)"),
    ),
    fault(
        "first contact: a full disk ends the run",
        _TESTS + "full_disk",
        (_OUTPUTS, "            _shorten(path, before)", "            raise"),
    ),
    fault(
        "first contact: a file grows above its limit",
        _TESTS + "stay_below",
        (_OUTPUTS, "if before + len(data) > self.limit:", "if len(data) > self.limit:"),
    ),
]  # fmt: skip
