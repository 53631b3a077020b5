"""`pytest benchmarks/ --device cuda` from end to end without a GPU: no row may raise when it first meets one."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_adapter
import bench_bcast
import bench_ffn
import bench_model
import bench_self_attention
import pytest
import rehearsal
import torch
from groups import PAPER, SMALL, Row
from report import Report, RowsError
from session import Session
from test_cuda_training import OF_BOTH
from variants import SDPA, attending, is_ours

import cast_kernels

ROOT = Path(__file__).parent.parent
FILES = (bench_model, bench_bcast, bench_ffn, bench_self_attention, bench_adapter)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these tests are about a machine without a GPU")


def rows(device: str, tier: str) -> list[Row]:
    return [Row(group, name) for file in FILES for group in file.groups(device, PAPER) for name in group.of_tier(tier)]


def environment(*paths: Path) -> dict[str, str]:
    """Without what pytest-xdist tells its workers: pytest-benchmark would take a process of ours for one."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return own | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def benchmarks(*options: str, rehearse: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *(("-p", "rehearsal") if rehearse else ()), "benchmarks/", *options]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", "-q"], cwd=ROOT, capture_output=True, text=True, timeout=3000,
        env=environment(ROOT, ROOT / "tests", ROOT / "tools"),
    )  # fmt: skip


def rehearsed(rows_file: Path, *options: str) -> tuple[dict[str, dict[str, Any]], str]:
    """Rows by "group|name" of a run in which every row must pass, and what the run printed."""
    done = benchmarks(
        "--benchmark-only", "--device", "cuda", "--sizes", "small", "--rows", str(rows_file), "--durations=5", *options
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    groups = json.loads(rows_file.read_text())["groups"]
    return {f"{title}|{name}": row for title, found in groups.items() for name, row in found.items()}, done.stdout


def test_the_whole_command_of_tier_first(tmp_path: Path) -> None:
    found, printed = rehearsed(tmp_path / "rows.json")
    assert len(found) == len(rows("cuda", "first"))
    for name, row in found.items():
        assert row.get("stand_in") == "an emulated device", name
        assert not {"failed", "missing", "no_graph"} & row.keys(), (name, row)
        assert (
            "memory" in name or {"median_ms", "cold_median_ms", "graph_median_ms", "graph_cold_median_ms"} <= row.keys()
        )
        assert row["peak_mib"] == 2
    assert "stand-in: an emulated device or library took the row's place" in printed
    assert not re.search(r"\d \(\d+(\.\d+)?\.\.", printed)  # no median with a spread: nothing was measured
    emulated = re.search(r"of them (\d+) emulated: (.*)", printed)
    assert emulated
    assert {name.partition("_bf16")[0] for name in emulated[2].split(", ")} >= OF_BOTH
    assert re.search(r"auto's order: .*\(triton: an emulated device; cuda: an emulated device\)", printed)
    peers = [row for name, row in found.items() if not is_ours(name.split("|")[1]) and "memory" not in name]
    assert peers
    assert all(row["error"] > 0 for row in peers)  # they were compared with fp64


@pytest.mark.heavy
def test_the_other_dtypes_of_tier_full(tmp_path: Path) -> None:
    found, _ = rehearsed(tmp_path / "rows.json", "--tier", "full", "-k", "B6 and not amp")
    assert len(found) == len([row for row in rows("cuda", "full") if "B6" in str(row) and " amp " not in str(row)])
    assert not [name for name, row in found.items() if {"failed", "missing", "no_graph"} & row.keys()]


def test_tier_first_has_at_most_sixty_rows_of_every_group_and_library() -> None:
    first = rows("cuda", "first")
    assert 40 < len(first) <= 60
    subjects = {row.group.name.split()[0] for row in first}
    assert subjects == {"bcast", "ffn", "self_attention", "adapter", "model"}
    assert {row.group.name for row in first} >= {
        f"model {w} amp B6" for w in ("inference", "training step", "training memory")
    }
    names = " ".join(row.name for row in first)
    for part in ("published code", *SDPA.keys() - {"math"}, "xformers", "flash-attn", "torch.compile", "recompute=all"):
        assert part in names
    order = [row.group.worth for row in sorted(first, key=lambda row: row.group.worth)]
    assert order[0] == next(row for row in first if row.group.name == "model training step amp B6").group.worth


def test_tier_full_has_every_dtype_batch_and_backend() -> None:
    full = rows("cuda", "full")
    for subject in ("bcast", "ffn temporal", "ffn spatial", "self_attention temporal", "adapter temporal"):
        found = {row.group.name for row in full if row.group.name.startswith(subject)}
        wanted = {
            f"{subject} {kind} B{batch} {work}"
            for kind in ("fp32", "amp", "bf16", "fp16")
            for batch in (1, 6, 32)
            for work in ("inference", "training")
        }
        assert found == wanted
    levels = ("", *(f", recompute={level.value}" for level in cast_kernels.Recompute))
    for backend in set(cast_kernels.backends.BACKENDS) - {"eager", "cpu"}:
        mine = {row.name for row in full if row.name.startswith(f"cast_kernels, {backend}")}
        assert mine == {f"cast_kernels, {backend}{level}" for level in levels}
    flash_in_fp32 = [
        row for row in full if " fp32 " in row.group.name and row.name.endswith((" by flash", "flash-attn"))
    ]
    assert flash_in_fp32 == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_rows_are_listed_anywhere(device: str) -> None:
    done = benchmarks("--collect-only", "--device", device, rehearse=False)
    assert done.returncode == 0, done.stdout + done.stderr
    listed = [line for line in done.stdout.splitlines() if "::" in line and "bench_data" not in line]
    tier = "first" if device == "cuda" else "full"
    assert len([line for line in listed if "bench_host" not in line]) == len(rows(device, tier))


@pytest.mark.parametrize(
    ("options", "there"),
    [(["-k", "host"], True), (["benchmarks/bench_host.py"], True), (["-k", "host and not data"], True), ([], False),
     (["-k", "not compile and not host"], False)],
)  # fmt: skip
def test_what_needs_no_gpu_runs_beside_one_where_it_is_named(options: list[str], there: bool) -> None:
    done = benchmarks("--collect-only", "--device", "cuda", *options, rehearse=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("bench_host.py::" in done.stdout) == there


def test_without_a_gpu_the_rows_say_so_and_fail(tmp_path: Path) -> None:
    done = benchmarks("--device", "cuda", "-k", "adapter", "--rows", str(tmp_path / "rows"), rehearse=False)
    assert done.returncode == 1
    assert "no CUDA device can be used" in done.stdout
    assert "--device cpu measures on the processor" in done.stdout


def test_without_the_native_core_its_rows_are_skipped_with_the_reason(tmp_path: Path) -> None:
    """Everything else is measured, without a ceiling."""
    (tmp_path / "coreless.py").write_text(
        "import cast_kernels._native as native\n"
        "native.CORE, native.REASON = None, 'the native core is not built: test'\n"
    )
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "coreless", "benchmarks/", "--benchmark-only", "--sizes", "small", "-q",
         "--rows", str(file), "--device", "cpu", "-k", "ffn and temporal and inference and not compile", "-rs"],
        cwd=ROOT, env=environment(tmp_path, ROOT, ROOT / "tests", ROOT / "tools"), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(file.read_text())
    (found,) = told["groups"].values()
    assert found["eager"]["median_ms"] > 0
    assert "the native core is not built: test" in found["cast_kernels, cpu"]["missing"]
    assert told["ceilings"] == {}


# -- what is kept, and what is begun


def one_row(work: Callable[[Any], Any], name: str = "group") -> Row:
    from groups import Group

    return Row(Group(name, name, ("eager",), work), "eager")


def test_a_kill_loses_nothing_and_a_resumed_run_leaves_out_what_is_known(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    before = Report(file)
    before.begin("ended", ["eager"])
    before.add("done", "eager", {"median_ms": 1.0})
    before.add("killed", "eager", {"failed": "the process ended while this row was built and checked"})
    before.add("late", "eager", {"missing": "not begun: the 8 minutes were over"})
    after = Report(file)
    after.load()
    session, begun = Session("cpu", SMALL, 1.0, after, resume=True), []

    def work(machine: Any) -> Any:
        begun.append(machine)
        raise RuntimeError("begun")

    given = {title: one_row(work, title) for title in ("done", "killed", "ended", "late")}
    session.select(list(given.values()))
    assert session.row(given["done"]) == {"median_ms": 1.0}
    assert "the process ended while" in session.row(given["killed"])["failed"]
    assert "the run ended while" in session.row(given["ended"])["failed"]
    assert begun == []
    assert session.row(given["late"])["failed"] == "RuntimeError: begun"


def test_a_resumed_run_measures_what_was_not_selected_before(tmp_path: Path) -> None:
    """Beside the baseline, whose figures are lost by nothing; what a kill left unmeasured is not begun again."""
    from groups import KINDS, Candidate, Group, Work

    one, built = torch.ones(3, dtype=torch.float64), []

    def builder(name: str) -> Callable[[], Candidate]:
        def build() -> Candidate:
            built.append(name)
            if name == "new":
                told = json.loads(file.read_text())["groups"]["a"]
                assert told["eager"] == {"median_ms": 1.0}
                assert "process ended" in told["new"]["failed"]
            return Candidate(lambda: None, lambda: {"x": one.float()})

        return build

    names = ("eager", "known", "killed", "new")
    work = Work({name: builder(name) for name in names}, lambda: {"x": one}, lambda: 1, KINDS["fp32"])
    group = Group("a", "a", names, lambda machine: work)
    file = tmp_path / "rows.json"
    before = Report(file)
    before.begin("a", ["killed"])
    before.add("a", "eager", {"median_ms": 1.0})
    before.add("a", "known", {"median_ms": 2.0})
    report = Report(file)
    report.load()
    session = Session("cpu", SMALL, 1.0, report, resume=True)
    session.select([Row(group, name) for name in names])
    assert session.row(Row(group, "new"))["correct"]
    assert "speedup" in session.row(Row(group, "new"))
    assert session.row(Row(group, "known")) == {"median_ms": 2.0}
    assert "the run ended while" in session.row(Row(group, "killed"))["failed"]
    assert built == ["eager", "new"]


@pytest.mark.parametrize(
    ("device", "sizes", "gpu", "message"),
    [
        ("cuda", "paper", "NVIDIA H200", ""),
        ("cuda", "paper", "", ""),  # no GPU is here: the rows say so
        ("cpu", "paper", "", "holds rows of device cuda, sizes paper, and this run is of device cpu, sizes paper"),
        ("cuda", "small", "NVIDIA H200", "this run is of device cuda, sizes small"),
        ("cuda", "paper", "NVIDIA A100", "gpu NVIDIA H200, and this run is of device cuda, sizes paper, gpu NVIDIA A"),
    ],
)
def test_rows_of_another_device_or_size_are_not_taken(
    tmp_path: Path, device: str, sizes: str, gpu: str, message: str
) -> None:
    before = Report(tmp_path / "rows.json", "", "cuda", "paper")
    before.about_device = {"name": "NVIDIA H200"}
    before.add("a", "eager", {"median_ms": 1.0})
    after = Report(tmp_path / "rows.json", "", device, sizes)
    if message:
        with pytest.raises(RowsError, match=message):
            after.load(gpu)
    else:
        after.load(gpu)
        assert after.groups == before.groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "0"], "'0' is not a number above zero"),
        (["--minutes", "-1"], "'-1' is not a number above zero"),
        (["--rows", "FOLDER"], "is a folder; --rows takes the name of a file"),
        (["--rows", "FOLDER/torn/rows.json"], "would lie in a file; --rows takes"),
        (["--rows", "FOLDER/torn", "--resume"], "holds no rows of these benchmarks (JSONDecodeError"),
        (["--rows", "FOLDER/foreign", "--resume"], "holds no rows of these benchmarks (KeyError: 'place')"),
        (["--rows", "FOLDER/cpu", "--resume"], "rows of device cpu, sizes small, and this run is of device cuda"),
    ],
)
def test_options_that_cannot_be_are_told_in_a_line(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "torn").write_text('{"groups": ')
    (tmp_path / "foreign").write_text('{"groups": {}}')
    Report(tmp_path / "cpu", "", "cpu", "small").add("a", "eager", {"median_ms": 1.0})
    given = [option.replace("FOLDER", str(tmp_path)) for option in options]
    done = benchmarks("--collect-only", "--device", "cuda", *given, rehearse=False)
    assert done.returncode == 4, done.stdout + done.stderr
    assert message in " ".join(done.stderr.split())
    assert "INTERNALERROR" not in done.stdout + done.stderr
    assert (tmp_path / "torn").read_text() == '{"groups": '


def test_no_group_is_begun_without_time(tmp_path: Path) -> None:
    session = Session("cpu", SMALL, 0.01, Report(tmp_path / "rows.json"))
    row = one_row(lambda machine: pytest.fail("begun"))
    session.select([row])
    late = {"missing": "not begun: the 0.01 minutes were over"}
    assert session.row(row) == late
    assert json.loads((tmp_path / "rows.json").read_text())["groups"] == {"group": {"eager": late}}


def test_after_a_fault_nothing_is_run_and_what_was_found_is_kept(tmp_path: Path) -> None:
    from groups import KINDS, Candidate, Group, Work
    from measure import CpuMachine

    class Dead(CpuMachine):
        def synchronise(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fault() -> Candidate:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    one = torch.ones(3, dtype=torch.float64)
    builders = {"eager": lambda: Candidate(lambda: None, lambda: {"x": one.float()}), "ours": fault}
    group = Group(
        "a", "a", ("eager", "ours"), lambda machine: Work(builders, lambda: {"x": one}, lambda: 1, KINDS["fp32"])
    )
    session = Session("cpu", SMALL, 1.0, Report(tmp_path / "rows.json"))
    session.__dict__["machine"] = Dead()
    later = one_row(lambda machine: pytest.fail("begun"), "later")
    session.select([Row(group, "ours"), later])
    assert "illegal memory access" in session.row(Row(group, "ours"))["failed"]
    assert session.row(Row(group, "eager"))["correct"]
    assert "what follows was not run" in session.row(later)["failed"]
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert "illegal memory access" in kept["broken"]
    assert kept["groups"].keys() == {"a"}  # the later group is still to be measured


# -- the stand-ins take what the real things take


@pytest.mark.parametrize(
    ("stand_in", "documented"),
    [
        (
            rehearsal.flash_attn_func,
            "(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False)",
        ),
        (
            rehearsal.flash_attn_qkvpacked_func,
            "(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False)",
        ),
        (
            rehearsal.memory_efficient_attention,
            "(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None)",
        ),
    ],
    ids=["flash-attn 2.8", "flash-attn 2.8, packed", "xformers 0.0.30"],
)
def test_the_packages_stand_ins_have_the_documented_signatures(stand_in: Any, documented: str) -> None:
    assert str(inspect.signature(stand_in)) == documented


@pytest.mark.parametrize("name", rehearsal.CLASSES)
def test_the_classes_stand_ins_take_no_argument_that_torch_does_not_know(name: str) -> None:
    real: Any = getattr(torch.cuda, name)
    documented = " ".join((real.__doc__ or "", _signature(real.__init__), _signature(real.__new__)))
    for argument in inspect.signature(rehearsal.CLASSES[name]).parameters:
        assert re.search(rf"\b{argument}\b", documented), f"torch.cuda.{name} has no {argument}"


def _signature(function: Any) -> str:
    try:
        return str(inspect.signature(function))
    except ValueError:
        return str(function.__doc__)  # what is written in C++ says it there


def test_a_stand_in_refuses_arguments_that_the_real_function_does_not_take() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        rehearsal.as_real(torch.cuda.memory_allocated, lambda device=None: 0)(gpu=0)


def test_attention_that_a_gpu_would_refuse_is_refused() -> None:
    q = torch.randn(2, 2, 5, 16)
    with rehearsal.sdpa_kernel(SDPA["flash"]), pytest.raises(RuntimeError, match="No available kernel"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with pytest.raises(AssertionError, match=r"flash-attn takes .*not torch.float32"):
        rehearsal.flash_attn_func(q, q, q)


def test_a_kernel_that_pytorch_refuses_is_a_missing_row() -> None:
    from measure import Unavailable

    q = torch.randn(1, 1, 5, 16)
    with pytest.raises(Unavailable, match="PyTorch's cudnn kernel does not take this problem"), attending("cudnn")():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)


def test_a_step_that_waits_for_a_value_cannot_be_captured() -> None:
    graph = rehearsal.Graph()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), rehearsal.capture(graph):
        torch.ones(1).item()
    with pytest.raises(AssertionError, match="not captured"):
        graph.replay()
