"""Rows beside the benchmarks, on the benchmarks' problems: correctness, repetition, one step from inside.

The imports need the device in place, so `worker` imports this module after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import bench_adapter
import bench_bcast
import bench_ffn
import bench_model
import bench_self_attention
import torch
from compare import worst_ratio
from groups import PAPER, SMALL, Group, Sizes, Work
from measure import Unavailable, rms_error
from torch import Tensor

from cast_kernels.evidence.cases import Case, poisoned_memory
from cast_kernels.evidence.experts import ExpertCase
from cast_kernels.gpu import check, order
from cast_kernels.gpu.machine import Machine
from cast_kernels.gpu.report import is_right
from first_contact import inside
from first_contact.device import EMULATED
from first_contact.rows import Rows

#: Name of a row -> the function that runs it.
Room = Mapping[str, Callable[[], dict[str, Any]]]

_FILES = (bench_bcast, bench_ffn, bench_self_attention, bench_adapter, bench_model)
#: Our backends of a GPU, by the benchmarks' names; the first one has all ops.
OURS = tuple(map(order.row_of, order.BACKENDS))
#: Seed of the inputs of `gpu-check`'s problems: no figure here depends on chance.
SEED = 20
SMALL_PLAN = replace(check.QUICK, cases=(Case(2, 2, 5, 32, 192, 6),), experts=(ExpertCase(20, 32, 48, 16, heads=2),))
#: The reason for no verdict in a rehearsal.
RECORDED = "some launches were recorded, not carried out"
#: Groups whose rows of ours are compared with fp64, in order of worth.
CHECKED = (
    "bcast amp B1 training", "ffn temporal amp B1 training", "self_attention temporal amp B1 training",
    "model training step amp B1", "bcast bf16 B1 training", "bcast fp16 B1 training", "bcast fp32 B1 training",
    "ffn spatial amp B1 training", "ffn temporal bf16 B1 training", "model inference bf16 B1",
    "bcast amp B6 training", "adapter temporal amp B1 training",
)  # fmt: skip
#: Groups whose bits are compared. Attention over whole clips is missing: PyTorch's backward of it may vary between
#: calls.
REPEATED = (
    "bcast bf16 B6 training", "bcast amp B6 training", "ffn temporal amp B6 training",
    "adapter temporal amp B6 training", "bcast fp16 B6 training", "bcast fp32 B6 training",
)  # fmt: skip
#: Seconds of one of these rows.
REPEAT_SECONDS = 5.0
#: Time limit of one tool. It ends before this process is killed; otherwise it would keep running.
SANITIZER_SECONDS = 180.0


def groups(sizes: Sizes) -> dict[str, Group]:
    """Every group of the benchmarks on a GPU, by name."""
    return {group.name: group for file in _FILES for group in file.groups("cuda", sizes)}


def rows_of(room: str, machine: Machine) -> Room:
    """The rows of one room, at the paper's size, or in a rehearsal at small ones."""
    return ROOMS[room](machine, groups(SMALL if EMULATED else PAPER))


def correctness(machine: Machine, known: Mapping[str, Group]) -> Room:
    """Each of our rows and the group's baseline, both compared with fp64, with new memory poisoned."""
    problems = {
        f"{name}, {row.removeprefix('cast_kernels, ')}": partial(compared, machine, known[name], row)
        for name in CHECKED
        for row in known[name].rows
        if row.startswith(OURS)
    }
    plan = SMALL_PLAN if EMULATED else check.FULL
    for number, one in enumerate((*plan.cases, *plan.experts)):
        for dtype in plan.dtypes if number == 0 or isinstance(one, ExpertCase) else plan.dtypes[:1]:
            for backend in order.BACKENDS[: 1 if isinstance(one, ExpertCase) else None]:
                problems[f"{one}, {dtype}, {backend}"] = partial(checked, machine, one, dtype, backend)
    return problems


def checked(machine: Machine, case: check.AnyCase, dtype: str, backend: str) -> dict[str, Any]:
    """One problem of `cast-kernels gpu-check` on one backend."""
    cases, experts = ((), (case,)) if isinstance(case, ExpertCase) else ((case,), ())
    plan = check.Plan(cases, (dtype,), experts)
    machine.computed()
    found = next(check.correctness(machine, plan, SEED, (backend,)))
    if "left_out" in found:
        return {"ok": None, "why_not": found["left_out"]}
    return {"ok": None, "why_not": RECORDED} if not machine.computed() else found | {"ok": is_right(found)}


def compared(machine: Machine, group: Group, row: str) -> dict[str, Any]:
    """The worst tensor's errors of one row."""
    work, exact, eager = truth(machine, group)
    with poisoned_memory():
        try:
            candidate = work.builders[row]()
        except Unavailable as error:
            return {"ok": None, "why_not": str(error)}
        machine.computed()
        ours = rms_error(candidate.results(), exact)
    if not machine.computed():
        return {"ok": None, "why_not": RECORDED}
    ratio, where = worst_ratio(ours, eager, exact)
    return {"ok": ratio <= 2, "error over eager's": ratio, "worst tensor": where, "rms": ours[where]}


@lru_cache(1)
def truth(machine: Machine, group: Group) -> tuple[Work, dict[str, Tensor], dict[str, float]]:
    """A group's work, its results in fp64, and the errors of its baseline."""
    work = group.work(machine)
    assert work.exact is not None
    exact = dict(work.exact())
    return work, exact, rms_error(work.builders[group.rows[0]]().results(), exact)


def repetition(machine: Machine, known: Mapping[str, Group]) -> Room:
    """The same call many times. Triton before 3.7.1 omits a fence on sm_90, and a race would change bits."""
    return {
        f"{name}, {row.removeprefix('cast_kernels, ')}": partial(repeat, machine, known[name], row)
        for name in REPEATED
        for row in OURS
        if row in known[name].rows
    }


def repeat(machine: Machine, group: Group, row: str) -> dict[str, Any]:
    """Compare the bits of every result with the first call's, with and without a cold L2."""
    try:
        candidate = group.work(machine).builders[row]()
    except Unavailable as error:
        return {"ok": None, "why_not": str(error)}
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
    if not machine.computed():
        return {"ok": None, "calls": calls, "why_not": RECORDED}
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
    """Training steps from inside: the host's time, kernels by time, and our loaded kernels."""
    one, six = (known[f"model training step amp B{batch}"] for batch in (1, 6))
    rows: dict[str, Callable[[], dict[str, Any]]] = {"host, B1": partial(_host, machine, one)}
    for row in (*OURS, six.rows[0]):
        rows[f"profile, B6, {row}"] = partial(_profile, machine, six, row)
    return rows | {"kernels": partial(inside.loaded, machine)}


def _host(machine: Machine, group: Group) -> dict[str, Any]:
    """The host's time of the baseline and of each of our rows that runs here."""
    builders, steps = group.work(machine).builders, {}
    for row in (group.rows[0], *OURS):
        with suppress(Unavailable):
            steps[row] = builders[row]().step
    return inside.host_time(machine, steps)


def _profile(machine: Machine, group: Group, row: str) -> dict[str, Any]:
    try:
        return inside.profile(machine, group.work(machine).builders[row]().step)
    except Unavailable as error:
        return {"ok": None, "why_not": str(error)}


def sanitizer(machine: Machine, known: Mapping[str, Group]) -> Room:
    """compute-sanitizer's tools on small problems."""
    return {tool: partial(_sanitized, machine, tool) for tool in check.SANITIZERS}


def _sanitized(machine: Machine, tool: str) -> dict[str, Any]:
    result = machine.sanitize(tool, check.SANITIZED, min(SANITIZER_SECONDS, Rows().seconds_left() - 5))
    if result is None:
        return {"ok": None, "why_not": "compute-sanitizer is not installed"}
    return {"ok": result[0], "output": result[1]}


#: Name -> function from the machine and the benchmarks' groups (by name) to the rows.
ROOMS: dict[str, Callable[[Machine, Mapping[str, Group]], Room]] = {
    "correctness": correctness, "repetition": repetition, "step": step, "sanitizer": sanitizer,
}  # fmt: skip
