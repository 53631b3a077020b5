"""Faults planted in the PTX, to test the emulator's checks: one barrier, wait or mask fewer.

Each kernel of a run is kept with its memory before and after. A mutant runs on that memory, so it needs one launch. It
is caught if the emulator reports a fault, or if the kernel's output changes by more than eager's own rounding. A mutant
that is not caught gets a reason. The emulator's checks determine it:

- The checks order accesses to shared memory by barriers, not by the emulator's own order. So if they do not miss a
  barrier, it separates no two accesses of different warps to one word, on any executed path.
- The same holds for a wait: nothing in flight is read before another wait.
- And for a proxy fence: for each word the emulator knows its last write and the warps that have passed a fence since.
  So without this fence no wgmma reads anything written after the writer's or the reader's last fence.
- If one of these three is missing, warps also run far apart, by priorities from two seeds. There is no finding
  either, and all bits are equal.
- A second mutant, the probe, faults if the guard is ever false. If it does not fault, the guard excluded nothing.
- A store's guard excludes some lanes. If these lanes alone change nothing in the kernel's final memory, they store
  what another lane stores. So a store to a wrong place does not pass because a later store repairs it.
"""

from __future__ import annotations

import gc
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from ptx_emulator.targets import Target
from ptx_emulator.triton.driver import Argument, Launch, offline_driver
from ptx_emulator.triton.launcher import EmulationFault, Emulator
from torch import Tensor

from cast_kernels.evidence.cases import KINDS, Case, Kind, poisoned_memory, run
from cast_kernels.evidence.experts import run_expert
from cast_kernels.evidence.problems import PLANTED, AnyCase, Planted
from cast_kernels.triton import tiles

#: A mutant is caught by values if it changes an output by this relative root mean square. Eager's own error in bfloat16
#: is 2e-3 of an output, and the threshold is twice that; float16 has three bits more. In float32 the kernels' products
#: of three tf32 products differ less from eager's.
THRESHOLDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}

#: Reasons why a mutant computes the same as its kernel, on every executed path.
HARMLESS = (
    "separates nothing",
    "nothing in flight",
    "nothing to fence",
    "guard never false",
    "reads inside, uses nothing",
    "stores what another lane stores",
)

#: Seeds of the warps' priorities, for a mutant without an ordering instruction that nothing caught.
SEEDS = (0, 1)

#: Kind -> the removed part of an instruction, and its replacement.
_EDITS: dict[str, tuple[re.Pattern[str], str]] = {
    "barrier": (re.compile(r"^\s*(?:bar\.sync|barrier\.sync)\b[^;]*;"), ""),
    "wait": (re.compile(r"^\s*(?:cp\.async\.wait_(?:group|all)|wgmma\.wait_group)\b[^;]*;"), ""),
    "proxy fence": (re.compile(r"^\s*fence\.proxy\.async\b[^;]*;"), ""),
    "mask of a load": (re.compile(r"@!?%p\d+\s+(?=ld\.global)"), ""),
    "mask of a store": (re.compile(r"@!?%p\d+\s+(?=st\.global)"), ""),
    "mask of a copy": (
        re.compile(r"(cp\.async\.c[ag]\.shared\.global[^;]*?,\s*)(0x[0-9a-f]+|\d+),\s*%r\d+\s*;"),
        r"\1\2;",
    ),
}

#: The kinds, in this order.
TAKEN = tuple(_EDITS)

#: Ordering kinds -> the reason if nothing caught the mutant; the emulator has a check for each.
_ORDER = {"barrier": "separates nothing", "wait": "nothing in flight", "proxy fence": "nothing to fence"}


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    kernel: str
    kind: str
    line: int  # in the PTX, from 1
    instruction: str
    text: str = field(repr=False)  # the whole PTX


@dataclass(frozen=True)
class Verdict:
    """The result of a mutant."""

    mutant: Mutant
    caught_by: str  # a fault's kind, "values", or "" if nothing caught it
    change: float  # relative change of the most changed output, infinite for new NaN; 0 after a fault
    why: str = ""  # if nothing caught it


@dataclass
class _Capture:
    """A kernel's launch with its tensors' storages before and after."""

    launch: Launch
    before: dict[int, Tensor]
    after: dict[int, Tensor]


class CapturingEmulator(Emulator):
    """Keeps each kernel's first launch with its memory before and after."""

    def __init__(self, engine: str | None = None) -> None:
        super().__init__(engine=engine)
        self.captures: dict[str, _Capture] = {}

    def launch(self, launch: Launch) -> None:
        fresh = launch.identity not in self.captures
        before = _storages(launch) if fresh else {}
        super().launch(launch)
        if fresh:
            self.captures[launch.identity] = _Capture(launch, before, _storages(launch))


def _storages(launch: Launch) -> dict[int, Tensor]:
    """Copies of all storages of the launch's tensors, as bytes, by address."""
    tensors = [a.value for a in launch.arguments if a.type.startswith("*")]
    return {t.untyped_storage().data_ptr(): _bytes(t).clone() for t in tensors}


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def mutants(kernel: str, ptx: str) -> Iterator[Mutant]:
    """Every single fault of these kinds."""
    lines = ptx.splitlines()
    for number, line in enumerate(lines, 1):
        for kind, (pattern, replacement) in _EDITS.items():
            edited = pattern.sub(replacement, line, count=1)
            if edited != line:
                text = "\n".join([*lines[: number - 1], edited, *lines[number:]])
                yield Mutant(kernel, kind, number, line.strip(), text)


def try_mutant(
    capture: _Capture, mutant: Mutant, engine: str | None = None, threshold: float = THRESHOLDS[torch.bfloat16]
) -> Verdict:
    """Run the mutant on its kernel's memory.

    Args:
        capture: the kernel's launch.
        mutant: the kernel with a fault.
        engine: of the emulator.
        threshold: relative change of an output above which the mutant is caught.
    """
    kind, change = _run(capture, mutant, engine)
    if not kind and change <= threshold and mutant.kind in _ORDER:
        for seed in SEEDS:  # in the interpreter, as for the committed rows
            kind, other = _run(capture, mutant, "interpreter", seed)
            change = max(change, other)
            if kind or change > threshold:
                break
    if not kind and change <= threshold and mutant.kind == "mask of a store":
        kind, other = _run(capture, _kept_out(mutant), engine, start=capture.after)
        change = max(change, float("inf") if other else 0.0)
    if kind:
        return Verdict(mutant, kind, 0.0)
    if change > threshold:
        return Verdict(mutant, "values", change)
    return Verdict(mutant, "", change, _why(capture, mutant, change, engine))


def _run(
    capture: _Capture, mutant: Mutant, engine: str | None, seed: int | None = None,
    start: Mapping[int, Tensor] | None = None,
) -> tuple[str, float]:  # fmt: skip
    """The emulator's finding or "", and the relative change of the most changed output."""
    memory = {address: storage.clone() for address, storage in (start or capture.before).items()}
    arguments = tuple(_moved(argument, memory) for argument in capture.launch.arguments)
    emulator = Emulator(lambda _: mutant.text, seed=seed, engine=engine)
    try:
        emulator.launch(replace(capture.launch, arguments=arguments))
    except EmulationFault as fault:
        return fault.kinds[0], 0.0
    pairs = zip(capture.launch.arguments, arguments, strict=True)
    return "", max((_change(right, wrong, capture.after) for right, wrong in pairs), default=0.0)


def _kept_out(mutant: Mutant) -> Mutant:
    """The kernel with only one store, for the lanes that the mutant's guard excludes.

    On the kernel's final memory these lanes change nothing if they store what another lane stores. In the mutant itself
    a later store may repair a store to a wrong place, depending on the order of warps and CTAs. This is valid for
    kernels that do not change their inputs; ours do not.
    """
    instruction = re.sub(r"^@(!?)", lambda m: "@" if m[1] else "@!", mutant.instruction)
    lines = [_STORE.sub("", line) for line in mutant.text.splitlines()]
    text = "\n".join([*lines[: mutant.line - 1], instruction, *lines[mutant.line :]])
    return Mutant(mutant.kernel, "kept out", mutant.line, instruction, text)


_STORE = re.compile(r"(@!?%p\d+\s+)?\bst\.global\b[^;]*;")

#: A probe adds this to an address; there is no buffer.
_NOWHERE = 1 << 40


def probe(mutant: Mutant) -> Mutant | None:
    """The original kernel with an access to nowhere where the mutant's guard is false; None without a guard."""
    lines = mutant.text.splitlines()
    address = re.search(r"\[\s*(%rd\d+)\s*\+\s*\d+\s*\]", mutant.instruction)
    guard = re.match(r"@(!?)(%p\d+)\s", mutant.instruction)
    size = re.search(r"(%r\d+)\s*;$", mutant.instruction) if mutant.kind == "mask of a copy" else None
    if address is None or not (guard or size):
        return None
    if guard:
        inverse = "" if guard[1] else "!"
        test = f"{{ .reg .b32 %nowhere; @{inverse}{guard[2]} ld.global.b32 %nowhere, [{address[1]} + {_NOWHERE}]; }}"
    else:
        assert size is not None
        test = (
            f"{{ .reg .pred %none; .reg .b32 %nowhere; setp.eq.b32 %none, {size[1]}, 0; "
            f"@%none ld.global.b32 %nowhere, [{address[1]} + {_NOWHERE}]; }}"
        )
    text = "\n".join([*lines[: mutant.line - 1], test, mutant.instruction, *lines[mutant.line :]])
    return Mutant(mutant.kernel, "probe", mutant.line, mutant.instruction, text)


def _why(capture: _Capture, mutant: Mutant, change: float, engine: str | None) -> str:
    """The reason why nothing caught the mutant."""
    if change:
        return f"changes values by {change:.1e} only"
    if mutant.kind in _ORDER:
        return _ORDER[mutant.kind]
    probing = probe(mutant)
    if probing is None:
        return "unknown"
    if not _run(capture, probing, engine)[0]:
        return "guard never false"
    return "stores what another lane stores" if mutant.kind == "mask of a store" else "reads inside, uses nothing"


def _moved(argument: Argument, memory: dict[int, Tensor]) -> Argument:
    """The argument on a copy of its storage."""
    if not argument.type.startswith("*"):
        return argument
    old = argument.value
    storage = memory[old.untyped_storage().data_ptr()].untyped_storage()
    new = torch.empty(0, dtype=old.dtype).set_(storage, old.storage_offset(), old.size(), old.stride())
    return argument._replace(value=new)


def _change(argument: Argument, moved: Argument, after: dict[int, Tensor]) -> float:
    """Relative change of a tensor that the kernel left; infinite if other elements are NaN."""
    if not argument.type.startswith("*"):
        return 0.0
    right = _moved(argument, after).value.double()
    wrong = moved.value.double()
    if not torch.equal(right.isnan(), wrong.isnan()):
        return float("inf")
    right, wrong = right.nan_to_num(), wrong.nan_to_num()
    size = float(right.square().mean().sqrt()) if right.numel() else 0.0
    error = float((right - wrong).square().mean().sqrt()) if right.numel() else 0.0
    return error / size if size else (float("inf") if error else 0.0)


def captured(
    goal: Target, dtype: str, engine: str | None = None, problems: Mapping[str, Planted] = PLANTED
) -> dict[str, list[_Capture]]:
    """Name of a problem -> its kernels that no earlier problem launches, each with its memory."""
    kind = KINDS[dtype]
    found: dict[str, list[_Capture]] = {}
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as cache:
        for name, problem in problems.items():
            emulator = CapturingEmulator(engine)
            rows = nullcontext() if problem.few_rows else as_for_many_rows(goal, kind, problem.case)
            with rows, offline_driver(goal, emulator, Path(cache)), poisoned_memory():
                if isinstance(problem.case, Case):
                    run(problem.case, "triton", **kind._asdict())
                else:
                    run_expert(problem.case, **kind._asdict())
            new = {capture.launch.asm["ptx"]: capture for capture in emulator.captures.values()}
            found[name] = [capture for ptx, capture in new.items() if ptx not in seen]
            seen |= new.keys()
    return found


def as_for_many_rows(goal: Target, kind: Kind, case: AnyCase) -> AbstractContextManager[None]:
    """While active, no number of rows counts as few: a small problem gets the kernels' tiles for many rows."""
    width = case.bottleneck if isinstance(case, Case) else case.adapter
    key = (goal.name, 8 * kind.compute.itemsize, width)
    return tiles.trying(*key, replace(tiles.find_set(*key), few={}))


def judge(
    goal: Target, dtype: str, every: int = 1, engine: str | None = None, problems: Mapping[str, Planted] = PLANTED,
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, list[Verdict]]]:  # fmt: skip
    """Try the mutants of every kernel of the problems: a problem's name, and the verdicts on its new kernels.

    Args:
        goal: what to compile for.
        dtype: a key of :data:`~cast_kernels.evidence.cases.KINDS`.
        every: take only each n-th mutant of a kernel.
        engine: of the emulator.
        problems: small ones, because each mutant runs a whole launch.
        only: problems whose kernels are mutated; None for all. The others are launched too, so that each kernel belongs
            to the same problem as without this.
    """
    found, threshold = captured(goal, dtype, engine, problems), THRESHOLDS[KINDS[dtype].compute]
    gc.freeze()  # the collector visited all of torch and Triton three times for a mutant: 0.2 to 0.7 s of 0.4 to 1.1
    try:
        for name in found if only is None else [name for name in found if name in only]:
            yield (
                name,
                [
                    try_mutant(capture, mutant, engine, threshold)
                    for capture in found[name]
                    for mutant in list(mutants(capture.launch.kernel, capture.launch.asm["ptx"]))[::every]
                ],
            )
    finally:
        gc.unfreeze()
