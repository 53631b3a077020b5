"""Faults planted in the PTX, to see that the emulator's checks see them: a barrier, a wait, a mask less.

Each kernel of a run is kept with its memory before and after. A mutant runs on that memory alone, so it costs one
launch, and is caught if the emulator reports a fault, or if what the kernel wrote changes by more than eager's own
rounding would. One that is not caught gets the reason, which the emulator's checks allow to tell:

- They order accesses to shared memory by the barriers between them, not by the emulator's own order. So a barrier
  whose loss they do not see lies between no two accesses of different warps to one word, on any path that ran.
- The same holds for a wait: nothing that was in flight is read before another wait.
- And for a proxy fence: the emulator knows of each word when it was written and who has passed a fence since, so
  without this one no wgmma reads anything that was written after the writer's or the reader's last fence.
- A second mutant, the probe, faults if the guard ever is false. If it does not, the guard kept nothing out here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from ptx_emulator.targets import Target, target
from ptx_emulator.triton.driver import Argument, Launch, offline_driver
from ptx_emulator.triton.launcher import EmulationFault, Emulator
from rich.table import Table
from torch import Tensor

from cast_kernels.evidence.cases import KINDS, Case, poisoned_memory, run
from cast_kernels.evidence.console import wide_console

#: Relative root mean square by which a mutant must change an output to be caught by its value: eager's own error in
#: bfloat16 is 2e-3 of an output, and the gate is twice that.
THRESHOLD = 4e-3

#: Reasons for which a mutant computes the same as the kernel did, on every path that ran.
HARMLESS = (
    "separates nothing",
    "nothing in flight",
    "nothing to fence",
    "guard never false",
    "reads inside, uses nothing",
    "stores what another lane stores",
)

#: Sizes that fill no tile: rows, channels of the streams and of the bottleneck, three steps of each contraction.
CASE = Case(2, 3, 7, 96, 112, 7, scaled=True)

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


#: Kinds that order accesses -> what is known of one that nothing saw; each has a check of its own in the emulator.
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
    """What happened to a mutant."""

    mutant: Mutant
    caught_by: str  # a fault's kind, "values", or "" if nothing saw it
    change: float  # relative change of the output that changed most, infinite for what became NaN; 0 after a fault
    why: str = ""  # nothing saw it


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
    arguments, fault = _run(capture, mutant)
    if fault:
        return Verdict(mutant, fault.kinds[0], 0.0)
    pairs = zip(capture.launch.arguments, arguments, strict=True)
    change = max((_change(right, wrong, capture.after) for right, wrong in pairs), default=0.0)
    if change > THRESHOLD:
        return Verdict(mutant, "values", change)
    return Verdict(mutant, "", change, _why(capture, mutant, change))


def _run(capture: _Capture, mutant: Mutant) -> tuple[tuple[Argument, ...], EmulationFault | None]:
    """The arguments as the mutant left them, on memory of its own, and the fault that ended it."""
    memory = {address: storage.clone() for address, storage in capture.before.items()}
    arguments = tuple(_moved(argument, memory) for argument in capture.launch.arguments)
    try:
        Emulator(lambda _: mutant.text).launch(replace(capture.launch, arguments=arguments))
    except EmulationFault as fault:
        return arguments, fault
    return arguments, None


#: Where no buffer is: added to an address by a probe.
_NOWHERE = 1 << 40


def probe(mutant: Mutant) -> Mutant | None:
    """The kernel as it was, with an access to nowhere wherever the mutant's guard is false; None without a guard."""
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


def _why(capture: _Capture, mutant: Mutant, change: float) -> str:
    """Why nothing saw the mutant."""
    if change:
        return f"changes values by {change:.1e} only"
    if mutant.kind in _ORDER:
        return _ORDER[mutant.kind]
    probing = probe(mutant)
    if probing is None:
        return "unknown"
    if _run(capture, probing)[1] is None:
        return "guard never false"
    return "stores what another lane stores" if mutant.kind == "mask of a store" else "reads inside, uses nothing"


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
        run(case, "triton", **KINDS[dtype]._asdict())
        verdicts = []
        for capture in emulator.captures.values():
            planted = list(mutants(capture.launch.kernel, capture.launch.asm["ptx"]))
            verdicts += [try_mutant(capture, mutant) for mutant in planted[::every]]
    return verdicts


def render(goal: Target, verdicts: Sequence[Verdict]) -> Table:
    """Kernel and kind, how many were planted, what caught them, and why nothing caught the others."""
    table = Table("kernel", "taken away", "planted", "caught", "by", "not caught, because", title_justify="left")
    table.title = f"{goal.name}: faults planted in the PTX, executed in emulation"
    for kernel, kind in dict.fromkeys((v.mutant.kernel, v.mutant.kind) for v in verdicts):
        group = [v for v in verdicts if (v.mutant.kernel, v.mutant.kind) == (kernel, kind)]
        caught = [v.caught_by for v in group if v.caught_by]
        reasons = [v.why for v in group if not v.caught_by]
        table.add_row(kernel, kind, str(len(group)), str(len(caught)), _counted(caught), _counted(reasons))
    return table


def _counted(words: Sequence[str]) -> str:
    return ", ".join(f"{word} {words.count(word)}" for word in dict.fromkeys(words))


def main(targets: Sequence[str], dtypes: Sequence[str], case: Case, json_file: Path | None = None) -> int:
    """Plant all faults and print the tables; the exit code is 1 if one is not caught and no reason is known.

    Args:
        targets: names of targets.
        dtypes: keys of :data:`~cast_kernels.evidence.cases.DTYPES`.
        case: each mutant runs one of its launches.
        json_file: where every mutant goes as JSON.
    """
    console, told, open_questions = wide_console(), [], 0
    for goal in [target(name) for name in targets]:
        for dtype in dtypes:
            verdicts = judge(goal, case, dtype)
            console.print(render(goal, verdicts))
            caught = sum(bool(v.caught_by) for v in verdicts)
            unknown = [v for v in verdicts if not v.caught_by and v.why not in HARMLESS]
            console.print(
                f"{goal.name} {dtype}, {case}: {len(verdicts)} planted, {caught} caught, "
                f"{len(verdicts) - caught - len(unknown)} harmless, {len(unknown)} missed",
                markup=False,
                soft_wrap=True,
            )
            for verdict in unknown:
                mutant = verdict.mutant
                line = f"missed  {mutant.kernel}:{mutant.line}  {mutant.instruction}  {verdict.why}"
                console.print(line, markup=False, soft_wrap=True)
            open_questions += len(unknown)
            told += [_as_json(goal, dtype, verdict) for verdict in verdicts]
    if json_file:
        json_file.write_text(json.dumps(told, indent=1) + "\n")
    return 1 if open_questions else 0


def _as_json(goal: Target, dtype: str, verdict: Verdict) -> dict[str, str | int]:
    mutant = verdict.mutant
    return {
        "target": goal.name, "dtype": dtype, "kernel": mutant.kernel, "kind": mutant.kind, "line": mutant.line,
        "instruction": mutant.instruction, "caught_by": verdict.caught_by, "why": verdict.why,
    }  # fmt: skip
