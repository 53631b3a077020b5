"""The gates for every kernel of csrc/cuda, and the exceptions: their limits and reasons.

The gates find faults that a GPU would show late or not at all: wgmmas that ptxas serialised, spills in loops,
warpgroups that wait for registers forever, a second CTA that does not fit, and known defects of a ptxas release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ptx_emulator.targets import target

#: The kernels' target.
TARGET = target("sm_90")
#: Module -> number of CTAs that an SM must hold: two CTAs of a row kernel hide each other's epilogues.
DESIGNED = {
    "bcast_prepare": 1, "bcast_project": 2, "bcast_attention": 2, "bcast_exchange": 2, "bcast_exchange_backward": 2,
    "bcast_attention_backward": 2, "bcast_project_backward": 2, "bcast_position_sums": 4, "bcast_weight_gradient": 1,
    "bcast_finish": 3,
}  # fmt: skip
#: Limit for the build's processor time, on two idle cores.
MOST_SECONDS = 240
MOST_BYTES = 8_000_000


class Spilling(NamedTuple):
    """The allowed number of spill instructions inside loops of one kernel, and the reason."""

    instructions: int
    reason: str


#: Kernel -> its exception, which the command prints. No kernel needs one.
EXCEPTIONS: dict[str, Spilling] = {}
#: The assembler for which the numbers are exact.
EXACT = "13.0.88"


@dataclass(frozen=True)
class Launched:
    """The product's launch parameters of one kernel, over all its configurations."""

    threads: tuple[int, ...]  # of a CTA; each occurring number
    clusters: tuple[int, ...]
    shared_bytes: int  # dynamic, largest


@dataclass(frozen=True)
class CudaRow:
    """One assembled kernel. Counts are of instructions in the code."""

    module: str
    kernel: str
    launched: Launched | None  # None: no configuration launches it
    threads: int  # of a CTA, as compiled; 0 without launch bounds
    cluster: int  # CTAs, as compiled
    registers: int  # of a thread, at the start of the kernel
    roles: tuple[int, ...]  # arguments of setmaxnreg
    stack_bytes: int  # of a thread
    spills: int
    loop_spills: int  # inside natural loops
    shared_bytes: int  # of a CTA, static and dynamic
    ctas: int  # on one SM; 0 if none fits
    tensor_core: str  # kinds of tensor-core instructions
    tensor_core_count: int
    instructions: int
    functions: int  # .func of the module's PTX
    notes: tuple[str, ...] = ()  # of ptxas: C75xx
    defects: tuple[str, ...] = ()  # known defects of ptxas in the code
    failures: tuple[str, ...] = field(default=())
    allowed: str = ""  # the exception used, with its reason


def judge(row: CudaRow, exceptions: Mapping[str, Spilling] = EXCEPTIONS) -> CudaRow:
    """The row with its failed gates and its used exception."""
    failures = [*_launch(row), *_registers(row), *_fitting(row), *row.notes, *row.defects]
    if row.functions:
        failures.append(f"{row.functions} .func in the PTX of {row.module}: a kernel must be all inline")
    allowed, exception = "", exceptions.get(row.kernel)
    spilled = f"{row.loop_spills} spill instructions inside loops"
    if exception and 0 < row.loop_spills <= exception.instructions:
        allowed = f"{spilled}, {exception.instructions} allowed: {exception.reason}"
    elif row.loop_spills:
        failures.append(spilled + (f"; the exception allows {exception.instructions}" if exception else ""))
    return replace(row, failures=tuple(failures), allowed=allowed)


def _launch(row: CudaRow) -> list[str]:
    """The compiled launch bounds must equal the launch parameters."""
    if row.launched is None:
        return ["no configuration launches it: nothing is known of its shared memory"]
    if not row.threads:
        return ["no launch bounds: ptxas cannot know how many registers there are"]
    found = []
    for what, compiled, launched in (
        ("threads", row.threads, row.launched.threads),
        ("CTAs of a cluster", row.cluster, row.launched.clusters),
    ):
        if launched != (compiled,):
            found.append(f"compiled for {compiled} {what}, launched with {', '.join(map(str, launched))}")
    return found


def _registers(row: CudaRow) -> list[str]:
    """`setmaxnreg.inc` waits forever for registers that no warpgroup releases, and ptxas does not report it."""
    if not row.roles or not row.threads:
        return []
    warpgroups = row.threads // 128
    # Each number belongs to some warpgroup. The others have the largest number, or their initial one.
    most = max(row.roles[-1], row.registers)
    taken = row.roles[-warpgroups:]
    total = sum(taken) + (warpgroups - len(taken)) * most
    if total <= warpgroups * row.registers:
        return []
    numbers = " + ".join(map(str, [*taken, *[most] * (warpgroups - len(taken))]))
    return [f"setmaxnreg asks for {numbers} registers a thread; the kernel begins with {warpgroups} x {row.registers}"]


def _fitting(row: CudaRow) -> list[str]:
    found = []
    if row.shared_bytes > TARGET.shared_limit:
        found.append(f"{row.shared_bytes} bytes of shared memory; {TARGET.name} allows {TARGET.shared_limit}")
    if row.module not in DESIGNED:
        found.append(f"{row.module} has no line in DESIGNED: how many CTAs must an SM hold?")
    elif row.ctas < DESIGNED[row.module]:
        found.append(f"an SM holds {row.ctas} CTAs, designed for {DESIGNED[row.module]}")
    return found


def loose(rows: Sequence[CudaRow], exceptions: Mapping[str, Spilling] = EXCEPTIONS) -> list[str]:
    """A message for each exception that allows more than its kernel has: the difference would hide the next spill.

    Args:
        rows: of all kernels, by the assembler of :data:`EXACT`.
        exceptions: by kernel.
    """
    found, known = [], {row.kernel: row.loop_spills for row in rows}
    for kernel, exception in exceptions.items():
        if kernel not in known:
            found.append(f"there is no kernel {kernel}, which has an exception")
        elif known[kernel] < exception.instructions:
            allowed = f"the exception allows {exception.instructions} spill instructions inside loops"
            found.append(f"{kernel}: {allowed}, there are {known[kernel]}")
    return found


def judge_build(record: Mapping[str, Any], module_bytes: int) -> list[str]:
    """The failed gates of the build itself.

    Args:
        record: setup.py's record; without "processor_seconds" if it did not build the module.
        module_bytes: size of the module.
    """
    found = []
    if record.get("processor_seconds", 0) > MOST_SECONDS:
        found.append(f"the build took {record['processor_seconds']} s of processor time; {MOST_SECONDS} are allowed")
    if module_bytes > MOST_BYTES:
        found.append(f"the module has {module_bytes} bytes; {MOST_BYTES} are allowed")
    return found
