"""`cast-kernels gpu-check`: everything that only a GPU can show, in one command and one report to send back.

Correctness against fp64 on fresh inputs, compute-sanitizer, the GPU's own ceilings, times against what people run
without us, and each time beside its prediction.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cast_kernels
from cast_kernels import backends
from cast_kernels.evidence import gpu_report
from cast_kernels.evidence.cases import DTYPES, Case, compare, poisoned_memory, run
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.experts import ExpertCase, expert_problem, run_expert
from cast_kernels.evidence.machine import CudaMachine, Machine, NoGPUError, Step
from cast_kernels.evidence.variants import CANNOT_RUN, VARIANTS, Variants

#: B-CAST, or an expert's half block.
AnyCase = Case | ExpertCase
#: What is found, by section.
Found = dict[str, Any]

#: Exit code where there is no GPU.
NO_GPU = 2
#: Compute-sanitizer's tools: out-of-bounds and misaligned accesses, races in shared memory.
SANITIZERS = ("memcheck", "racecheck")
SECTIONS = ("correctness", "sanitizer", "ceilings", "times", "predicted")
#: Samples that are thrown away: the first calls compile and allocate.
_WARM_UP = 3


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    cases: tuple[Case, ...]  # checked against fp64
    dtypes: tuple[str, ...]  # of the first case; the others are checked in the first of these
    batches: tuple[int, ...]  # timed at the paper's size
    repeats: int
    experts: tuple[ExpertCase, ...] = ()  # an expert's half blocks, checked in every dtype
    timed: Case = field(default_factory=Case)  # at each batch size
    copy_bytes: int = 1 << 30
    gemm: int = 8192
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
        Case(3, 5, 13, 256, 128, 4, scaled=True),  # smaller tensors' errors are too few to compare
    ),
    dtypes=("bf16", "fp16", "fp32"),
    batches=(1, 6, 32),
    repeats=50,
    experts=(
        ExpertCase(scaled=True),
        ExpertCase(activation="quick_gelu", recompute="nothing"),
        ExpertCase(op="self_attention"),
        ExpertCase(op="self_attention", recompute="nothing"),
        ExpertCase(op="adapter"),
    ),
)
QUICK = Plan(cases=(_PAPER,), dtypes=("bf16",), batches=(6,), repeats=10, experts=FULL.experts[::2], sanitize=False)

#: What compute-sanitizer runs: one forward and backward of awkward sizes, of B-CAST and of an expert's half blocks.
_SANITIZED = """
import torch
from cast_kernels.evidence.cases import Case, run
from cast_kernels.evidence.experts import ExpertCase, run_expert
run(Case(2, 3, 7, 64, 32, 2, scaled=True), "triton", torch.bfloat16, device="cuda")
for op in ("ffn", "self_attention", "adapter"):
    run_expert(ExpertCase(37, 96, 160, 48, scaled=True, op=op, heads=3), torch.bfloat16, device="cuda")
"""


class UnusableError(RuntimeError):
    """The GPU answers no call any more: a kernel faulted, and CUDA repeats its error until the process ends."""


def require_usable(machine: Machine) -> None:
    """Raise UnusableError if an earlier fault has ended the GPU's context."""
    try:
        machine.synchronise()
    except Exception as error:
        raise UnusableError(f"the GPU can be used no more ({_reason(error)}); what follows was not run") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def correctness(machine: Machine, plan: Plan, seed: int) -> Iterator[dict[str, Any]]:
    """Every backend that runs here, on inputs from this seed, new memory poisoned: the worst tensor's errors.

    What raises is an entry that failed, and so is what triton refuses: there is no other reason for this command.
    """
    every: tuple[AnyCase, ...] = (*plan.cases, *plan.experts)
    for number, unseeded in enumerate(every):
        case = replace(unseeded, seed=seed + number)
        first = isinstance(case, ExpertCase) or number == 0
        for dtype in plan.dtypes if first else plan.dtypes[:1]:
            kind = DTYPES[dtype]
            call = _caller(case, kind, machine.device)
            problem = _problem(case, kind, machine.device)
            for name in (name for name in backends.BACKENDS if name != "eager"):
                about = {"backend": name, "dtype": dtype, "case": str(case)}
                verdict = backends.can_run(name, problem)
                if not verdict.ok:
                    if name == "triton":
                        yield about | _failed(f"cannot run: {verdict.reason}")
                    continue
                require_usable(machine)
                try:
                    yield about | _checked(call, name)
                except Exception as error:  # the other problems' results are as good as before
                    traceback.print_exc()
                    yield about | _failed(_reason(error))


def _caller(case: AnyCase, dtype: torch.dtype, device: torch.device) -> Callable[..., dict[str, torch.Tensor]]:
    """What runs the case; `backend` and `exact` are missing."""
    if isinstance(case, ExpertCase):
        return partial(run_expert, case, dtype=dtype, device=device)
    return partial(run, case, dtype=dtype, device=device)


def _failed(why: str) -> dict[str, Any]:
    return {"ok": False, "why_not": why}


def _checked(call: Callable[..., dict[str, torch.Tensor]], backend: str) -> dict[str, Any]:
    """What is reported of one backend's call: its worst tensor, and whether a second one has the same bits."""
    with poisoned_memory():
        ours, again = call(backend=backend), call(backend=backend)
    errors = compare(ours, call(backend="eager"), call(backend=None, exact=True))
    worst = max(errors, key=lambda e: e.ratio if e.ratio == e.ratio else float("inf"))
    return {
        "ok": all(e.ok for e in errors), "tensors": len(errors), "worst": worst.name, "rms": worst.rms,
        "eager_rms": worst.eager_rms, "same_bits_twice": all(torch.equal(ours[key], again[key]) for key in ours),
    }  # fmt: skip


def _problem(case: AnyCase, dtype: torch.dtype, device: torch.device) -> backends.AnyProblem:
    if isinstance(case, ExpertCase):
        return expert_problem(case, dtype, device)
    t2s, s2t = (
        window if way in case.directions else None for way, window in zip(("t2s", "s2t"), case.windows, strict=True)
    )
    return cast_kernels.problem.Problem(
        case.batch, case.frames, case.patches, case.dim, case.bottleneck, case.heads, t2s, s2t, dtype, device.type
    )


def median_ms(machine: Machine, step: Step, repeats: int, cold: bool) -> float:
    """Median over the repeats; cold: L2 holds nothing of the step's before each."""
    for _ in range(_WARM_UP):
        step()
    machine.synchronise()
    samples = []
    for _ in range(repeats):
        if cold:
            machine.flush_cache()
        samples.append(machine.elapsed_ms(step))
    return statistics.median(samples)


def ceilings(machine: Machine, plan: Plan) -> dict[str, float]:
    """Copy bandwidth in B/s (read and written bytes) and the rate of a square bf16 GEMM in FLOP/s."""
    require_usable(machine)
    source = torch.zeros(plan.copy_bytes, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copy = median_ms(machine, lambda: target.copy_(source), plan.repeats, cold=False)
    a = torch.randn(plan.gemm, plan.gemm, device=machine.device).bfloat16()
    product = median_ms(machine, lambda: a @ a, plan.repeats, cold=False)
    return {"copy_bytes_per_s": 2e3 * plan.copy_bytes / copy, "gemm_flops_per_s": 2e3 * plan.gemm**3 / product}


def times(machine: Machine, plan: Plan, variants: Variants = VARIANTS) -> Iterator[dict[str, Any]]:
    """Every variant at every batch: medians of inference and training, or why there are none."""
    for batch in plan.batches:
        case = replace(plan.timed, batch=batch)
        for name, make in variants.items():
            require_usable(machine)
            try:
                steps = make(case, machine.device)
                for phase, step in (("inference", steps.forward), ("training", steps.training)):
                    yield {"variant": name, "batch": batch, "phase": phase} | _timed(machine, step, plan.repeats)
            except CANNOT_RUN as error:
                yield {"variant": name, "batch": batch, "phase": "", "why_not": str(error), "failed": False}
            except Exception as error:  # another library's failure must not cost the rest of the report
                traceback.print_exc()
                yield {"variant": name, "batch": batch, "phase": "", "why_not": _reason(error), "failed": True}


def _timed(machine: Machine, step: Step, repeats: int) -> dict[str, Any]:
    timed: dict[str, Any] = {
        "warm_ms": median_ms(machine, step, repeats, cold=False),
        "cold_ms": median_ms(machine, step, repeats, cold=True),
        "peak_bytes": machine.peak_bytes(step),
    }
    try:
        replay = machine.capture(step)
    except RuntimeError as error:
        require_usable(machine)  # a kernel that faulted is no step that cannot be captured
        return timed | {"no_graph": str(error).splitlines()[0]}
    timed["graph_warm_ms"] = median_ms(machine, replay, repeats, cold=False)
    return timed | {"graph_cold_ms": median_ms(machine, replay, repeats, cold=True)}


def sanitize(machine: Machine) -> Iterator[dict[str, Any]]:
    """What compute-sanitizer's tools find; nothing where it is not installed."""
    for tool in SANITIZERS:
        result = machine.sanitize(tool, _SANITIZED)
        if result is not None:
            yield {"tool": tool, "ok": result[0], "output": result[1]}


def collect(
    machine: Machine, plan: Plan, seed: int, predictions: Path, variants: Variants, save: Callable[[Found], None]
) -> Found:
    """Everything, as it is written to JSON.

    A section that an exception ends keeps what it had found, and the others follow. After a fault in a kernel CUDA
    refuses every later call, so what can be diagnosed comes before what is timed. `save` is called after each entry: a
    kernel that hangs is ended from outside.
    """
    found: Found = {
        "device": machine.describe(), "cast_kernels": cast_kernels.__version__, "seed": seed, "plan": asdict(plan),
        "correctness": [], "sanitizer": [], "ceilings": {}, "times": [], "predicted": [], "broken": [],
        "unfinished": [*SECTIONS],
    }  # fmt: skip
    expected = gpu_report.predictions_for(found["device"], predictions)
    steps: dict[str, Callable[[], Iterable[Any]]] = {
        "correctness": lambda: correctness(machine, plan, seed),
        "sanitizer": lambda: sanitize(machine) if plan.sanitize else (),
        "ceilings": lambda: ceilings(machine, plan).items(),
        "times": lambda: times(machine, plan, variants),
        "predicted": lambda: gpu_report.beside(found["times"], expected),
    }
    for name, step in steps.items():
        try:
            for entry in step():
                if name == "ceilings":
                    found[name][entry[0]] = entry[1]
                else:
                    found[name].append(entry)
                    save(found)
        except Exception as error:  # whatever it is, it goes into the report instead of ending it
            traceback.print_exc()
            found["broken"].append({"section": name, "error": _reason(error)})
        found["unfinished"].remove(name)
        save(found)
    return found


def passed(found: Found) -> bool:
    """Whether some backend was checked, all of them are right, the sanitizer is content, and no variant broke."""
    checked = [entry for entry in found["correctness"] if entry["backend"] == "triton"]
    right = all(entry["ok"] and entry.get("same_bits_twice") for entry in found["correctness"])
    clean = all(entry["ok"] for entry in found["sanitizer"])
    whole = (
        not found["broken"] and not found.get("unfinished") and not any(entry.get("failed") for entry in found["times"])
    )
    return bool(checked) and right and clean and whole


def main(json_file: Path | None, report_file: Path | None, quick: bool) -> int:
    """Check the GPU of this machine -> exit code: 0, 1 if something is wrong, 2 without a GPU."""
    try:
        machine = CudaMachine()
    except NoGPUError as error:
        print(f"cast-kernels gpu-check: {error}; this command measures, so it needs a GPU", file=sys.stderr)
        return NO_GPU
    try:
        return check(machine, QUICK if quick else FULL, json_file, report_file)
    except OSError as error:
        print(f"cast-kernels gpu-check: the report cannot be written: {error}", file=sys.stderr)
        return 2


def check(
    machine: Machine, plan: Plan, json_file: Path | None, report_file: Path | None, seed: int | None = None,
    predictions: Path = gpu_report.PREDICTIONS, variants: Variants = VARIANTS,
) -> int:  # fmt: skip
    """Do what the plan says, print and write it -> exit code.

    Args:
        machine: where it runs.
        plan: how much is done.
        json_file, report_file: None for `gpu-check-<name>.json` and `.md` in the working directory.
        seed: of the inputs, None for another one every time.
        predictions: folder of what `cast-kernels predict` wrote.
        variants: that are timed.

    Raises:
        OSError: a file cannot be written; nothing was done.
    """
    stem = "gpu-check-" + re.sub(r"[^a-z0-9]+", "-", machine.describe()["name"].lower()).strip("-")
    json_file, report_file = json_file or Path(f"{stem}.json"), report_file or Path(f"{stem}.md")

    def save(found: Found) -> None:
        try:
            _write(json_file, json.dumps(found, indent=1) + "\n")
            _write(report_file, gpu_report.markdown(found, passed(found)))
        except OSError as error:  # a full disk must not end an hour's measurement: its tables are printed
            print(f"cast-kernels gpu-check: the report is not up to date: {error}", file=sys.stderr)

    for path in (json_file, report_file):  # a place that cannot be written to is told before the work
        _part(path).write_text("")
        _part(path).unlink()
    found = collect(machine, plan, secrets.randbelow(1 << 30) if seed is None else seed, predictions, variants, save)
    console = wide_console()
    for table in gpu_report.tables(found):
        console.print(table)
    console.print(gpu_report.verdict(passed(found)), markup=False)
    console.print(f"the report: {report_file} and {json_file}", markup=False, soft_wrap=True)
    return 0 if passed(found) else 1


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    _part(path).write_text(text)
    os.replace(_part(path), path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
