"""`cast-kernels gpu-check`: all checks that need a GPU, in one command and one report to send back.

Correctness against fp64 on fresh inputs, compute-sanitizer, and the groups of `benchmarks/`: times of ours and of the
alternatives, beside the GPU's own ceilings and the predictions.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cast_kernels
from cast_kernels import backends
from cast_kernels.evidence.cases import DTYPES, Case, compare, poisoned_memory, run
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.experts import ExpertCase, expert_problem, run_expert
from cast_kernels.gpu import order
from cast_kernels.gpu import report as gpu_report
from cast_kernels.gpu.machine import CudaMachine, Machine, NoGPUError, require_usable
from cast_kernels.gpu.report import ENDS, is_right, not_measured

#: B-CAST, or an expert's half block.
AnyCase = Case | ExpertCase
#: The results, by section.
Found = dict[str, Any]

#: Exit code without a GPU.
NO_GPU = 2
#: Exit code if all measured rows are right, but a row of ours was not measured.
INCOMPLETE = 3
#: Compute-sanitizer's tools: out-of-bounds and misaligned accesses, races in shared memory.
SANITIZERS = ("memcheck", "racecheck")
SECTIONS = ("correctness", "sanitizer", "times")
#: The last group of benchmarks may take so long beyond the allowed minutes.
_LAST_GROUP_SECONDS = 600
#: In a checkout, beside the package.
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@dataclass(frozen=True)
class Plan:
    """The amount of checks and measurements."""

    cases: tuple[Case, ...]  # compared with fp64
    dtypes: tuple[str, ...]  # of the first case; the others are checked in the first of these
    experts: tuple[ExpertCase, ...] = ()  # an expert's half blocks, checked in every dtype
    tier: str = "first"  # of the benchmarks
    minutes: float = math.inf  # that the benchmarks may take
    sanitize: bool = True


_PAPER = Case(scaled=True)
FULL = Plan(
    cases=(
        _PAPER,
        replace(_PAPER, windows=("space-time", "space-time"), recompute="nothing"),
        replace(_PAPER, windows=("space", "time"), recompute="all"),
        replace(_PAPER, directions=("t2s",), positions=False),
        replace(_PAPER, directions=("s2t",), heads=24),
        replace(_PAPER, bottleneck=768, heads=12),
        Case(3, 5, 13, 256, 128, 4, scaled=True),  # smaller tensors have too few elements to compare errors
    ),
    dtypes=("bf16", "fp16", "fp32"),
    experts=(
        ExpertCase(scaled=True),
        ExpertCase(activation="quick_gelu", recompute="nothing"),
        ExpertCase(op="self_attention"),
        ExpertCase(op="self_attention", recompute="nothing"),
        ExpertCase(op="adapter"),
    ),
)
QUICK = Plan(cases=(_PAPER,), dtypes=("bf16",), experts=FULL.experts[::2], minutes=5, sanitize=False)

#: compute-sanitizer's program: one forward and backward of awkward sizes, of B-CAST by each backend that can, and of an
#: expert's half blocks.
SANITIZED = """
import torch
from cast_kernels import backends
from cast_kernels.evidence.cases import Case, run
from cast_kernels.evidence.experts import ExpertCase, run_expert
from cast_kernels.gpu.check import bcast_problem
run(Case(2, 3, 7, 64, 32, 2, scaled=True), "triton", torch.bfloat16, device="cuda")
wide = Case(2, 3, 7, 64, 192, 6, scaled=True)
if backends.can_run("cuda", bcast_problem(wide, torch.bfloat16, torch.device("cuda"))).ok:
    run(wide, "cuda", torch.bfloat16, device="cuda")
for op in ("ffn", "self_attention", "adapter"):
    run_expert(ExpertCase(37, 96, 160, 48, scaled=True, op=op, heads=3), torch.bfloat16, device="cuda")
"""


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def correctness(
    machine: Machine, plan: Plan, seed: int, names: Collection[str] = backends.BACKENDS
) -> Iterator[dict[str, Any]]:
    """The worst tensor's errors of each of these backends that runs here, on inputs from this seed, with new memory
    poisoned.

    A call that raises is a failed entry. So is a refusal by triton: this command exists to check it. A refusal by cuda
    is an entry that says why, once for each reason; what cuda leaves to triton is checked as triton's.
    """
    refused: set[str] = set()
    every: tuple[AnyCase, ...] = (*plan.cases, *plan.experts)
    for number, unseeded in enumerate(every):
        case = replace(unseeded, seed=seed + number)
        first = isinstance(case, ExpertCase) or number == 0
        for dtype in plan.dtypes if first else plan.dtypes[:1]:
            kind = DTYPES[dtype]
            call = _caller(case, kind, machine.device)
            problem = _problem(case, kind, machine.device)
            for name in (name for name in _own_kernels(case) if name in names):
                about = {"backend": name, "dtype": dtype, "case": str(case)}
                verdict = backends.can_run(name, problem)
                if not verdict.ok:
                    if name == "triton":
                        yield about | _failed(f"cannot run: {verdict.reason}")
                    elif name == "cuda" and verdict.reason not in refused:
                        refused.add(verdict.reason)
                        yield about | {"left_out": verdict.reason}
                    continue
                require_usable(machine)
                try:
                    yield about | _checked(call, name, ours_alone=not _attends_by_pytorch(case, name))
                except Exception as error:  # the other problems' results stay valid
                    traceback.print_exc()
                    yield about | _failed(_reason(error))


def _own_kernels(case: AnyCase) -> Iterator[str]:
    """Backends with kernels of their own for the case's op."""
    op = case.op if isinstance(case, ExpertCase) else "bcast"
    return (name for name in backends.BACKENDS if name != "eager" and backends.left_to(name, op) is None)


def _caller(case: AnyCase, dtype: torch.dtype, device: torch.device) -> Callable[..., dict[str, torch.Tensor]]:
    """The call of the case, without `backend` and `exact`."""
    if isinstance(case, ExpertCase):
        return partial(run_expert, case, dtype=dtype, device=device)
    return partial(run, case, dtype=dtype, device=device)


def _attends_by_pytorch(case: AnyCase, backend: str) -> bool:
    return backend != "cpu" and isinstance(case, ExpertCase) and case.op == "self_attention"


def _failed(why: str) -> dict[str, Any]:
    return {"ok": False, "why_not": why}


def _checked(call: Callable[..., dict[str, torch.Tensor]], backend: str, ours_alone: bool) -> dict[str, Any]:
    """The entry of one backend's call: its worst tensor, and whether a second call has the same bits.

    Only our own kernels must have equal bits: PyTorch's attention on a GPU adds its gradients up in any order.
    """
    with poisoned_memory():
        ours, again = call(backend=backend), call(backend=backend)
    errors = compare(ours, call(backend="eager"), call(backend=None, exact=True))
    worst = max(errors, key=lambda e: e.ratio if e.ratio == e.ratio else float("inf"))
    return {
        "ok": all(e.ok for e in errors), "tensors": len(errors), "worst": worst.name, "rms": worst.rms,
        "eager_rms": worst.eager_rms, "same_bits_twice": all(torch.equal(ours[key], again[key]) for key in ours),
        "bits_demanded": ours_alone,
    }  # fmt: skip


def _problem(case: AnyCase, dtype: torch.dtype, device: torch.device) -> backends.AnyProblem:
    if isinstance(case, ExpertCase):
        return expert_problem(case, dtype, device)
    return bcast_problem(case, dtype, device)


def bcast_problem(case: Case, dtype: torch.dtype, device: torch.device) -> cast_kernels.Problem:
    """What backends are asked about."""
    t2s, s2t = (
        window if way in case.directions else None for way, window in zip(("t2s", "s2t"), case.windows, strict=True)
    )
    return cast_kernels.Problem(
        case.batch, case.frames, case.patches, case.dim, case.bottleneck, case.heads, t2s, s2t, dtype, device.type,
        gpu=device.index,
    )  # fmt: skip


def run_benchmarks(plan: Plan, rows: Path) -> int:
    """Run the checkout's benchmarks in a separate process, which writes every row to `rows` -> exit status.

    A fault ends only that process. It is started again without the rows in `rows`, as long as the last run added rows.

    Raises:
        FileNotFoundError: the package does not lie in a checkout.
    """
    if not BENCHMARKS.is_dir():
        raise FileNotFoundError(
            f"the benchmarks are not in {BENCHMARKS}: they are part of the repository, not of the installed package; "
            "run this command from a checkout that was installed with pip install -e ."
        )
    options = ["--benchmark-only", "--benchmark-disable-gc", "--device", "cuda", "--tier", plan.tier, "-q"]
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), *options, "--rows", str(rows), "-p", "no:cacheprovider"]
    began, known, again = time.monotonic(), -1, list[str]()
    left = plan.minutes
    while True:
        limit = ["--minutes", f"{left:g}"] if left < math.inf else []
        status = _status([*command, *limit, *again], 60 * left + _LAST_GROUP_SECONDS)
        found = read_rows(rows)
        broken = bool(found.get("broken")) or status < 0
        left = plan.minutes - (time.monotonic() - began) / 60
        if not broken or len(measured(found)) <= known or left <= 0:
            return status
        known, again = len(measured(found)), ["--resume"]


def _status(command: list[str], seconds: float) -> int:
    """Exit status of a process in the checkout. A timeout ends the process, and a hanging kernel with it."""
    try:
        limit = seconds if seconds < math.inf else None
        # pytest-benchmark is disabled in a worker of pytest-xdist, and this may run in one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        return subprocess.run(command, cwd=BENCHMARKS.parent, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL


def read_rows(path: Path) -> Found:
    """The rows that the benchmarks have written so far."""
    found: Found = json.loads(path.read_text()) if path.exists() else {}
    return found


def measured(found: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(group, name, row) of all rows in the benchmarks' file."""
    return [(g, name, row) for g, rows in found.get("groups", {}).items() for name, row in rows.items()]


def sanitize(machine: Machine) -> Iterator[dict[str, Any]]:
    """Findings of compute-sanitizer's tools; nothing if it is not installed."""
    for tool in SANITIZERS:
        result = machine.sanitize(tool, SANITIZED)
        if result is not None:
            yield {"tool": tool, "ok": result[0], "output": result[1]}


def collect(
    machine: Machine, plan: Plan, seed: int, rows: Path, save: Callable[[Found], None],
    benchmark: Callable[[Plan, Path], int] = run_benchmarks,
) -> Found:  # fmt: skip
    """All results, in the form of the JSON file.

    A section that an exception ends keeps its results, and the others follow. Checks come before times, and times are
    measured in a separate process. `save` is called after each entry, because a hanging kernel can only be ended from
    outside.
    """
    found: Found = {
        "device": machine.describe(), "cast_kernels": cast_kernels.__version__, "seed": seed, "plan": asdict(plan),
        "correctness": [], "sanitizer": [], "times": {}, "broken": [], "unfinished": [*SECTIONS],
    }  # fmt: skip

    def timed() -> Iterator[dict[str, Any]]:
        status = benchmark(plan, rows)
        found["times"] = read_rows(rows) | {"status": status}
        if not measured(found["times"]):
            raise RuntimeError(f"the benchmarks ended with status {status} and brought no row")
        yield from ()

    steps: dict[str, Callable[[], Iterable[Any]]] = {
        "correctness": lambda: correctness(machine, plan, seed),
        "sanitizer": lambda: sanitize(machine) if plan.sanitize else (),
        "times": timed,
    }
    for name, step in steps.items():
        try:
            for entry in step():
                found[name].append(entry)
                save(found)
        except Exception as error:  # any exception goes into the report instead of ending it
            traceback.print_exc()
            found["broken"].append({"section": name, "error": _reason(error)})
        found["unfinished"].remove(name)
        save(found)
    return found


def status(found: Found) -> int:
    """The exit code: 1 if something is wrong, 3 if a row of ours was not measured, else 0."""
    if not passed(found):
        return 1
    return INCOMPLETE if not_measured(found) else 0


def passed(found: Found) -> bool:
    """Whether triton was checked, all backends are right, the sanitizer found nothing, and no row failed."""
    checked = [entry for entry in found["correctness"] if entry["backend"] == "triton"]
    right = all(is_right(entry) for entry in found["correctness"])
    clean = all(entry["ok"] for entry in found["sanitizer"])
    times = found["times"]
    rows = [(name, row) for _, name, row in measured(times)]
    timed = not times.get("broken") and not any("failed" in row for _, row in rows)
    timed = timed and times.get("status", 0) in ENDS
    fast = timed and all(row.get("correct", True) for name, row in rows if name.startswith("cast_kernels"))
    return bool(checked) and right and clean and fast and not found["broken"] and not found.get("unfinished")


def main(
    json_file: Path | None, report_file: Path | None, quick: bool, tier: str | None = None, minutes: float | None = None
) -> int:
    """Check the GPU of this machine -> exit code: 0, 1 if something is wrong, 2 without a GPU, 3 if not all ran."""
    try:
        machine = CudaMachine()
    except NoGPUError as error:
        print(f"cast-kernels gpu-check: {error}; this command measures, so it needs a GPU", file=sys.stderr)
        return NO_GPU
    plan = QUICK if quick else FULL
    plan = replace(plan, tier=tier or plan.tier, minutes=plan.minutes if minutes is None else minutes)
    if "KNOWN BAD" in (ptxas := str(machine.describe().get("ptxas", ""))):
        print(f"cast-kernels gpu-check: warning: ptxas {ptxas}", file=sys.stderr)
    try:
        return check(machine, plan, json_file, report_file)
    except OSError as error:
        print(f"cast-kernels gpu-check: the report cannot be written: {error}", file=sys.stderr)
        return 2


def check(
    machine: Machine, plan: Plan, json_file: Path | None, report_file: Path | None, seed: int | None = None,
    benchmark: Callable[[Plan, Path], int] = run_benchmarks,
) -> int:  # fmt: skip
    """Execute the plan, print and write the results -> exit code.

    Args:
        machine: where it runs.
        plan: the amount of work.
        json_file, report_file: None for `gpu-check-<name>.json` and `.md` in the working directory. The benchmarks'
            rows with all samples are in `<json_file's name>.rows.json` beside it.
        seed: of the inputs, None for another one every time.
        benchmark: measures times.

    Raises:
        OSError: a file cannot be written; nothing was done.
    """
    stem = "gpu-check-" + re.sub(r"[^a-z0-9]+", "-", machine.describe()["name"].lower()).strip("-")
    json_file, report_file = json_file or Path(f"{stem}.json"), report_file or Path(f"{stem}.md")
    rows = json_file.with_name(f"{json_file.stem}.rows.json").absolute()

    def save(found: Found) -> None:
        try:
            _write(json_file, json.dumps(_without_samples(found), indent=1) + "\n")
            _write(report_file, gpu_report.markdown(found, passed(found)))
        except OSError as error:  # a full disk must not end an hour's measurement: the tables are printed at the end
            print(f"cast-kernels gpu-check: the report is not up to date: {error}", file=sys.stderr)

    for path in (json_file, report_file):  # a path that cannot be written fails before the work
        _part(path).write_text("")
        _part(path).unlink()
    rows.unlink(missing_ok=True)
    found = collect(machine, plan, secrets.randbelow(1 << 30) if seed is None else seed, rows, save, benchmark)
    console = wide_console()
    for table in gpu_report.tables(found):
        console.print(table)
    console.print(order.line(found["times"].get("groups", {})), markup=False, soft_wrap=True)
    console.print(gpu_report.verdict(found, passed(found)), markup=False)
    console.print(f"the report: {report_file} and {json_file}", markup=False, soft_wrap=True)
    return status(found)


def _without_samples(found: Found) -> Found:
    """The results without all samples; the benchmarks' file holds these."""
    groups = {
        title: {name: {k: v for k, v in row.items() if not k.endswith("all_ms")} for name, row in rows.items()}
        for title, rows in found["times"].get("groups", {}).items()
    }
    return found | {"times": found["times"] | {"groups": groups}}


def _write(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    _part(path).write_text(text)
    os.replace(_part(path), path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
