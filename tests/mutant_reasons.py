"""Why a planted fault may change nothing: rules, each with a condition that is checked for the launch at hand.

A rule names mutants by kernel, family, instruction and change. It holds for one only if its check does. The checks look
at the PTX, or run it with a trap where the rule would be wrong.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mutant_runs import runs_with, watched
from mutant_waits import nobody_uses, nobody_waits, one_warpgroup, passes_anyway, waits_for_nothing
from ptx_emulator import cuda
from ptx_emulator.core.forms import bulk_forms
from ptx_emulator.core.forms.mbarriers import MBarriers
from ptx_emulator.core.tensor_maps import FIELDS
from ptx_emulator.mutants import Mutant, Subject
from ptx_emulator.mutants.judge import as_numbers, difference
from ptx_emulator.mutants.text import instructions, split
from test_ptx_cuda import NVCC

REGISTERS = 1 << 16  # of a multiprocessor, which a CTA may have
Check = Callable[[Subject, Mutant], bool]


@dataclass(frozen=True)
class Rule:
    """A reason for which mutants are equivalent to the launch they were made of."""

    family: str
    instruction: str  # a pattern that is found in it
    change: str  # a pattern that is found in it
    why: str
    holds: Check
    kernels: str = ""  # a pattern that is found in the subject's name
    proof: bool = True  # whether it holds by itself, not because many runs show nothing


def reason(subject: Subject, mutant: Mutant) -> str:
    """The first rule that names the mutant and holds; "" where there is none."""
    return _told(subject, mutant, RULES)


def proof(subject: Subject, mutant: Mutant) -> str:
    """The same of the rules that need no runs of the mutant but one."""
    return _told(subject, mutant, [rule for rule in RULES if rule.proof])


def _told(subject: Subject, mutant: Mutant, rules: Iterable[Rule]) -> str:
    for rule in rules:
        named = rule.family == mutant.family and re.search(rule.kernels, subject.name)
        named = named and re.search(rule.instruction, mutant.instruction) and re.search(rule.change, mutant.change)
        if named and rule.holds(subject, mutant):
            return rule.why
    return ""


def _bare(text: str) -> str:
    """PTX without comments and debug lines."""
    return re.sub(r"//[^\n]*|^\s*\.loc[^\n]*$", "", text, flags=re.M)


def _rest(subject: Subject, mutant: Mutant) -> str:
    """The PTX behind the instruction."""
    return _bare(subject.record.ptx[mutant.at :]).partition(";")[2]


def followed_by(pattern: str) -> Check:
    """What comes next is such an instruction; braces, labels and a jump may lie between."""

    def holds(subject: Subject, mutant: Mutant) -> bool:
        rest = _rest(subject, mutant)
        jump = re.match(r"\s*bra\.uni\s+([$\w]+);", rest)
        if jump:
            rest = _bare(subject.record.ptx).partition(f"{jump[1]}:")[2]
        return re.match(rf"(?:[\s{{}}]|[$\w]+:)*(?:{pattern})", rest) is not None

    return holds


#: what reads or writes memory, by the root of its name, but for parameters
_ACCESS = r"(?<![\w.])(?:ld(?!\.param)|st|atom|red|cp|mbarrier|wgmma|ldmatrix|stmatrix|tensormap)\.[\w.:]+"
_INIT_FENCE = "fence.mbarrier_init.release.cluster"
UNSEEN = "mbarrier used before its init is visible"


def _once(subject: Subject, before: str) -> bool:
    """The code before a place is no part of a loop: what comes behind it never jumps back."""
    behind = _bare(subject.record.ptx)[len(before) :]
    return all(
        not re.search(rf"bra\S*\s+{re.escape(label)}\s*;", behind) for label in re.findall(r"[$\w]+(?=:\s)", before)
    )


def _finds_init(subject: Subject, ptx: str) -> bool:
    """The emulator reports that an init is not visible to those who use it."""
    buffers = {name: array.copy() for name, array in subject.record.buffers.items()}
    report = cuda.run(replace(subject.record, ptx=ptx, buffers=buffers))
    return UNSEEN in {fault.kind for fault in report.faults}


def releases_inits_alone(subject: Subject, mutant: Mutant) -> bool:
    """Before the barrier, which comes once, threads make mbarriers, fence that, and use them; nothing else in memory.

    The fence with the barrier, released or not, makes the inits visible, and without the fence the relaxed barrier is
    reported. Later arrivals and copies are told by the mbarriers themselves.
    """
    before = _bare(subject.record.ptx[: mutant.at])
    made, fence, used = before.rpartition(_INIT_FENCE)
    touched = (re.findall(_ACCESS, part) for part in (made, used))
    if not fence or not _once(subject, before) or any("mbarrier.init" not in access for access in next(touched)):
        return False
    told = r"mbarrier\.arrive|cp\.async\.bulk\.\S*mbarrier::complete_tx"
    if not all(re.match(told, access) for access in next(touched)):
        return False
    without = re.sub(rf"(?:@!?[%\w$]+\s+)?{re.escape(_INIT_FENCE)}\s*;", "", mutant.record.ptx, count=1)
    return _finds_init(subject, without)


def inits_are_released(subject: Subject, mutant: Mutant) -> bool:
    """All mbarriers are made before a releasing barrier of the cluster, through which all code comes once before this.

    The emulator reports the mutant if that barrier is relaxed too.
    """
    found = re.search(
        r"barrier\.cluster\.arrive(?!\.relaxed)[\w.]*;\s*barrier\.cluster\.wait[\w.]*;", subject.record.ptx
    )
    if not found or found.end() > mutant.at:
        return False
    before, last = _bare(subject.record.ptx[: found.start()]), subject.record.ptx.rindex("mbarrier.init")
    since = _bare(subject.record.ptx[last : found.start()])
    if last > found.start() or not _once(subject, before) or re.search(r"\b(?:bra|ret|exit)\b|[$\w]+:\s", since):
        return False
    relaxed = found[0].replace(".release", "").replace("cluster.arrive", "cluster.arrive.relaxed")
    return _finds_init(subject, mutant.record.ptx[: found.start()] + relaxed + mutant.record.ptx[found.end() :])


def same_boxes(subject: Subject, mutant: Mutant) -> bool:
    """Each copy by a tensor map moves the same elements to the same places: no box reaches what the field changes."""

    def told(box: Any, tile: Any, *_: Any) -> list[Any]:
        return [*(part.tobytes() for part in box), tile.type, tile.fill]

    right, wrong = (
        watched(subject, one.ptx, one.arguments, bulk_forms, "box_places", told)
        for one in (subject.record, mutant.record)
    )
    return bool(right) and right == wrong


def same_arrivals(subject: Subject, mutant: Mutant) -> bool:
    """In each step each mbarrier gets the same arrivals, which release the same clocks: only lanes of a warp swap.

    These lanes have done the same since they last met: no access to memory lies between, nor a label.
    """
    since = re.split(r"\.aligned\b[^;]*;", _bare(subject.record.ptx[: mutant.at]))[-1]
    if re.search(_ACCESS, since) or re.search(r"[$\w]+:\s", since):
        return False

    def told(_: Any, state: MBarriers, b: Any, count: int, *__: Any) -> Any:
        clocks = (b.arriving.cta, b.arriving.cluster, b.released.cta, b.released.cluster)
        return state.m.step, b.cta, b.address, b.phase, count, *(None if c is None else c.tolist() for c in clocks)

    right, wrong = (
        sorted(watched(subject, ptx, subject.record.arguments, MBarriers, "arrive", told), key=repr)
        for ptx in (subject.record.ptx, mutant.record.ptx)
    )
    return bool(right) and right == wrong


def beside_another(subject: Subject, mutant: Mutant) -> bool:
    """Between this barrier of the CTA and the one before or behind it is neither memory nor a branch nor a label."""
    before = _bare(subject.record.ptx[: mutant.at]).rpartition("bar.sync")
    behind = _rest(subject, mutant).partition("bar.sync")
    quiet = [part for part, sign in ((before[2], before[1]), (behind[0], behind[1])) if sign]
    busy = r"\b(?:ld|st|atom|red|cp|mbarrier|wgmma|ldmatrix|stmatrix|tensormap|fence|barrier|bra|ret)\b|[\w$]+:\s"
    return any(not re.search(busy, part) for part in quiet)


def separates_nothing(subject: Subject, mutant: Mutant) -> bool:
    """More drawn schedules: no finding, and every bit of the outputs as it was."""
    right = subject.right()
    for seed in range(2, 6):
        buffers = {name: array.copy() for name, array in subject.record.buffers.items()}
        report = cuda.run(replace(mutant.record, buffers=buffers), landing="random", seed=seed)
        if report.faults or any(difference(right[n], as_numbers(buffers[n], k)) for n, k in subject.outputs.items()):
            return False
    return True


def unused_leading_offset(subject: Subject, mutant: Mutant) -> bool:
    """The operand is swizzled whenever the product runs; if it is transposed, it is no wider than the swizzle."""
    shape = re.search(r"\.m64n(\d+)k\d+\.", mutant.instruction)
    assert shape is not None
    operands = split(mutant.instruction.rstrip(";").partition(" ")[2])  # D, A, B, scale-d, signs, transposes
    first = mutant.change.split(" of ")[1].startswith("A")
    descriptor, transposes = operands[1 if first else 2], operands[6:]
    transposed = bool(transposes) and transposes[0 if first else -1] == "1"
    if transposed and (64 if first else int(shape[1])) > 64:
        return False
    wrong = "setp.ne.u64 differs, mode, 1;" if transposed else "setp.eq.u64 differs, mode, 0;"
    code = f"{{ .reg .b64 mode; .reg .pred differs; shr.u64 mode, {descriptor}, 62; {wrong} @differs trap; }} "
    return runs_with(subject, mutant.at, code)  # the four changes of the field ask the same


def already_zero(subject: Subject, mutant: Mutant) -> bool:
    """The field of the map that the kernel makes holds what the instruction would write there: zero."""
    found = next(one for one in instructions(subject.record.ptx) if one.start == mutant.at)
    place, _ = FIELDS[found.opcode.split(".")[3]]
    start = found.operands[0].strip("[] ").partition("+")[0].strip()
    guard = (
        f"{'not' * found.negated or 'mov'}.pred under, {found.guard};" if found.guard else "setp.eq.u32 under, 0, 0;"
    )
    code = (
        f"{{ .reg .b32 held; .reg .pred differs, under; {guard} ld.shared.u8 held, [{start}+{place}]; "
        f"setp.ne.u32 differs, held, 0; and.pred differs, differs, under; @differs trap; }} "
    )
    return int(found.operands[-1], 0) == 0 and runs_with(subject, mutant.at, code)


def fits_without(subject: Subject, mutant: Mutant) -> bool:
    """ptxas gives the kernel no more registers than the launch gives a thread, and spills none."""
    assert NVCC is not None, "the kernels with setmaxnreg are compiled by nvcc"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        # Source lines name strings of the module, which a kernel's record does not have.
        path.write_text(re.sub(r"^\s*\.loc\b[^\n]*$", "", mutant.record.ptx, flags=re.M))
        ptxas = [str(Path(NVCC).with_name("ptxas")), "-arch=sm_90a", "-v", str(path), "-o", str(path) + ".o"]
        done = subprocess.run(ptxas, capture_output=True, text=True)
    said = done.stdout + done.stderr
    used = re.search(r"Used (\d+) registers", said)
    assert used is not None, f"ptxas ended with {done.returncode}: {said}"
    return "0 bytes spill stores" in said and int(used[1]) * subject.record.block[0] <= REGISTERS


RULES: tuple[Rule, ...] = (
    Rule(
        "descriptor", "wgmma", "leading byte offset",
        "the leading byte offset has no meaning for an operand under a swizzle that is no wider than the swizzle",
        unused_leading_offset,
    ),
    Rule(
        "tensor map", r"tensormap\.replace\.tile\.(?:fill_mode|interleave_layout)", "deleted",
        "the kernel filled the map with zeros before, and zero is what is written",
        already_zero,
    ),
    Rule(
        "tensor map", "", "",
        "no box reaches what the field says: each copy moves the same elements to the same places",
        same_boxes,
    ),
    Rule(
        "rank", "mapa", "flipped",
        "lanes of one warp that have done the same swap their mbarriers: each gets the same arrivals and clocks",
        same_arrivals,
    ),
    Rule(
        "order", r"barrier\.cluster\.arrive", "relaxed",
        "nothing but inits of mbarriers lies before it, which the fence behind them makes visible",
        releases_inits_alone,
    ),
    Rule(
        "barrier", r"bar\.warp\.sync", "deleted",
        "the warp's lanes wait for each other at the barrier of the cluster behind it",
        followed_by(r"barrier\.cluster\.arrive"),
    ),
    Rule(
        "fence", r"fence\.mbarrier_init", "deleted",
        "the releasing barrier of the cluster behind it makes the inits visible",
        lambda subject, mutant: ".release" in re.findall(r"cluster\.arrive[\w.]*", _rest(subject, mutant))[0],
    ),
    Rule(
        "fence", r"fence\.mbarrier_init", "deleted",
        "a releasing barrier of the cluster before it has made the inits visible",
        inits_are_released,
    ),
    Rule(
        "barrier", r"bar\.sync", "deleted",
        "another barrier of the CTA stands beside it, with no access to memory between them",
        beside_another,
    ),
    Rule(
        "barrier", r"bar\.sync", "deleted",
        "separates nothing: without it the race check, which goes by clocks, finds no two warps at one word of shared "
        "memory, and eight schedules and landings keep every bit",
        separates_nothing,
        proof=False,
    ),
    *(
        Rule(
            family, r"cp\.async\.(?:commit|wait)_", "",
            "nothing in flight: the check of asynchronous copies finds none that is read or overwritten before it is "
            "waited for, and eight schedules and landings keep every bit",
            separates_nothing,
            proof=False,
        )
        for family in ("commit", "wait")
    ),
    Rule(
        "registers", r"setmaxnreg\.inc", "deleted",
        "ptxas gives the kernel without it as many registers as the launch gives a thread, and spills none",
        fits_without,
    ),
    Rule(
        "commit", r"cp\.async\.bulk\.commit_group", "deleted",
        "the kernel has no bulk copy that a group counts",
        lambda subject, mutant: ".bulk_group" not in subject.record.ptx,
    ),
    Rule(
        "wait", r"cp\.async\.bulk\.wait_group", "",
        "the kernel has no bulk copy that a group counts",
        lambda subject, mutant: ".bulk_group" not in subject.record.ptx,
    ),
    Rule(
        "wait", r"cp\.async\.bulk\.wait_group\.read", "",
        "waits for nothing: whenever a thread comes there, it knows that each group which it would wait for was read",
        waits_for_nothing,
    ),
    Rule(
        "arrival", r"mbarrier\.init", "deleted",
        "nobody uses the mbarrier: this launch has no such tiles",
        nobody_uses,
    ),
    *(
        Rule(
            family, r"mbarrier\.(?:init|arrive)", "",
            "nobody waits for a phase of the mbarrier: in this launch its ring does not come back to its place",
            nobody_waits,
        )
        for family in ("arrival", "expected arrivals", "order")
    ),
    *(
        Rule(
            family, r"mbarrier\.try_wait", change,
            "the wait is for the phase before the first each time, which is over, and acquires nothing",
            passes_anyway,
        )
        for family, change in (("wait", "passes at once"), ("order", "relaxed"))
    ),
    Rule(
        "expected arrivals", r"mbarrier\.init", r"count - 1",
        "the arrivals are of one warpgroup, whose warps have waited for the same products: three tell as much as four",
        one_warpgroup,
    ),
    Rule(
        "wait", r"mbarrier\.try_wait|cp\.async\.bulk\.wait_group\.read", "",
        "orders nothing in this launch that other waits do not: without it the race check, which goes by clocks, finds "
        "nothing, and eight schedules and landings keep every bit",
        separates_nothing,
        proof=False,
    ),
)  # fmt: skip
