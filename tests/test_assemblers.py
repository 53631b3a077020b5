"""Which ptxas Triton takes, what is known of it, and that nothing unknown passes for good."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import triton
from rich.console import Console
from test_info import python

from cast_kernels import assemblers, info
from cast_kernels.assemblers import DEFECTS, Defect, assembler, describe, judge, line, release, version_of
from cast_kernels.gpu import check
from cast_kernels.gpu.machine import CudaMachine

TOOLS = triton.knobs.nvidia


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A program that says what a ptxas of CUDA 12.8 says."""
    path = tmp_path / "ptxas"
    path.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("version", "architecture", "word"),
    [
        ("12.9.86", 90, "known bad"),
        ("12.8.93", 90, "known bad"),
        ("13.0.88", 90, "known bad"),
        ("13.1.115", 90, "known bad"),
        ("13.3.33", 90, "unknown"),  # nobody looked whether it writes shared memory at wrong addresses
        ("13.3.33", 80, "no known defect"),
        ("13.3.33", 100, "known bad"),
        ("13.5.37", 100, "unknown"),
        ("12.9.86", 80, "known bad"),
        ("12.4.131", 80, "unknown"),  # older than what the release notes speak of
        ("13.2.86", 90, "known bad"),
        ("", 80, "unknown"),
        ("unknown: ptxas --version names none", 80, "unknown"),
        ("13.3.33rc", 80, "unknown"),
        ("99", 80, "unknown"),
    ],
)
def test_what_is_known_of_a_release(version: str, architecture: int, word: str) -> None:
    assert judge(version, architecture).word == word


def test_what_no_release_is_has_no_defect_judged() -> None:
    verdict = judge("built from source", 90)
    assert not verdict.defects
    assert len(verdict.unjudged) == sum(d.architectures[0] <= 90 <= d.architectures[1] for d in DEFECTS)


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ((12, 9, 86), "bad"), ((12, 9, 41), "unknown"), ((13, 0, 48), "bad"), ((13, 0), "bad"), ((12, 8), "unknown"),
        ((13, 1, 80), "right"), ((13, 1, 115), "unknown"), ((13, 3), "right"), ((14, 0, 1), "right"),
    ],
)  # fmt: skip
def test_a_release_between_bad_and_right_ones_is_not_judged(numbers: tuple[int, ...], word: str) -> None:
    defect = Defect("a", (90, 90), ((12, 9, 86), (13, 0)), ((13, 1, 80),), (13, 3), "b", "c", "d")
    assert defect.judge(numbers) == word


def test_the_list_of_defects_says_where_from_and_contradicts_itself_nowhere() -> None:
    for defect in DEFECTS:
        assert "https://" in defect.source
        assert defect.ours
        assert defect.bad
        assert {defect.judge(known) for known in defect.bad} == {"bad"}
        assert {defect.judge(known) for known in defect.right} <= {"right"}
        assert defect.fixed is None or defect.judge(defect.fixed) == "right"
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)


def test_what_is_known_for_one_architecture_is_not_said_of_another() -> None:
    names = {number: {d.name for d in judge("12.9.86", number).defects} for number in (80, 89, 90)}
    assert names[80] < names[89] < names[90]


@pytest.mark.parametrize(("architecture", "name"), [(80, "ptxas"), (90, "ptxas"), (100, "ptxas_blackwell")])
def test_the_assembler_is_the_one_that_triton_takes(architecture: int, name: str) -> None:
    from triton.backends.nvidia.compiler import get_ptxas

    found = assembler(architecture)
    assert found.path == get_ptxas(architecture).path
    assert release(found.version)[:2] == tuple(map(int, get_ptxas(architecture).version.split(".")))
    assert found.variable == f"TRITON_{name.upper()}_PATH"
    assert found.path == getattr(TOOLS, name).path


@pytest.mark.parametrize(
    ("variable", "architecture"), [("TRITON_PTXAS_PATH", 90), ("TRITON_PTXAS_BLACKWELL_PATH", 100)]
)
def test_the_environment_names_another_one(
    variable: str, architecture: int, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = assembler(190 - architecture)
    monkeypatch.setenv(variable, str(stand_in))
    assert assembler(architecture) == (str(stand_in), "12.8.93", variable)
    assert assembler(190 - architecture) == other
    told = describe(architecture)
    assert told["verdict"] == "known bad"
    assert f"export {variable}=" in line(told)


def test_one_assembler_for_all_has_the_variable_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", TOOLS.ptxas_blackwell.path)
    assert assembler(90)[::2] == (TOOLS.ptxas_blackwell.path, "TRITON_PTXAS_PATH")
    assert assembler(100)[::2] == (TOOLS.ptxas_blackwell.path, "TRITON_PTXAS_BLACKWELL_PATH")


def test_a_file_that_is_no_assembler_is_unknown(stand_in: Path, tmp_path: Path) -> None:
    assert version_of(str(stand_in)) == "12.8.93"
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\necho ptxas\n")
    silent.chmod(0o755)
    assert version_of(str(silent)) == f"unknown: {silent} --version names none"
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho V13.3.33\nexit 3\n")
    broken.chmod(0o755)
    assert version_of(str(broken)).startswith("unknown")
    assert version_of(str(tmp_path / "missing")).startswith("unknown: ")


def test_without_triton_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    told = describe(90)
    assert told["verdict"] == "unknown"
    assert line(told).startswith("unknown: ")


def test_the_remedy_is_at_hand_where_triton_ships_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    blackwell = TOOLS.ptxas_blackwell.path
    monkeypatch.setattr(assemblers, "version_of", lambda path: "13.3.33" if path == blackwell else "12.9.86")
    assert describe(90)["remedy"] == f"To use another one, 13.3.33: export TRITON_PTXAS_PATH={blackwell}"
    monkeypatch.setattr(assemblers, "version_of", lambda path: "12.9.86")
    assert "pip install" in describe(90)["remedy"]
    monkeypatch.setattr(assemblers, "version_of", lambda path: "13.3.33")
    assert "remedy" not in describe(80)
    assert line(describe(80)).endswith("no known defect")


def test_info_names_the_assemblers(stand_in: Path) -> None:
    done = python(
        "from cast_kernels.cli import main; raise SystemExit(main(['info', '--json']))", TRITON_PTXAS_PATH=str(stand_in)
    )
    assert done.returncode == 0, done.stderr
    told = {entry["architecture"]: entry for entry in json.loads(done.stdout)["ptxas"]}
    assert told["sm_90"]["path"] == str(stand_in)
    assert told["sm_90"]["version"] == "12.8.93"
    assert told["sm_90"]["verdict"] == "known bad"
    assert told["sm_100"]["path"] != str(stand_in)


def test_the_table_of_info_has_the_defects_of_a_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    told = info.collect()
    gpu = {"name": "H100", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 80 << 30}
    told |= {"gpus": [gpu], "gpu": {"cuda": "13.0", "driver": "580"}, "ptxas": [describe(90)]}
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(info.render(told))
    text = console.export_text()
    assert "ptxas" in text
    for defect in told["ptxas"][0]["defects"]:
        assert defect["source"] in text
    assert info._architectures([gpu, gpu | {"capability": "10.0"}]) == [90, 100]


def test_gpu_check_warns_of_a_bad_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Machine(CudaMachine):
        def __init__(self) -> None: ...
        def describe(self) -> dict[str, str]:
            return {"name": "H100", "ptxas": line(describe(90))}

    monkeypatch.setattr(check, "CudaMachine", Machine)
    monkeypatch.setattr(check, "check", lambda *_: 0)
    monkeypatch.setattr(assemblers, "version_of", lambda path: "12.9.86")
    assert check.main(None, None, quick=True) == 0
    assert "warning: ptxas 12.9.86 for sm_90" in capsys.readouterr().err
    monkeypatch.setattr(assemblers, "version_of", lambda path: "13.3.33")
    assert check.main(None, None, quick=True) == 0
    assert "warning" not in capsys.readouterr().err
