"""`tools/first_contact.sh`: what comes back when processes die or hang, the disk is full, or the time is over."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from first_contact import run as running_all
from first_contact.budget import RESERVE, Budget
from first_contact.outputs import Outputs
from first_contact.rows import Rows
from first_contact.run import Contact, main
from first_contact.running import Found
from first_contact.stages import MINUTES, Stage, benchmarks, rows, stages
from first_contact.summary import INCOMPLETE, RIGHT, WRONG, markdown, status

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}

#: Begins its rows one after the other; what a row is called says what becomes of it.
ROWS = """
import os, signal, subprocess, sys, time
from first_contact.rows import Rows
rows = Rows()
rows.plan(sys.argv[1:])
for name in sys.argv[1:]:
    if name in rows.begun or rows.seconds_left() < 0.2:
        continue
    rows.begin(name)
    print("now", name, os.getpid(), flush=True)
    if "dies" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exits" in name:
        sys.exit(86)
    if "hangs" in name:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        time.sleep(60)
    if "slow" in name:
        time.sleep(0.5)
    if "breaks" in name:
        rows.end(name, True)
        sys.exit("an error between two rows")
    if "ends" in name:
        rows.end(name, False, why_not="a wrong number")
        sys.exit(86)
    rows.end(name, "wrong" not in name, ms=1.5)
"""


def stage(name: str, *rows: str, seconds: float = 20.0, **more: Any) -> Stage:
    return Stage(name, f"about {name}", (sys.executable, "-c", ROWS, *rows), seconds, needs=0.1, **more)


def contact(
    folder: Path, stages: Sequence[tuple[Stage, ...]], seconds: float = 60.0, limit: int = 1 << 20
) -> tuple[int, Contact]:
    made = Contact(Outputs(folder, limit), Budget(seconds, reserve=0.0), ENVIRONMENT, False)
    return made.run(stages), made


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


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
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\nimport test_first_contact as t"
        "\nsys.exit(t.contact(Path(sys.argv[2]), [(t.stage('a', 'one', 'wrong'),), (t.stage('b', 'hangs'),)])[0])"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT)])}
    command = [sys.executable, "-c", program, str(ROOT / "tests"), str(tmp_path)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            _wait_for(lambda: "now hangs" in _text(tmp_path / "log.txt"))
            process.send_signal(number)
            code = process.wait(60)
            worker = re.search(r"now hangs (\d+)", _text(tmp_path / "log.txt"))
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


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # of a process that has just ended, for example
        return ""


def _wait_for(there: Any) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def _is_gone(pid: int) -> bool:
    """Whether it has ended, if only its parent has not looked yet."""
    return _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] in ([], ["Z"], ["X"])


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


BENCHMARK = """
import os, signal, pytest

class Session:
    broken = ""

    def row(self, row):
        return {"median_ms": 1.5, "all_ms": [1.5]}

@pytest.fixture(scope="session")
def bench():
    return Session()

@pytest.fixture
def measure(bench):
    def run(row):
        if row == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if row == "wrong":
            pytest.fail("wrong: an error of 3 x eager's", pytrace=False)
        if row in ("late", "lacking"):
            pytest.skip("not begun: the minutes were over" if row == "late" else "no such package")
        if row == "faults":
            bench.broken = "the GPU can be used no more"
            pytest.fail("an illegal access", pytrace=False)
        if row == "raises":
            raise KeyError("in a library")
    return run

@pytest.mark.parametrize("row", ["fine", "wrong", "dies", "lacking", "faults", "raises", "late"], ids=str)
def test_row(row, measure):
    measure(row)
"""


def test_benchmarks_are_rows_whatever_ends_their_process(tmp_path: Path) -> None:
    (tmp_path / "test_rows.py").write_text(BENCHMARK)
    pytest_run = (
        sys.executable,
        "-m",
        "pytest",
        str(tmp_path),
        "-p",
        "first_contact.plugin",
        "-q",
        f"--rootdir={tmp_path}",
    )
    kept = Stage("times", "about times", (*pytest_run, "-p", "no:cacheprovider"), 100)
    code, made = contact(tmp_path / "out", [(kept,)], seconds=100)
    assert code == WRONG
    found = {row["row"]: row for row in made.found[0].rows}
    expected = {
        "fine": True,
        "wrong": False,
        "dies": False,
        "lacking": None,
        "faults": False,
        "raises": False,
        "late": None,
    }
    assert {name: row["ok"] for name, row in found.items()} == expected
    assert found["fine"]["median_ms"] == 1.5
    assert "all_ms" not in found["fine"]
    assert "3 x eager" in found["wrong"]["why_not"]
    assert "SIGSEGV" in found["dies"]["why_not"]
    assert "an illegal access" in found["faults"]["why_not"]
    assert "KeyError" in found["raises"]["why_not"]
    assert found["late"]["late"]
    assert not found["lacking"]["late"]
    assert not made.found[0].broken


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


def test_what_comes_back_is_within_the_limits() -> None:
    """At most 8 files, no folders, names of plain characters."""
    every = [stage for wave in stages(emulated=False) for stage in wave]
    names = {name for stage in every for name in (stage.file, stage.brings) if name}
    names |= {"results.jsonl", running_all.SUMMARY, "part"}
    assert len(names) <= 8
    assert all(name.replace(".", "").replace("_", "").replace("-", "").isalnum() for name in names)


#: Packages that we ask pip for and that a bare machine with a GPU may lack.
LACKING = ("av", "jsonargparse", "docstring_parser", "open_clip", "openvino", "xformers", "flash_attn", "torchcodec")


def bare(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program as if those were not installed."""
    begin = f"import sys\nfor name in {LACKING}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", begin + program], capture_output=True, text=True, env=ENVIRONMENT | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tools")])
    })  # fmt: skip


def test_models_kernels_and_training_load_on_a_bare_machine() -> None:
    done = bare(
        "import cast, cast.training, cast_kernels.cli, cast_kernels.evidence.predict"
        "\nwith __import__('torch').device('meta'): cast.CAST('base')"
    )
    assert done.returncode == 0, done.stderr


def test_what_needs_a_lacking_package_says_so() -> None:
    done = bare("import cast\ntry: cast.Predictor\nexcept ModuleNotFoundError as error: print(error, error.name)")
    assert done.stdout.startswith("cast.Predictor needs a package that is not installed: "), done.stderr
    assert done.stdout.rstrip().endswith(" av")


def test_what_runs_the_processes_needs_the_standard_library_alone() -> None:
    program = "import first_contact.run, first_contact.machine, first_contact.build, first_contact.rows"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_rehearsal_from_end_to_end(tmp_path: Path) -> None:
    """The script's own processes on an emulated device: benchmarks through pytest, and a room of rows."""
    waves = [(benchmarks("times", "adapters", 200, "adapter and not compile", emulated=True),)]
    waves += [(rows("sanitizer", "no such program here", 100),)]
    made = Contact(Outputs(tmp_path), Budget(400), running_all.environment(emulated=True), emulated=True)
    assert made.run(waves) == RIGHT, _text(tmp_path / "log.txt")
    times, sanitizer = made.found
    first, about, second = times.rows
    assert first["row"] == "adapter temporal amp B6 training-eager"
    assert second["row"] == "adapter temporal amp B6 training-cast_kernels, triton"
    assert first["stand_in"] == second["stand_in"] == "an emulated device"
    assert (about["row"], about["multiprocessors"]) == ("the GPU and its ceilings", 132)
    assert [row["row"] for row in sanitizer.rows] == ["memcheck", "racecheck"]
    kept = json.loads((tmp_path / "benchmarks.json").read_text())
    assert sum(len(group) for group in kept["groups"].values()) == 2
    assert "no figure here is a measurement" in (tmp_path / "summary.md").read_text()


def test_stages_can_be_chosen(tmp_path: Path) -> None:
    """The machine's own commands need no GPU."""
    assert main([str(tmp_path), "--minutes", "2", "--stages", "machine"]) == RIGHT
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


def test_the_tree_may_be_sent_along() -> None:
    """A machine that is lent takes a working tree of at most 64 MiB; half of that leaves room for what is carried."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sum((ROOT / name).lstat().st_size for name in listed.split("\0") if name) < 32 << 20


def test_the_rooms_rows_are_those_of_the_benchmarks() -> None:
    from fake_machine import FakeMachine  # not above: processes import this file
    from first_contact import rooms
    from groups import PAPER

    known = rooms.groups(PAPER)
    for name in (*rooms.CHECKED, *rooms.REPEATED):
        assert rooms.OURS in known[name].rows
    for room in rooms.ROOMS:
        assert rooms.rows_of(room, FakeMachine())
