"""`tools/first_contact.sh`: what comes back when processes die or hang, the disk is full, or the time is over."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from first_contact import build
from first_contact import run as running_all
from first_contact.budget import RESERVE, Budget
from first_contact.outputs import Outputs
from first_contact.rows import Rows
from first_contact.run import Contact, main
from first_contact.running import Found
from first_contact.stages import MINUTES, Stage, stages
from first_contact.summary import INCOMPLETE, RIGHT, WRONG, markdown, status
from first_contact_cases import ENVIRONMENT, ROOT, contact, entries, stage, text_of


def test_a_budget_keeps_what_is_reserved() -> None:
    now = [100.0]
    budget = Budget(480, reserve=30, clock=lambda: now[0])
    assert (budget.used(), budget.left()) == (0, 450)
    assert budget.allow(wanted=120, needed=5) == 120
    now[0] += 400
    assert budget.allow(wanted=120, needed=5) == 50
    assert budget.allow(wanted=120, needed=50.1) == 0
    now[0] += 60
    assert (budget.used(), budget.left(), budget.allow(120, 0)) == (460, 0, 0)


def test_everything_right_is_status_0(tmp_path: Path) -> None:
    code, made = contact(
        tmp_path / "new" / "out", [(stage("a", "one", "two"), stage("b", "three")), (stage("c", "x"),)]
    )
    assert code == RIGHT
    assert [found.stage for found in made.found] == ["a", "b", "c"]
    found = entries(tmp_path / "new" / "out")
    assert sorted((entry["stage"], entry["row"], entry["ok"]) for entry in found) == [
        ("a", "one", True), ("a", "two", True), ("b", "three", True), ("c", "x", True),
    ]  # fmt: skip
    text = (tmp_path / "new" / "out" / "summary.md").read_text()
    assert "Everything ran and is right." in text
    assert "| a | about a | 2 | 0 | 0 | 0 |" in text
    assert "Emulated" not in text
    assert "now three" in (tmp_path / "new" / "out" / "log.txt").read_text()


@pytest.mark.parametrize("end", ["dies", "exits", "hangs", "ends"])
def test_a_row_that_ends_its_process_costs_that_row_alone(tmp_path: Path, end: str) -> None:
    limits = {"row_seconds": 1.5} if end == "hangs" else {}
    code, made = contact(tmp_path, [(stage("a", "one", end, "two", **limits),), (stage("b", "three"),)])
    assert code == WRONG
    found = {entry["row"]: entry for entry in entries(tmp_path)}
    assert {name: entry["ok"] for name, entry in found.items()} == {"one": True, end: False, "two": True, "three": True}
    why = {"dies": "SIGSEGV", "exits": "86", "hangs": "1.5 s", "ends": "a wrong number"}[end]
    assert why in found[end]["why_not"]
    assert not made.found[0].broken
    assert why in (tmp_path / "summary.md").read_text()


def test_a_process_that_breaks_between_rows_is_an_entry(tmp_path: Path) -> None:
    code, made = contact(tmp_path, [(stage("a", "breaks", "two"),)])
    assert code == WRONG
    assert [(row["row"], row["ok"]) for row in made.found[0].rows] == [
        ("breaks", True), ("the process", False), ("two", True)
    ]  # fmt: skip
    assert made.found[0].wrong[0]["why_not"] == "exit status 1: an error between two rows"


def test_a_row_may_have_a_figure_called_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST_CONTACT_ROWS", str(tmp_path / "rows"))
    Rows().end("one", None, name="NVIDIA H200")
    assert json.loads((tmp_path / "rows").read_text()) == {"row": "one", "ok": None, "name": "NVIDIA H200"}


def test_a_wrong_row_is_status_1(tmp_path: Path) -> None:
    code, made = contact(tmp_path, [(stage("a", "wrong", "two"),)])
    assert code == WRONG
    assert [row["row"] for row in made.found[0].wrong] == ["wrong"]


def test_processes_that_end_again_and_again_are_given_up(tmp_path: Path) -> None:
    names = [f"exits {n}" for n in range(12)]
    code, made = contact(tmp_path, [(stage("a", *names),), (stage("b", "one"),)])
    assert code == WRONG
    assert made.found[0].broken
    assert len(made.found[0].wrong) == 8
    assert made.found[0].missing == names[8:]
    assert made.found[1].rows[0]["ok"] is True


def test_a_command_that_fails_before_its_rows_is_not_begun_again(tmp_path: Path) -> None:
    program = "print('first line'); raise SystemExit('no such module')"
    broken = Stage("a", "about a", (sys.executable, "-c", program), 20)
    code, made = contact(tmp_path, [(broken,), (stage("b", "one"),)])
    assert code == WRONG
    assert made.found[0].ended == "exit status 1: no such module"
    assert made.found[1].ended == ""
    assert "first line" in (tmp_path / "log.txt").read_text()


def test_a_stage_gets_no_more_than_its_time_and_the_next_goes_on(tmp_path: Path) -> None:
    begin = time.monotonic()
    code, made = contact(tmp_path, [(stage("a", "one", "hangs", "two", seconds=2),), (stage("b", "three"),)])
    assert code == INCOMPLETE
    assert time.monotonic() - begin < 30
    assert [row["ok"] for row in made.found[0].rows] == [True, None]
    assert made.found[0].missing == ["two"]
    assert made.found[1].rows[0]["ok"] is True


def test_a_process_that_stops_in_time_leaves_rows_out(tmp_path: Path) -> None:
    code, made = contact(tmp_path, [(stage("a", *(f"slow {n}" for n in range(20)), seconds=3),)])
    assert code == INCOMPLETE
    assert made.found[0].rows
    assert made.found[0].missing
    assert all(row["ok"] in (True, None) for row in made.found[0].rows)


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    late = Stage("late", "about late", (sys.executable, "-c", ""), 20, needs=1000)
    code, made = contact(tmp_path, [(stage("a", "one"),), (late,)])
    assert code == INCOMPLETE
    assert made.skipped == ["late"]
    assert "| late |  |  |  |  |  |  | not begun |" in (tmp_path / "summary.md").read_text()


def test_files_stay_below_their_limit_by_whole_lines(tmp_path: Path) -> None:
    code, made = contact(tmp_path, [(stage("a", *(f"row {n}" for n in range(40))),)], limit=1000)
    assert code == RIGHT
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    assert 5 < len(entries(tmp_path)) < 40
    assert "results.jsonl" in made.outputs.cut
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_costs_what_did_not_fit_not_the_run(tmp_path: Path) -> None:
    for name in ("results.jsonl", "log.txt"):
        (tmp_path / name).symlink_to("/dev/full")
    code, made = contact(tmp_path, [(stage("a", "one", "two"),)])
    assert code == RIGHT
    assert [row["row"] for row in made.found[0].rows] == ["one", "two"]
    assert "No space left" in made.outputs.cut["results.jsonl"]
    assert "No space left" in (tmp_path / "summary.md").read_text()


def test_a_summary_that_cannot_be_written_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = Outputs(tmp_path)
    (tmp_path / "part").mkdir()
    assert Contact(outputs, Budget(60, reserve=0.0), ENVIRONMENT, False).run([(stage("a", "wrong"),)]) == WRONG
    assert "| a | about a | 0 | 1 | 0 | 0 |" in capsys.readouterr().out


def test_a_signal_while_the_first_stage_begins_is_not_everything_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running_all, "Running", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    code = Contact(Outputs(tmp_path), Budget(60, reserve=0.0), ENVIRONMENT, False).run([(stage("a", "one"),)])
    assert code == INCOMPLETE
    assert "Everything ran" not in (tmp_path / "summary.md").read_text()


def test_a_file_keeps_its_text_where_the_next_cannot_be_written(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.replace("summary.md", "before")
    (tmp_path / "part").mkdir()
    outputs.replace("summary.md", "after")
    assert (tmp_path / "summary.md").read_text() == "before"
    assert "summary.md" in outputs.cut


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_found_is_there_after_a_kill(tmp_path: Path, number: int) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\nimport first_contact_cases as t"
        "\nsys.exit(t.contact(Path(sys.argv[2]), [(t.stage('a', 'one', 'wrong'),), (t.stage('b', 'hangs'),)])[0])"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT)])}
    command = [sys.executable, "-c", program, str(ROOT / "tests"), str(tmp_path)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            _wait_for(lambda: "now hangs" in text_of(tmp_path / "log.txt"))
            process.send_signal(number)
            code = process.wait(60)
            worker = re.search(r"now hangs (\d+)", text_of(tmp_path / "log.txt"))
            assert worker
            _wait_for(lambda: _is_gone(int(worker[1])))
        finally:
            _kill_session(process.pid)
    assert code == (WRONG if number == signal.SIGTERM else -number)
    assert [entry["row"] for entry in entries(tmp_path)][:2] == ["one", "wrong"]
    text = (tmp_path / "summary.md").read_text()
    assert "## Wrong" in text
    if number == signal.SIGTERM:
        assert entries(tmp_path)[2]["why_not"] == "not finished: SIGTERM"
        assert "SIGTERM" in text


def _wait_for(there: Any) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def _is_gone(pid: int) -> bool:
    """Whether it has ended, if only its parent has not looked yet."""
    return text_of(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] in ([], ["Z"], ["X"])


def _kill_session(session: int) -> None:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            continue


def test_nothing_of_a_stage_outlives_it(tmp_path: Path) -> None:
    program = "import subprocess, sys; print(subprocess.Popen(['sleep', '300']).pid, flush=True)"
    left = Stage("a", "about a", (sys.executable, "-c", program), 20)
    assert contact(tmp_path, [(left,)])[0] == RIGHT
    pid = int((tmp_path / "log.txt").read_text().splitlines()[-1])
    _wait_for(lambda: _is_gone(pid))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--minutes", "0.5"], "'0.5' is not a number from 1 to 600"),
        (["out", "--minutes", "nan"], "'nan' is not"),
        (["out", "--minutes", "eight"], "'eight' is not"),
        (["out", "--stages", "time"], "invalid choice: 'time'"),
        ([], "out"),
    ],
)
def test_bad_usage_is_status_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_the_summary_marks_what_is_emulated_and_says_what_broke() -> None:
    found = [Found("a", "about a", rows=[{"row": "one", "ok": None, "ms": 0.123456, "x": "a|b"}])]
    text = markdown(found, [], 12.0, True, {})
    assert "no figure here is a measurement" in text
    assert "| one |  | 0.1235 | a\\|b |" in text
    assert status(found, []) == RIGHT
    assert status(found, ["late"]) == INCOMPLETE
    assert status([Found("a", "about a", broken=True)], []) == WRONG


@pytest.mark.parametrize(
    "found",
    [
        Found("a", "about a", ended="5 s are left"),
        Found("a", "about a", planned=["one", "two"], begun=["one"]),
        Found("a", "about a", rows=[{"row": "one", "ok": None, "late": True}]),
    ],
)
def test_rows_that_were_not_begun_are_not_done(found: Found) -> None:
    assert found.late
    assert status([found], []) == INCOMPLETE
    assert not Found("a", "about a", planned=["one"], begun=["one"], rows=[{"row": "one", "ok": True}]).late


def test_what_comes_back_is_within_the_limits() -> None:
    """At most 8 files, no folders, names of plain characters."""
    every = [stage for wave in stages(emulated=False) for stage in wave]
    names = {name for stage in every for name in (stage.file, stage.brings) if name}
    names |= {"results.jsonl", running_all.SUMMARY, "part"}
    assert len(names) <= 8
    assert all(name.replace(".", "").replace("_", "").replace("-", "").isalnum() for name in names)


@pytest.mark.parametrize(
    ("codes", "core", "status", "last"),
    [
        ([0], 0, 0, "[exit status 0"),
        ([1, 0], 0, 0, "[exit status 0"),
        ([1, 3], 0, 3, "no command could build: exit status 3; the native core that loads is an older one"),
        ([0], 1, 1, "[exit status 0"),  # a build that cannot compile leaves the core out and succeeds
    ],
)
def test_a_build_that_failed_is_no_build(
    codes: list[int], core: int, status: int, last: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whatever lies in the tree from before."""
    left = iter(codes)

    def run(command: list[str], **_: Any) -> Any:
        code = next(left) if command in build.COMMANDS else core if command == build.CORE else 0
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    assert build.main() == status
    assert capsys.readouterr().out.splitlines()[-1].startswith(last)
    assert next(left, None) is None


def test_kernels_are_compiled_ahead_for_the_gpu_that_is_there() -> None:
    """An emulated device is none: a rehearsal compiles for Hopper."""

    def ahead(emulated: bool) -> list[tuple[str, ...]]:
        return [s.command for wave in stages(emulated) for s in wave if s.name.startswith("compile_")]

    assert all("--target" not in command and "--cache" in command for command in ahead(False))
    assert all(command[command.index("--target") + 1] == "sm_90" for command in ahead(True))


def test_stages_can_be_chosen(tmp_path: Path) -> None:
    """The machine's own commands need no GPU, and on a busy machine more than some seconds."""
    assert main([str(tmp_path), "--minutes", "16", "--stages", "machine"]) == RIGHT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["machine.txt", "summary.md"]
    assert "$ lscpu" in (tmp_path / "machine.txt").read_text()


def test_stages_get_their_part_of_the_minutes() -> None:
    eight, four, twenty = (
        {stage.name: stage for wave in stages(False, minutes) for stage in wave} for minutes in (8, 4, 20)
    )
    assert (four["times"].seconds, eight["times"].seconds, twenty["times"].seconds) == (70, 140, 350)
    assert (four["times"].row_seconds, twenty["times"].row_seconds) == (150, 375)
    # What is done before torch.compile and the sanitizer, which take what is left, fits into the minutes.
    waves = stages(False)
    assert sum(max(stage.seconds for stage in wave) for wave in waves[:-2]) <= 60 * MINUTES - RESERVE
