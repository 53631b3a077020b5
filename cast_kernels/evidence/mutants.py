"""Faults planted in the PTX, to see that the emulator's checks see them: a barrier, a wait, a mask less.

Each kernel of a run is kept with its memory before and after. A mutant runs on that memory alone, so it costs one
launch, and is caught if the emulator reports a fault, or if what the kernel wrote changes by more than eager's own
rounding would.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.table import Table
from torch import Tensor

from cast_kernels.evidence.cases import DTYPES, Case, poisoned_memory, run
from cast_kernels.evidence.console import wide_console
from cast_kernels.evidence.driver import Argument, Launch, offline_driver
from cast_kernels.evidence.emulator import EmulationFault, Emulator
from cast_kernels.evidence.targets import Target, target

#: Relative root mean square by which a mutant must change an output to be caught by its value: eager's own error in
#: bfloat16 is 2e-3 of an output, and the gate is twice that.
THRESHOLD = 4e-3

#: Kind -> the part of an instruction that is taken away, and what stands there instead.
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
    """What happened to a mutant."""

    mutant: Mutant
    caught_by: str  # a fault's kind, "values", or "" if nothing saw it
    change: float  # relative change of the output that changed most, NaN for what became NaN; 0 after a fault


@dataclass
class _Capture:
    """A kernel's launch with its tensors' storages before it ran and after."""

    launch: Launch
    before: dict[int, Tensor]
    after: dict[int, Tensor]


class CapturingEmulator(Emulator):
    """Keeps each kernel's first launch with its memory before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.captures: dict[str, _Capture] = {}

    def launch(self, launch: Launch) -> None:
        fresh = launch.identity not in self.captures
        before = _storages(launch) if fresh else {}
        super().launch(launch)
        if fresh:
            self.captures[launch.identity] = _Capture(launch, before, _storages(launch))


def _storages(launch: Launch) -> dict[int, Tensor]:
    """Copies of all storages that the launch's tensors view, as bytes, by address."""
    tensors = [a.value for a in launch.arguments if a.type.startswith("*")]
    return {t.untyped_storage().data_ptr(): _bytes(t).clone() for t in tensors}


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def mutants(kernel: str, ptx: str) -> Iterator[Mutant]:
    """Every single fault of the kinds above."""
    lines = ptx.splitlines()
    for number, line in enumerate(lines, 1):
        for kind, (pattern, replacement) in _EDITS.items():
            edited = pattern.sub(replacement, line, count=1)
            if edited != line:
                text = "\n".join([*lines[: number - 1], edited, *lines[number:]])
                yield Mutant(kernel, kind, number, line.strip(), text)


def try_mutant(capture: _Capture, mutant: Mutant) -> Verdict:
    """Run the mutant on the memory that its kernel met."""
    launch = capture.launch
    memory = {address: storage.clone() for address, storage in capture.before.items()}
    arguments = tuple(_moved(a, memory) for a in launch.arguments)
    moved = Launch(launch.kernel, launch.target, launch.grid, arguments, launch.constexprs, launch.asm, launch.metadata)
    try:
        Emulator(lambda _: mutant.text).launch(moved)
    except EmulationFault as fault:
        return Verdict(mutant, fault.kinds[0], 0.0)
    change = max((_change(a, b, capture.after) for a, b in zip(launch.arguments, arguments, strict=True)), default=0.0)
    return Verdict(mutant, "" if change <= THRESHOLD else "values", change)


def _moved(argument: Argument, memory: dict[int, Tensor]) -> Argument:
    """The argument on another copy of its storage."""
    if not argument.type.startswith("*"):
        return argument
    old = argument.value
    storage = memory[old.untyped_storage().data_ptr()].untyped_storage()
    new = torch.empty(0, dtype=old.dtype).set_(storage, old.storage_offset(), old.size(), old.stride())
    return argument._replace(value=new)


def _change(argument: Argument, moved: Argument, after: dict[int, Tensor]) -> float:
    """Relative change of what the kernel left in a tensor; infinite if other elements are NaN than were."""
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


def judge(goal: Target, case: Case, dtype: str, every: int = 1) -> list[Verdict]:
    """Try the mutants of every kernel that the case launches.

    Args:
        goal: what to compile for.
        case: a small one: each mutant runs a whole launch.
        dtype: of streams and parameters.
        every: take each n-th mutant of a kernel only.
    """
    emulator = CapturingEmulator()
    with offline_driver(goal, emulator), poisoned_memory():
        run(case, "triton", DTYPES[dtype])
        verdicts = []
        for capture in emulator.captures.values():
            planted = list(mutants(capture.launch.kernel, capture.launch.asm["ptx"]))
            verdicts += [try_mutant(capture, mutant) for mutant in planted[::every]]
    return verdicts


def render(goal: Target, verdicts: Sequence[Verdict]) -> Table:
    """Kernel and kind, how many were planted, what caught them, and which lines nothing caught."""
    table = Table("kernel", "taken away", "planted", "caught", "by", "missed, at line", title_justify="left")
    table.title = f"{goal.name}: faults planted in the PTX, executed in emulation"
    for kernel, kind in dict.fromkeys((v.mutant.kernel, v.mutant.kind) for v in verdicts):
        group = [v for v in verdicts if (v.mutant.kernel, v.mutant.kind) == (kernel, kind)]
        causes = [v.caught_by for v in group if v.caught_by]
        by = ", ".join(f"{cause} {causes.count(cause)}" for cause in dict.fromkeys(causes))
        missed = ", ".join(str(v.mutant.line) for v in group if not v.caught_by)
        table.add_row(kernel, kind, str(len(group)), str(len(causes)), by, missed)
    return table


def main(targets: Sequence[str], dtypes: Sequence[str], case: Case) -> int:
    """Plant all faults, print the tables; the exit code is 0: what is missed is for the reader to explain."""
    console = wide_console()
    for goal in [target(name) for name in targets]:
        for dtype in dtypes:
            verdicts = judge(goal, case, dtype)
            console.print(render(goal, verdicts))
            caught = sum(bool(v.caught_by) for v in verdicts)
            console.print(f"{goal.name} {dtype}: {caught} of {len(verdicts)} caught", markup=False)
            for verdict in verdicts:
                if not verdict.caught_by:
                    mutant = verdict.mutant
                    console.print(f"missed  {mutant.kernel}:{mutant.line}  {mutant.instruction}", markup=False)
    return 0
