"""The search for tiles: what it tries, takes and refuses, and that what it writes can be read."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from fake_machine import FakeMachine
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Recorder, offline_driver

from cast_kernels.gpu import tune
from cast_kernels.gpu.machine import UnusableError
from cast_kernels.gpu.tune import RefusedError, as_python, measured, neighbours, search
from cast_kernels.triton import tiles
from cast_kernels.triton.tiles import Tile, TileSet

START = TileSet(
    "somewhere",
    row=Tile(rows=32, k=32, columns=64, warps=4, stages=2, queries=32, keys=32),
    weight_gradient=Tile(rows=64, k=32, columns=64, warps=4, stages=2),
    attention_backward=Tile(rows=32, k=32, columns=64, warps=4, stages=2),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def steps_from(tile: Tile, goal: Tile) -> int:
    """Fields that are not as in the goal, each as often as it must be doubled or stepped."""
    return sum(getattr(tile, name) != getattr(goal, name) for name in ("rows", "k", "warps", "stages"))


def test_the_search_finds_the_fastest_set() -> None:
    goal = replace(START.row, rows=128, k=64, warps=8, stages=4)

    def time(candidate: TileSet) -> float:
        row, wide = candidate.row, candidate.weight_gradient
        distance = abs(row.rows - 128) / 32 + abs(row.k - 64) / 32 + abs(row.warps - 8) / 4 + abs(row.stages - 4)
        return 10 + distance + abs(wide.columns - 128) / 64

    best, ms, trials = search(START, time)
    assert steps_from(best.row, goal) == 0
    assert best.weight_gradient.columns == 128
    assert best.attention_backward == START.attention_backward
    assert ms == 10
    assert len(trials) == len({(trial.part, trial.tile) for trial in trials})


def test_what_is_refused_is_never_taken() -> None:
    def time(candidate: TileSet) -> float:
        if candidate.row.warps == 8:
            raise RefusedError("wrong: spatial")
        return 10 / candidate.row.warps

    best, _, trials = search(START, time)
    assert best == START
    assert {trial.reason for trial in trials if trial.ms is None} == {"wrong: spatial"}


def test_tiles_whose_recompute_levels_would_differ_are_refused() -> None:
    """h is added up by `exchange` in forward, by its backward where it is computed again: in the same steps."""
    other = replace(START.row, k=64)
    for changes in ({"exchange": other}, {"exchange_backward": other}, {"few": {"exchange": other}}):
        with pytest.raises(ValueError, match=r"steps k are .*: 64.*must be equal"):
            replace(START, **changes)


@pytest.mark.parametrize("shared", [True, False])
def test_steps_that_must_be_equal_change_together(shared: bool) -> None:
    """As sm_80's entry, in which `exchange_backward` is the rows', or as one in which no kernel shares a tile."""
    few = {"project": START.row, "exchange": START.row}
    forward = dict.fromkeys(("exchange", "exchange_short"), replace(START.row, warps=8))
    own = replace(START, **forward, few=few, exchange_backward=None if shared else replace(START.row, stages=3))

    def time(candidate: TileSet) -> float:
        together = [candidate.exchange, candidate.exchange_short, candidate.of("exchange_backward")]
        assert len({tile.k for tile in [*together, candidate.few["exchange"]] if tile}) == 1
        return 1.0 if candidate.of("exchange").k == 64 and candidate.row.k == 32 else 10.0

    best, _, trials = search(own, time)
    assert best.exchange == best.exchange_short == replace(START.row, warps=8, k=64)
    assert best.exchange_backward == replace(START.row, stages=2 if shared else 3, k=64)
    assert best.few == {"project": START.row, "exchange": replace(START.row, k=64)}
    assert best.row == START.row
    assert not any(trial.reason for trial in trials)
    rows = [trial for trial in trials if trial.part == "row" and trial.tile.k == 64]
    assert rows  # and their step took those with tiles of their own along, or it would have been refused


def test_the_rows_step_takes_along_what_must_be_equal() -> None:
    own = replace(START, exchange=replace(START.row, warps=8))
    best, _, _ = search(own, lambda candidate: 1.0 if candidate.row.k == 64 else 10.0)
    assert (best.row.k, best.exchange) == (64, replace(START.row, warps=8, k=64))
    assert best.exchange_short is best.exchange_backward is None


@pytest.mark.parametrize(("arch", "bits", "d"), [("sm_80", 16, 384), ("sm_90", 16, 384), ("sm_80", 32, 384)])
def test_every_step_of_the_tables_own_entries_is_tried(arch: str, bits: int, d: int) -> None:
    _, _, trials = search(tiles.find_set(arch, bits, d), lambda candidate: 1.0)
    assert [trial for trial in trials if trial.ms is None] == []
    entry = tiles.find_set(arch, bits, d)
    for part in ("row", "exchange"):
        k = entry.of(part).k
        assert {trial.tile.k for trial in trials if trial.part == part} >= {k // 2, 2 * k} - {8}


def test_what_is_not_tuned_is_known() -> None:
    """Each kernel's tile, and each field of one, is tuned or named in an entry's source."""
    assert {*tune.PARTS, *tune.NOT_TUNED} - {"programs"} == {f.name for f in fields(TileSet)} - {"source", "few_rows"}
    read = {name for names in tune.PARTS.values() for name in names}
    assert read | {"programs"} == {f.name for f in fields(Tile)}
    assert not read & set(tune.NOT_TUNED)


def test_an_entry_names_what_was_not_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "measured", lambda *_: lambda candidate: 5.0)
    assert tune.tune(FakeMachine(), "sm_90", tmp_path / "entries") == 0
    names = {"TileSet": TileSet, "Tile": Tile}
    text = (tmp_path / "entries").read_text()
    entries = eval(f"{{{text}}}", names)
    assert max(len(line) for line in text.splitlines() if "Tile(" not in line) <= 120  # no formatter breaks a text
    assert len(entries) == len(tune.PROBLEMS)
    for entry in entries.values():
        assert entry.source.startswith("measured on NVIDIA H100 80GB HBM3: 5.000 ms")
        named = "adapter_forward, adapter_backward, attention_backward_wide, project_wide, few, programs"
        assert entry.source.endswith(f"; not tuned: {named}")


def test_a_gain_within_the_noise_is_none() -> None:
    best, _, _ = search(START, lambda candidate: 10.0 if candidate == START else 9.95)
    assert best == START


def test_a_table_that_cannot_be_used_is_an_error() -> None:
    def time(candidate: TileSet) -> float:
        raise RefusedError("wrong: temporal")

    with pytest.raises(RefusedError, match="temporal"):
        search(START, time)


def test_kernels_without_a_tile_of_their_own_begin_with_the_rows() -> None:
    best, _, _ = search(START, lambda candidate: 5.0 if candidate.project_backward else 10.0)
    assert best.project_backward in set(neighbours("project_backward", START.row))
    assert best.exchange_backward is None


@pytest.mark.parametrize("part", tune.PARTS)
def test_neighbours_differ_in_one_field_that_the_kernels_read(part: str) -> None:
    found = list(neighbours(part, START.row))
    for tile in found:
        changed = [name for name in tune._VALUES if getattr(tile, name) != getattr(START.row, name)]
        assert len(changed) == 1
        assert changed[0] in tune.PARTS[part]
    assert len(found) == len(set(found))
    queries = {"row": {16, 32}, "exchange": {16, 32}, "exchange_short": {16, 32}}
    queries |= {kernel: {16, 32, 64} for kernel in ("attention_backward", "attention_backward_short")}
    assert {tile.queries for tile in found} == queries.get(part, {32})


def test_a_program_holds_whole_tiles_of_queries() -> None:
    assert {tile.rows for tile in neighbours("row", START.row)} == {32, 64}  # 16 rows would be half of 32 queries


def test_an_entry_reads_back() -> None:
    text = as_python("sm_90", 16, 384, START)
    assert eval(f"{{{text}}}", {"TileSet": TileSet, "Tile": Tile}) == {("sm_90", 16, False): START}
    own = replace(START, adapter_backward=replace(START.row, warps=8))  # not tuned, and kept
    assert eval(f"{{{as_python('sm_90', 16, 384, own)}}}", {"TileSet": TileSet, "Tile": Tile}).popitem()[1] == own
    few = replace(START, few_rows=100, few={"project": START.row})
    text = as_python("sm_90", 16, 384, few)
    assert eval(f"{{{text}}}", {"TileSet": TileSet, "Tile": Tile}) == {("sm_90", 16, False): few}
    assert as_python("sm_90", 32, 768, START).startswith('    ("sm_90", 32, True)')


def test_tiles_are_tried_and_put_back() -> None:
    before = {key: tiles.find_set(*key) for key in (("sm_90", 16, 384), ("sm_89", 16, 384), ("sm_90", 16, 768))}
    for arch in ("sm_90", "sm_89"):  # the second has no entry of its own
        with tiles.trying(arch, 16, 384, START):
            assert tiles.find_set(arch, 16, 384) is START
            assert tiles.find_set(arch, 16, 768) is not START
    with pytest.raises(ZeroDivisionError), tiles.trying("sm_90", 16, 384, START):
        raise ZeroDivisionError
    assert {key: tiles.find_set(*key) for key in before} == before


@pytest.mark.parametrize("arch", ["sm_89", "sm_120", "sm_121"])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("d", [384, 768])
def test_architectures_with_the_shared_memory_of_sm_86_take_its_tiles(arch: str, bits: int, d: int) -> None:
    """Not the nearest older one's: sm_100's take 172080 bytes, compute capability 12 allows 101376."""
    assert tiles.find_set(arch, bits, d) is tiles.find_set("sm_86", bits, d)
    with tiles.trying(arch, bits, d, START):
        assert tiles.find_set(arch, bits, d) is START
        assert tiles.find_set("sm_86", bits, d) is not START  # an entry of its own, as `tune` writes one


def test_other_architectures_take_the_nearest_older_ones_tiles() -> None:
    for arch, older in {"sm_87": "sm_86", "sm_103": "sm_100", "sm_110": "sm_100"}.items():
        assert tiles.find_set(arch, 16, 384) is tiles.find_set(older, 16, 384)
    assert tiles.find_set("gfx950", 16, 384) is tiles.find_set("interpreter", 16, 384)


def test_few_rows_have_tiles_of_their_own() -> None:
    few = Tile(rows=16, k=32, columns=64, warps=4, stages=2)
    with tiles.trying("sm_90", 16, 384, replace(START, few_rows=100, few={"project": few})):
        assert tiles.find("sm_90", "project", 16, 384, rows=100) == few
        assert tiles.find("sm_90", "exchange", 16, 384, rows=100) == START.row
        assert tiles.find("sm_90", "project", 16, 384, rows=101) == tiles.find("sm_90", "project", 16, 384) == START.row
        assert tiles.find("sm_90", "project_wide", 16, 384, rows=100) == few
    wide = replace(few, k=16)
    with tiles.trying("sm_90", 16, 384, replace(START, few_rows=100, few={"project": few, "project_wide": wide})):
        assert tiles.find("sm_90", "project_wide", 16, 384, rows=100) == wide
        assert tiles.find("sm_90", "project", 16, 384, rows=100) == few


def test_candidates_are_checked_themselves(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where correctness is checked rows are few: a tile for few rows would be checked in the candidate's place."""
    small, seen = tune.Case(1, 2, 3, 32, 16, 1), []
    time = measured(FakeMachine(), torch.bfloat16, small, "sm_80")
    monkeypatch.setattr(tune, "run", lambda *_, **__: seen.append(tiles.find("sm_80", "project", 16, 16, rows=1)) or {})
    monkeypatch.setattr(tune, "compare", lambda *_: [])
    monkeypatch.setattr(tune, "training_step", lambda *_, **__: Stop.here())
    with pytest.raises(Stop):
        time(replace(START, few_rows=100, few={"project": replace(START.row, rows=16)}))
    assert seen == [START.row]


class Stop(Exception):
    """The timing would begin."""

    @staticmethod
    def here() -> None:
        raise Stop


def test_kernels_that_compute_nothing_are_refused(cache: Path) -> None:
    """The recorder runs nothing, so every output is poison: no time may come of it."""
    small = tune.Case(1, 2, 3, 32, 16, 1)
    time = measured(FakeMachine(), torch.bfloat16, small, "sm_80")
    with offline_driver(target("sm_80"), Recorder(), cache), pytest.raises(RefusedError, match="wrong: spatial"):
        time(START)


def test_tiles_over_the_limit_are_refused(cache: Path) -> None:
    small = tune.Case(1, 2, 3, 32, 16, 1)

    class Enforcing(Recorder):
        enforces_limits = True

    time = measured(FakeMachine(), torch.bfloat16, small, "sm_80")
    huge = replace(START, weight_gradient=Tile(rows=256, k=128, columns=256, warps=8, stages=5))
    with offline_driver(target("sm_80"), Enforcing(), cache), pytest.raises(RefusedError, match="OutOfResources"):
        time(huge)


def test_a_fault_is_no_refused_tile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After one CUDA repeats its error at every call, right tiles or wrong: nothing that follows is known."""

    class Dead(FakeMachine):
        def synchronise(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    tried = []

    def running(case: tune.Case, backend: str | None, *_: object, **__: object) -> dict[str, torch.Tensor]:
        if backend == "triton":
            tried.append(case)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {}

    monkeypatch.setattr(tune, "run", running)
    with pytest.raises(UnusableError, match="illegal memory access"):
        measured(Dead(), torch.bfloat16, tune.Case(1, 2, 3, 32, 16, 1), "sm_80")(START)
    assert tune.tune(Dead(), "sm_80", None) == 1
    assert len(tried) == 2  # the second of the problems was not begun
    assert "a kernel faulted: the GPU can be used no more" in capsys.readouterr().out
