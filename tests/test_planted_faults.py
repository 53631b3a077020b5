"""`cast-kernels emulate --mutants`: faults planted in the product's kernels, and the file that says what saw them."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import engines
import pytest
from ptx_emulator.targets import EMULATED, target

from cast_kernels.evidence import mutant_table
from cast_kernels.evidence import mutants as planting
from cast_kernels.evidence.mutant_table import Row
from cast_kernels.evidence.problems import ENGINES, PLANTED
from cast_kernels.triton import tiles

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks/evidence/mutants.json"
ENGINE = ENGINES[1] if engines.built() else ENGINES[0]
DTYPES = ("bf16", "fp16", "fp32")
#: Kind -> for which reasons nothing may see that it is gone.
REASONS = {
    "barrier": {"separates nothing"},
    "wait": {"nothing in flight"},
    "proxy fence": {"nothing to fence"},
    "mask of a load": {"guard never false", "reads inside, uses nothing"},
    "mask of a copy": {"guard never false", "reads inside, uses nothing"},
    "mask of a store": {"guard never false", "stores what another lane stores"},
}


def kept(name: str, dtype: str, problem: str | None = None) -> list[Row]:
    """The file's rows of a target, a dtype and, if it is given, a problem."""
    rows = mutant_table.read(RESULTS)["mutants"]
    return [row for row in rows if row[:2] == [name, dtype] and problem in (None, row[2])]


def check(rows: list[Row]) -> None:
    """Nothing is missed: what is not seen has a reason of its own kind."""
    assert mutant_table.missed(rows) == []
    assert [row for row in rows if not row[8] and row[7] not in REASONS[row[4]]] == []


def made_of(name: str, dtype: str, problem: str) -> dict[str, Any]:
    """How the rows of a problem came about; another Triton makes other PTX, and so other rows."""
    made: dict[str, Any] = mutant_table.read(RESULTS)["made"][f"{name}, {dtype}, {problem}"]
    return made


def settled(rows: list[Row]) -> list[Row]:
    """The rows without what a process decides: whether an access outside of its buffer meets another or nothing.

    Buffers lie in the order of their addresses in the process. In either case the verdict is one of two.
    """
    either = dict.fromkeys(("mask of a load", "mask of a copy"), ("MemoryFault", "reads inside, uses nothing"))
    either["mask of a store"] = ("MemoryFault", "values")
    return [[*row[:7], either[row[4]], None] if row[7] in either.get(row[4], ()) else row for row in rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EMULATED)
def test_no_fault_of_the_file_is_missed(name: str, dtype: str) -> None:
    rows = kept(name, dtype)
    check(rows)
    assert all(made_of(name, dtype, problem)["every"] >= 1 for problem in PLANTED)
    few = tiles.find_set(name, 32 if dtype == "fp32" else 16, 112).few_rows
    assert {row[2] for row in rows} >= PLANTED.keys() - (set() if few else {"many rows"})
    assert {row[4] for row in rows} == REASONS.keys() - ({"proxy fence"} if name == "sm_80" else set())


@pytest.mark.parametrize(("name", "problem"), [("sm_80", "adapter"), ("sm_90", "many rows")])
def test_a_sample_is_what_the_file_says(name: str, problem: str) -> None:
    """Of one problem alone; kernels that an earlier one launches too are mutated on that one's memory in the file."""
    goal, made = target(name), made_of(name, "bf16", problem)
    every = 12 if 12 % made["every"] == 0 else made["every"]  # so the file has all of these
    judged = planting.judge(goal, "bf16", every, ENGINE, {problem: PLANTED[problem]})
    rows = mutant_table.rows_of(goal, "bf16", judged)
    check(rows)
    told = kept(name, "bf16", problem)
    rows = [row for row in rows if row[3] in {row[3] for row in told}]
    assert len(rows) > 10
    if made["triton"] == version("triton"):
        assert [row for row in settled(rows) if row not in settled(told)] == []


@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", EMULATED)
def test_faults_planted_in_the_kernels_are_caught(name: str) -> None:
    """All of them in bfloat16; each is what the file says, so the counts by kernel and kind are where it has all."""
    for problem, verdicts in planting.judge(target(name), "bf16", engine=ENGINE):
        rows, told = mutant_table.rows_of(target(name), "bf16", [(problem, verdicts)]), kept(name, "bf16", problem)
        check(rows)
        made = made_of(name, "bf16", problem)
        if made["triton"] == version("triton"):
            assert [row for row in settled(told) if row not in settled(rows)] == []
            assert made["every"] > 1 or settled(rows) == settled(told)


def test_a_kernel_is_mutated_in_the_first_problem_that_launches_it() -> None:
    twice = {"one": PLANTED["adapter"], "again": PLANTED["adapter"]}
    found = planting.captured(target("sm_80"), "bf16", problems=twice)
    assert {capture.launch.kernel for capture in found["one"]} >= {"adapter_forward", "adapter_backward"}
    assert found["again"] == []
    (again,) = planting.judge(target("sm_80"), "bf16", problems=twice, only=["again"])
    assert again == ("again", []), "the other problem is launched too"


def row(caught: bool, why: str, problem: str = "exchange", goal: str = "sm_80", kind: str = "barrier") -> Row:
    return [goal, "bf16", problem, "project", kind, 7, "bar.sync 0;", why, caught]


def test_what_has_no_checked_reason_is_missed() -> None:
    rows = [row(True, "write-read"), row(False, "separates nothing"), row(False, "changes values by 1.0e-04 only")]
    assert mutant_table.missed(rows) == rows[2:]
    assert mutant_table.counted(rows, (3, 4)) == [
        ["project", "barrier", "3", "1", "write-read 1", "separates nothing 1, changes values by 1.0e-04 only 1"]
    ]


def test_a_file_keeps_the_rows_of_other_targets(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for rows in ([row(True, "write-read", goal="sm_90")], [row(True, "values")], [row(False, "separates nothing")]):
        mutant_table.keep(file, target(rows[0][0]), "bf16", "exchange", rows, {"every": 1})
    told = mutant_table.read(file)
    assert [(one[0], one[7]) for one in told["mutants"]] == [("sm_80", "separates nothing"), ("sm_90", "write-read")]
    assert told["made"] == {"sm_80, bf16, exchange": {"every": 1}, "sm_90, bf16, exchange": {"every": 1}}


@pytest.mark.parametrize("why", ["separates nothing", "unknown"])
def test_the_command_fails_for_a_missed_one(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mutant = planting.Mutant("project", "barrier", 7, "bar.sync 0;", "")
    verdicts = [planting.Verdict(mutant, "write-read", 0.0), planting.Verdict(mutant, "", 0.0, why)]
    monkeypatch.setattr(mutant_table, "judge", lambda *_, **__: iter([("exchange", verdicts), ("adapter", [])]))
    file = tmp_path / "rows.json"
    missed = why == "unknown"
    assert mutant_table.main(["sm_80"], ["bf16"], file, ENGINES[0], 3) == missed
    out = capsys.readouterr().out
    assert f"sm_80 bf16, one of 3: 2 planted, 1 caught, {1 - missed} harmless, {int(missed)} missed" in out
    assert ("missed  exchange, project:7" in out) == missed
    told = mutant_table.read(file)
    assert [one[7:] for one in told["mutants"]] == [["write-read", True], [why, False]]
    assert told["made"].keys() == {"sm_80, bf16, exchange", "sm_80, bf16, adapter"}
