"""Faults planted mechanically in the CUDA kernels' launches; `ptx_mutants.py --cuda` keeps what became of them."""

from __future__ import annotations

import random

import ptx_mutants
import pytest
from cuda_cases import needs_kernels
from cuda_subjects import CUDA_SUBJECTS
from mutant_reasons import proof
from ptx_emulator.mutants import Verdict, judge, mutants
from ptx_mutants import CAUGHT, CUDA, EQUIVALENT, MISSED, UNREACHED, Row, row_of

SHARE = 0.95  # of the faults that change something, at least, is seen


def share(rows: list[Row]) -> float:
    """Of the faults that may change something: how many are seen."""
    caught, missed = (sum(row[5] in ends for row in rows) for ends in (CAUGHT, (MISSED,)))
    return caught / (caught + missed)


def test_the_kept_rows() -> None:
    """Of every kernel, each with an end that is known, and enough of them seen; the table is made of them."""
    kept = CUDA.read()
    assert list(kept["made"]) == list(CUDA_SUBJECTS)
    assert {row[0] for row in kept["mutants"]} == set(CUDA_SUBJECTS)
    assert {row[5] for row in kept["mutants"]} <= {*CAUGHT, EQUIVALENT, MISSED, UNREACHED}
    assert share(kept["mutants"]) >= SHARE
    assert CUDA.table.read_text() == CUDA.made_table(kept)


@needs_kernels
def test_a_sample_of_faults_is_seen() -> None:
    """Of `exchange`, drawn by a seed; each is seen or explained, and ends as the kept rows say if they are of it."""
    subject, kept = CUDA_SUBJECTS["exchange, cuda"](), CUDA.read()
    planted = mutants(subject.record)
    sample = [planted[number] for number in random.Random(7).sample(range(len(planted)), 6)]
    rows = [row_of(subject, judge(subject, one, subject.right(), proof)) for one in sample]
    assert [row for row in rows if row[5] == MISSED] == []
    made = kept["made"][subject.name]
    if (made["ptx"], made["planted"]) == (ptx_mutants.digest(subject), len(planted)):
        known = {tuple(row[:5]): row for row in kept["mutants"]}
        assert [known.get(tuple(row[:5]), row) for row in rows] == rows


@needs_kernels
def test_rows_that_are_known_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for fewer faults, or one that is stopped, loses no row of a run before."""
    subject = CUDA_SUBJECTS["prepare, cuda"]()
    monkeypatch.setattr(ptx_mutants, "judge", lambda subject, mutant, right, proof: Verdict(mutant, "finding", "new"))
    known = [[*row[:6], "known", ""] for row in ptx_mutants.judged(subject)]
    assert len(known) > 4
    rows = ptx_mutants.judged(subject, 2, known[1:])
    assert [row[6] for row in rows].count("known") == len(known) - 1
    assert len(rows) <= len(known)
    assert [row for row in known[1:] if row not in rows] == []


@needs_kernels
@pytest.mark.heavy
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", CUDA_SUBJECTS)
def test_every_fault(name: str) -> None:
    """None is missed, whatever the kernels are by now, and all end as the kept rows say if these are of them."""
    subject, kept = CUDA_SUBJECTS[name](), CUDA.read()
    rows = ptx_mutants.judged(subject)
    assert share(rows) >= SHARE
    if kept["made"][name]["ptx"] == ptx_mutants.digest(subject):
        known = [row for row in kept["mutants"] if row[0] == name]
        assert [row for row in known if row not in rows] == []
