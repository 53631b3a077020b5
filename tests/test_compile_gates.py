"""The gates of `cast-kernels compile`: each fails for its reason, an exception allows what it says and no more."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ptx_emulator.predict.resources import Resources
from ptx_emulator.targets import target
from ptx_emulator.triton.driver import Launch, Recorder, offline_driver
from rich.console import Console
from triton_kernels import product, scale

from cast_kernels.evidence import compile as compiling
from cast_kernels.evidence.cases import DTYPES, Case
from cast_kernels.evidence.compile import dots_elsewhere, read, render, tensor_core_dots
from cast_kernels.evidence.experts import ExpertCase
from cast_kernels.evidence.gates import EXCEPTIONS, Allowance, Row, judge, loose, unused
from cast_kernels.evidence.rows import keep
from cast_kernels.triton import tiles


def launched(name: str, kind: torch.dtype = torch.bfloat16, **options: int) -> Launch:
    """The small product kernel, [256, 512] @ [512, 256]."""
    a, b = torch.zeros(256, 512, dtype=kind), torch.zeros(512, 256, dtype=kind)
    with offline_driver(target(name), Recorder()) as recorder:
        product(a, b, **options)
    (record,) = recorder.records.values()
    return record.first


def compiled(name: str, kind: torch.dtype = torch.bfloat16, **options: int) -> Row:
    """Its row."""
    return read(launched(name, kind, **options), "bf16", ["a case"])


def allowed(loop_spills: int = 0, tensor_core: str = "") -> Allowance:
    return Allowance("measured nowhere yet", loop_spills, tensor_core)


KEY = ("sm_80", "product_kernel", 16, False)


@pytest.fixture(scope="module")
def good() -> Row:
    return compiled("sm_80", warps=8)


@pytest.fixture(scope="module")
def spilling() -> Row:
    return compiled("sm_80", bm=256, stages=2)


def test_a_good_kernel_passes(good: Row) -> None:
    assert judge(good, {}) == good
    assert good.tile == "N=256 BM=64 BK=32 STAGES=3 warps=8"
    assert good.dots == 1
    assert good.failures == ()


def test_spills_in_loops_fail(spilling: Row) -> None:
    count = spilling.resources.loop_spills
    assert judge(spilling, {}).failures == (f"{count} spill instructions inside loops",)


def test_an_exception_allows_its_number(spilling: Row) -> None:
    count = spilling.resources.loop_spills
    passed = judge(spilling, {KEY: allowed(count)})
    assert passed.failures == ()
    assert passed.allowed == f"{count} spill instructions inside loops, {count} allowed: measured nowhere yet"
    failed = judge(spilling, {KEY: allowed(count - 1)})
    assert failed.failures == (f"{count} spill instructions inside loops; the exception allows {count - 1}",)
    assert failed.allowed == ""
    for key in (("sm_90", *KEY[1:]), (KEY[0], "other", *KEY[2:]), (*KEY[:2], 32, False), (*KEY[:3], True)):
        assert judge(spilling, {key: allowed(count)}).failures


@pytest.mark.parametrize(("d", "wide"), [(64, False), (384, False), (385, True), (768, True)])
def test_a_bottleneck_above_384_has_exceptions_of_its_own(d: int, wide: bool) -> None:
    launch = launched("sm_80", warps=8)
    assert read(replace(launch, constexprs={**launch.constexprs, "D": d}), "bf16", []).wide is wide


def test_spills_outside_of_loops_pass(good: Row) -> None:
    outside = replace(good, resources=replace(good.resources, spills=40))
    assert judge(outside, {}).failures == ()


def test_shared_memory_over_the_limit_fails_whatever_is_allowed() -> None:
    row = compiled("sm_80", bk=128, stages=4)
    assert row.resources.ctas == 0
    (failure,) = judge(row, {KEY: allowed(10**6, "HMMA")}).failures
    assert failure == f"{row.resources.shared_bytes} bytes of shared memory; sm_80 allows 166912"


def test_a_product_off_the_tensor_core_fails() -> None:
    row = compiled("sm_90", bm=32)
    assert judge(row, {}).failures == ("HMMA instead of wgmma",)
    key = ("sm_90", *KEY[1:])
    assert judge(row, {key: allowed(tensor_core="HMMA")}).allowed == "HMMA instead of wgmma: measured nowhere yet"
    assert judge(row, {key: allowed(tensor_core="HGMMA")}).failures
    none = replace(row, resources=replace(row.resources, tensor_core="", tensor_core_count=0))
    assert judge(none, {}).failures == ("no tensor-core instruction instead of wgmma",)


@pytest.mark.parametrize(
    ("name", "found", "allows", "failure", "needed"),
    [
        ("sm_90", "HGMMA+HMMA", "", "HMMA as well as wgmma", ""),
        ("sm_90", "HGMMA+HMMA", "HMMA", "", "HMMA as well as wgmma"),
        ("sm_90", "HGMMA+HMMA", "UTCHMMA", "HMMA as well as wgmma", ""),
        ("sm_90", "HGMMA", "HMMA", "", ""),
        ("sm_90", "", "HMMA", "no tensor-core instruction instead of wgmma", ""),
        ("sm_100", "HMMA+UTCHMMA", "", "HMMA as well as tcgen05", ""),
        ("sm_100", "UTCHMMA+UTCQMMA", "", "", ""),
        ("sm_100", "HGMMA+HMMA", "HMMA", "HGMMA+HMMA instead of tcgen05", ""),
        ("gfx942", "v_mfma_f32_16x16x16_bf16+v_mfma_f32_32x32x8_bf16", "", "", ""),
    ],
)
def test_every_kind_of_product_must_be_the_architectures_own(
    name: str, found: str, allows: str, failure: str, needed: str, good: Row
) -> None:
    """One product of several that fell back to mma.sync hides behind another's opcode otherwise."""
    row = replace(good, target=name, resources=replace(good.resources, tensor_core=found, shared_bytes=0))
    judged = judge(row, {(name, *KEY[1:]): allowed(tensor_core=allows)})
    assert judged.failures == ((failure,) if failure else ())
    assert judged.allowed == (f"{needed}: measured nowhere yet" if needed else "")


def test_the_committed_rows_pass() -> None:
    """What was compiled last, by today's gates and exceptions."""
    told = json.loads((Path(__file__).parent.parent / "benchmarks/evidence/compile.json").read_text())
    rows = [Row(**row | {"resources": Resources(**row["resources"]), "failures": ()}) for row in told]
    assert {row.target for row in rows} >= {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert [(row.key, row.failures) for row in (judge(row, EXCEPTIONS) for row in rows) if row.failures] == []


def test_a_kernel_without_products_needs_no_tensor_core() -> None:
    with offline_driver(target("sm_90"), Recorder()) as recorder:
        scale(torch.zeros(300), 2.0)
    (record,) = recorder.records.values()
    row = read(record.first, "fp32", ["a case"])
    assert row.dots == 0
    assert judge(row, {}).failures == ()


IR = """
  %1 = tt.dot %a, %b, %c : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32> loc(#loc)
  %2 = tt.dot %a, %b, %c, inputPrecision = tf32x3 : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>
  %3 = tt.dot %a, %b, %c : tensor<64x32xf16> * tensor<32x64xf16> -> tensor<64x64xf32>
"""
LAID_OUT = """
  %1 = tt.dot %a, %b, %c : tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>> * tensor<32x64xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma, kWidth = 2}>> -> tensor<64x64xf32, #mma> loc(#loc)
  %2 = tt.dot %a, %b, %c : tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0, parent = #blocked1}>> * tensor<32x64xbf16, #ttg.dot_op<{opIdx = 1, parent = #blocked1}>> -> tensor<64x64xf32, #blocked1> loc(#loc)
"""  # noqa: E501


def test_which_products_a_tensor_core_can_take() -> None:
    assert tensor_core_dots(IR) == ["f32", "f16"]


def test_a_product_laid_out_for_ordinary_multipliers_is_seen() -> None:
    first, second = LAID_OUT.strip().splitlines()
    assert dots_elsewhere(first) == []
    assert dots_elsewhere(second) == ["a product of bf16 runs on the ordinary multipliers"]


def test_an_exception_that_nothing_needs_is_named(good: Row, spilling: Row) -> None:
    gone = ("sm_80", "gone", 16, False)
    exceptions = {KEY: allowed(10**6)} | dict.fromkeys((gone, ("sm_90", *gone[1:]), (*gone[:3], True)), allowed(1))
    assert unused([judge(spilling, exceptions)], exceptions) == [gone]
    assert unused([judge(good, exceptions)], exceptions) == [KEY, gone]


def spilled(row: Row, **loop_spills: int) -> list[Row]:
    """A row of a dtype each, with so many spill instructions inside loops."""
    changed = [(dtype, replace(row.resources, loop_spills=count)) for dtype, count in loop_spills.items()]
    return [replace(row, dtype=dtype, resources=found) for dtype, found in changed]


@pytest.mark.parametrize(
    ("rows", "largest"),
    [
        ({"bf16": 3, "fp16": 8}, 8),
        ({"bf16": 8, "fp16": 0}, 8),
        ({"bf16": 3, "fp16": 50}, None),  # all of it is needed
        ({"bf16": 3, "fp16": 51}, None),  # fails
        ({"bf16": 0, "fp16": 0}, None),  # not needed at all: `unused` says so
        ({"bf16": 8}, None),  # the other may need more
        ({"fp16": 8, "fp32": 8}, None),
    ],
)
def test_an_exception_that_allows_more_than_was_found_is_named(
    rows: dict[str, int], largest: int | None, good: Row
) -> None:
    exceptions = {KEY: allowed(50), (*KEY[:3], True): allowed(50), ("sm_90", *KEY[1:]): allowed(50)}
    judged = [judge(row, exceptions) for row in spilled(good, **rows)]
    assert loose(judged, exceptions) == ([(KEY, largest)] if largest else [])


def test_one_dtype_of_32_bits_tells_enough(good: Row) -> None:
    exceptions = {(*KEY[:2], 32, False): allowed(50)}
    judged = [judge(row, exceptions) for row in spilled(good, fp32=8)]
    assert loose(judged, exceptions) == [((*KEY[:2], 32, False), 8)]


def test_the_table_shows_every_kernel(good: Row, spilling: Row) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render([judge(good, {}), judge(spilling, {})]))
    lines = [line for line in console.export_text().splitlines() if "product_kernel" in line]
    assert ["FAIL" in line for line in lines] == [False, True]
    assert "32 HMMA" in lines[0]


@pytest.mark.parametrize("fails", [False, True])
def test_the_exit_code_and_the_json(
    fails: bool, good: Row, spilling: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The processes are left out: rows come from here."""
    rows = [good, spilling] if fails else [good]
    stand_in(rows, monkeypatch)
    file = tmp_path / "kernels.json"
    assert compiling.main(["sm_80"], ["bf16"], "paper", file, exceptions={}) == int(fails)
    told = json.loads(file.read_text())
    assert [row["resources"]["tensor_core"] for row in told] == ["HMMA"] * len(rows)
    out = capsys.readouterr().out
    assert f"{len(rows)} compiled kernels, {int(fails)} fail a gate" in out
    assert ("FAIL  sm_80 product_kernel" in out) == fails


def test_a_file_keeps_the_rows_of_other_targets_and_dtypes(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    for name, dtype, kernel in (
        ("sm_90", "bf16", "old"), ("sm_80", "amp", "other"), ("gfx942", "bf16", "last"), ("sm_90", "bf16", "new"),
    ):  # fmt: skip
        keep([{"target": name, "dtype": dtype, "kernel": kernel}], file)
    assert [row["kernel"] for row in json.loads(file.read_text())] == ["other", "new", "last"]
    assert len(file.read_text().splitlines()) == 3 + 2, "a row a line"


def test_only_the_run_of_everything_knows_the_largest_number(
    good: Row, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(spilled(good, bf16=3, fp16=8), monkeypatch)
    line = "loose: the exception for sm_80 product_kernel, 16 bits allows 50, the largest found is 8"
    for problems in ("step", "paper", "all"):
        assert compiling.main(["sm_80"], ["bf16"], problems, exceptions={KEY: allowed(50)}) == 0
        assert (line in capsys.readouterr().out.splitlines()) == (problems == "all")


def stand_in(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one process compile these rows."""

    class Pool:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def map(self, *_: object) -> list[list[Row]]:
            return [rows]

    monkeypatch.setattr(compiling, "ProcessPoolExecutor", Pool)


def test_dtypes_have_a_kernel_each() -> None:
    assert {str(dtype) for dtype in DTYPES.values()} == {"torch.bfloat16", "torch.float16", "torch.float32"}


def test_what_the_product_launches_is_compiled(tmp_path: Path) -> None:
    """A kernel that two cases launch is one row: drop-path makes another `exchange`, the same `project`."""
    small = Case(2, 3, 7, 64, 32, 2, backward=False)
    rows = compiling.compile_target("sm_80", "bf16", [small, replace(small, scaled=True)], tmp_path)
    assert {row.key for row in rows} == {("sm_80", "project", 16, False), ("sm_80", "exchange", 16, False)}
    assert all(row.resources.tensor_core == "HMMA" and row.dots for row in rows)
    assert sorted((row.kernel, len(row.cases)) for row in rows) == [("exchange", 1)] * 2 + [("project", 2)]


@pytest.mark.parametrize(("name", "dtype", "opcode"), [("sm_80", "bf16", "HMMA"), ("gfx942", "fp32", "v_mfma")])
def test_what_an_expert_launches_is_compiled(name: str, dtype: str, opcode: str, tmp_path: Path) -> None:
    """AMD has no tf32x3: float32 goes to the matrix cores as it is."""
    case = ExpertCase(rows=20, dim=32, hidden=48, adapter=16)
    rows = compiling.compile_target(name, dtype, [case], tmp_path)
    assert {row.kernel for row in rows} >= {"norm", "norm_backward", "adapter_forward", "adapter_backward"}
    assert all(row.resources.tensor_core.startswith(opcode) for row in rows if row.kernel.startswith("adapter"))
    assert {row.cases for row in rows} == {(str(case),)}


@pytest.mark.parametrize("rows", [1, 1 << 20])
@pytest.mark.parametrize("width", [384, 768])
@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_stages_of_a_float32_stream_fit_in_shared_memory(name: str, width: int, rows: int) -> None:
    """Under autocast `project` holds a step of its rows in float32 beside 16-bit weights."""
    tile = tiles.find(name, "project_wide", 16, width, rows)
    assert tile.stages * tile.k * (tile.rows * 4 + width * 2) <= target(name).shared_limit


@pytest.mark.parametrize(
    ("name", "kind", "batch"), [("sm_90", "amp", 6), ("sm_90", "amp16", 6), ("sm_90", "amp", 1), ("sm_80", "amp", 6)]
)
def test_what_training_launches_under_autocast_passes_the_gates(
    name: str, kind: str, batch: int, tmp_path: Path
) -> None:
    """B-CAST's forward at the published size, whose float32 streams were once over the limit of shared memory, and
    spilled inside loops with one clip and on sm_80. `.ci/run` compiles the whole step."""
    rows = compiling.compile_target(name, kind, [Case(batch=batch, backward=False)], tmp_path)
    judged = [judge(row, EXCEPTIONS) for row in rows]
    assert {row.kernel for row in judged} >= {"project", "exchange"}
    assert [row.failures for row in judged if row.failures] == []


@pytest.mark.parametrize("width", [384, 768])
@pytest.mark.parametrize("rows", [1, 100_000])
def test_float32_rows_are_rounded_without_stages_on_sm_90(width: int, rows: int) -> None:
    """With more, ptxas before 13.3 reuses registers of a wgmma that is under way: docs/ptxas.md."""
    assert tiles.find("sm_90", "project_wide", 16, width, rows).stages == 1
