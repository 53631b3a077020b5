"""Rows that no benchmark has, on the benchmarks' own problems: correctness first, repetition, one step from inside.

`python -m first_contact.worker ROOM`, with `benchmarks/` on the path.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import bench_adapter
import bench_bcast
import bench_ffn
import bench_model
import bench_self_attention
import torch
from cast_kernels.gpu import check
from cast_kernels.gpu.machine import Machine
from cast_kernels.gpu.report import is_right
from compare import worst_ratio
from groups import PAPER, SMALL, Group, Sizes
from measure import rms_error
from torch import Tensor

from cast_kernels.evidence.cases import Case, poisoned_memory
from cast_kernels.evidence.experts import ExpertCase
from first_contact import inside
from first_contact.device import EMULATED, device
from first_contact.rows import Rows

#: What a row is called -> how it is found.
Room = Mapping[str, Callable[[], dict[str, Any]]]

_FILES = (bench_bcast, bench_ffn, bench_self_attention, bench_adapter, bench_model)
#: Our backend, as the benchmarks name its rows.
OURS = "cast_kernels, triton"
#: Of the inputs of `gpu-check`'s problems: no figure here depends on chance.
SEED = 20
SMALL_PLAN = replace(check.QUICK, cases=(Case(2, 2, 5, 32, 32, 2),), experts=(ExpertCase(20, 32, 48, 16, heads=2),))
#: Groups whose rows of ours are checked, in order of worth.
CHECKED = (
    "bcast amp B1 training", "ffn temporal amp B1 training", "self_attention temporal amp B1 training",
    "model training step amp B1", "bcast bf16 B1 training", "bcast fp16 B1 training", "bcast fp32 B1 training",
    "ffn spatial amp B1 training", "ffn temporal bf16 B1 training", "model inference bf16 B1",
    "bcast amp B6 training", "adapter temporal amp B1 training",
)  # fmt: skip
#: Groups whose bits are compared. Not attention over whole clips: PyTorch's backward of it may differ each time.
REPEATED = (
    "bcast bf16 B6 training", "bcast amp B6 training", "ffn temporal amp B6 training",
    "adapter temporal amp B6 training", "bcast fp16 B6 training", "bcast fp32 B6 training",
)  # fmt: skip
#: Seconds of one of these rows.
REPEAT_SECONDS = 5.0


def main() -> int:
    """Do a room's rows until the time is over -> exit status: 86 once the GPU can be used no more."""
    name, rows = sys.argv[1], Rows()
    with device() as machine:
        room = ROOMS[name](machine, {g.name: g for g in groups(SMALL if EMULATED else PAPER)})
        rows.plan(room)
        for row, find in room.items():
            if row in rows.begun or rows.seconds_left() < 1:
                continue
            rows.begin(row)
            begin = time.perf_counter()
            try:
                found = find()
            except Exception as error:  # whatever it is, the next row may be right
                traceback.print_exc()
                found = {"ok": False, "why_not": f"{type(error).__name__}: {error}"}
            rows.end(row, **found, s=time.perf_counter() - begin)
            try:
                machine.synchronise()
            except Exception:  # a kernel faulted: CUDA repeats its error until the process ends
                traceback.print_exc()
                return 86
    return 0


def groups(sizes: Sizes) -> list[Group]:
    """Every group of the benchmarks on a GPU."""
    return [group for file in _FILES for group in file.groups("cuda", sizes)]


def correctness(machine: Machine, known: Mapping[str, Group]) -> Room:
    """Each of our rows beside the group's baseline, both against fp64, new memory poisoned."""
    problems = {
        f"{name}, {row.removeprefix(OURS).lstrip(', ') or 'default'}": partial(compared, machine, known[name], row)
        for name in CHECKED
        for row in known[name].rows
        if row.startswith(OURS)
    }
    plan = SMALL_PLAN if EMULATED else check.FULL
    cases = [replace(plan, cases=(case,), dtypes=(dtype,), experts=()) for case in plan.cases for dtype in plan.dtypes]
    cases += [replace(plan, cases=(), dtypes=(dtype,), experts=(x,)) for x in plan.experts for dtype in plan.dtypes]
    return problems | {
        str((*one.cases, *one.experts)[0]) + f", {one.dtypes[0]}": partial(case, machine, one) for one in cases
    }


def case(machine: Machine, plan: check.Plan) -> dict[str, Any]:
    """One problem of `cast-kernels gpu-check`."""
    found = next(entry for entry in check.correctness(machine, plan, SEED) if entry["backend"] == "triton")
    return found | {"ok": is_right(found)}


def compared(machine: Machine, group: Group, row: str) -> dict[str, Any]:
    """The worst tensor of one row."""
    work = group.work(machine)
    assert work.exact is not None
    exact = work.exact()
    with poisoned_memory():
        candidate = work.builders[row]()
        machine.computed()
        ours = rms_error(candidate.results(), dict(exact))
    if not machine.computed():
        return {"ok": None, "why_not": "launches were recorded, not carried out"}
    eager = rms_error(work.builders[group.rows[0]]().results(), dict(exact))
    ratio, where = worst_ratio(ours, eager, dict(exact))
    return {"ok": ratio <= 2, "error over eager's": ratio, "worst tensor": where, "rms": ours[where]}


def repetition(machine: Machine, known: Mapping[str, Group]) -> Room:
    """The same call many times: Triton before 3.7.1 leaves out a fence on sm_90, and a race shows as other bits."""
    return {name: partial(repeat, machine, known[name]) for name in REPEATED}


def repeat(machine: Machine, group: Group) -> dict[str, Any]:
    """Compare the bits of every result with the first call's, with and without a cold L2."""
    candidate = group.work(machine).builders[OURS]()
    first = {name: x.clone() for name, x in candidate.results().items()}
    other = {name: torch.zeros((), dtype=torch.int64, device=x.device) for name, x in first.items()}
    calls, end = 0, time.perf_counter() + (0 if EMULATED else REPEAT_SECONDS)
    while calls < 2 or time.perf_counter() < end:
        if calls % 2:
            machine.flush_cache()
        for name, x in candidate.results().items():
            other[name] += (_bits(x) != _bits(first[name])).any()
        calls += 1
        if calls % 20 == 0:
            machine.synchronise()
    differing = {name: int(count) for name, count in other.items() if count}
    worst = max(differing, key=lambda name: differing[name], default="")
    why = f"{differing[worst]} of {calls} calls gave other bits of {worst}" if worst else ""
    return {
        "ok": not differing,
        "calls": calls,
        "tensors": len(first),
        "tensors that differ": len(differing),
        "why_not": why,
    }


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def step(machine: Machine, known: Mapping[str, Group]) -> Room:
    """Training steps from inside: the host's time, kernels by time, and what was loaded for ours."""
    rows: dict[str, Callable[[], dict[str, Any]]] = {}
    for batch in (1, 6):
        group = known[f"model training step amp B{batch}"]
        for row in (OURS, group.rows[0]):
            rows[f"host, B{batch}, {row}"] = partial(_inside, inside.host_time, machine, group, row)
    for row in (OURS, group.rows[0]):
        rows[f"profile, B{batch}, {row}"] = partial(_inside, inside.profile, machine, group, row)
    return rows | {"kernels": partial(inside.loaded, machine)}


def _inside(look: Callable[..., dict[str, Any]], machine: Machine, group: Group, row: str) -> dict[str, Any]:
    return look(machine, group.work(machine).builders[row]().step)


def sanitizer(machine: Machine, known: Mapping[str, Group]) -> Room:
    """compute-sanitizer's tools on small problems."""
    return {tool: partial(_sanitized, machine, tool) for tool in check.SANITIZERS}


def _sanitized(machine: Machine, tool: str) -> dict[str, Any]:
    result = machine.sanitize(tool, check.SANITIZED)
    if result is None:
        return {"ok": None, "why_not": "compute-sanitizer is not installed"}
    return {"ok": result[0], "output": result[1]}


ROOMS: dict[str, Callable[[Machine, Mapping[str, Group]], Room]] = {
    "correctness": correctness, "repetition": repetition, "step": step, "sanitizer": sanitizer,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
