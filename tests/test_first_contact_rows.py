"""What `tools/first_contact.sh` runs: the benchmarks, rooms of rows, on a bare machine and on an emulated device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_machine import FakeMachine
from first_contact import inside, rooms
from first_contact import run as running_all
from first_contact.budget import Budget
from first_contact.outputs import Outputs
from first_contact.run import Contact
from first_contact.stages import Stage, benchmarks, rows
from first_contact.summary import RIGHT, WRONG
from first_contact_cases import ENVIRONMENT, ROOT, contact, text_of
from groups import PAPER

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
    assert made.run(waves) == RIGHT, text_of(tmp_path / "log.txt")
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


def test_the_tree_may_be_sent_along() -> None:
    """A machine that is lent takes a working tree of at most 64 MiB; half of that leaves room for what is carried."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sum((ROOT / name).lstat().st_size for name in listed.split("\0") if name) < 32 << 20


@pytest.mark.parametrize(("gpu_ms", "told"), [(21.0, True), (200.0, False)])
def test_nothing_is_said_of_a_host_that_may_have_waited_for_the_gpu(
    gpu_ms: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's queue holds about 1024 launches. Of a step's 1300 the host needs 20 ms, and the GPU 21 or 200."""
    monkeypatch.setattr(inside, "_kernels", lambda machine, step: [("a", 1000, 1.0), ("b", 300, 1.0)])
    machine = FakeMachine(lambda: gpu_ms)
    found = inside.host_time(machine, {"eager": lambda: time.sleep(0.02), "ours": lambda: time.sleep(0.02)})
    assert found["ours: launches"] == 1300
    assert found["ours: step ms"] == gpu_ms
    assert ("ours: host ms" in found) == told
    assert ("eager / ours" in found) == told
    if told:
        assert found["ours: host ms, spread"][0] >= 20
    else:
        assert "launches behind" in found["ours: no host ms"]


def test_the_host_is_timed_at_one_clip() -> None:
    """At which the GPU keeps up, and with the kernels that the stage before compiled."""
    room = rooms.rows_of("step", FakeMachine())
    assert [name for name in room if name.startswith("host")] == ["host, B1"]


def test_the_rooms_rows_are_those_of_the_benchmarks() -> None:
    known = rooms.groups(PAPER)
    for name in (*rooms.CHECKED, *rooms.REPEATED):
        assert rooms.OURS[0] in known[name].rows
    for room in rooms.ROOMS:
        assert rooms.rows_of(room, FakeMachine())
