"""Running a kernel over its grid, a batch of CTAs at a time."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ptx_emulator.core import instructions  # noqa: F401  (registers them)
from ptx_emulator.core.counters import Counters
from ptx_emulator.core.errors import SharedLimit, Unsupported
from ptx_emulator.core.execute import Machine
from ptx_emulator.core.findings import NOTES, Fault
from ptx_emulator.core.forms.bulk import LANDINGS
from ptx_emulator.core.kernel import Kernel
from ptx_emulator.core.memory import Memory
from ptx_emulator.core.parameters import Argument, pack
from ptx_emulator.core.program import Program, compile_kernel

#: Target -> bytes of shared memory that a CTA may have: 163 KiB and 227 KiB.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448}
MOST_CTAS = 16  #: of a cluster, which a GPU may be asked for

#: Name -> the machine that runs a batch. `ptx_emulator.native` adds "native".
ENGINES: dict[str, type[Machine]] = {"interpreter": Machine}


@dataclass
class Report:
    """What a launch did: counters summed over all CTAs, their number, and the findings of the checks."""

    counters: Counters = field(default_factory=Counters)  #: summed over all CTAs that ran
    faults: list[Fault] = field(default_factory=list)  #: findings of the checks
    notes: list[Fault] = field(default_factory=list)  #: writes of values that agree; reads of nothing
    ctas: int = 0  #: how many ran
    engine: str = "interpreter"  #: by which they ran
    interpreted: Counter[str] = field(
        default_factory=Counter
    )  #: opcode -> warp instructions that the engine has no code for


def launch(
    kernel: Kernel,
    *,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[Argument],
    memory: Memory,
    shared_bytes: int = 0,
    target: str = "sm_80",
    clusters: int | tuple[int, int, int] | None = None,
    landing: str = "late",
    seed: int | None = None,
    checks: bool = True,
    ctas: Sequence[int] | None = None,
    engine: str | None = None,
    lane_order: bool = False,
) -> Report:
    """Execute a kernel.

    Args:
        kernel: from `parse(...).kernels`.
        grid: CTAs along x, y and z.
        threads: threads of a CTA, along x; a multiple of 32, at most 1024.
        arguments: one number per parameter, addresses as `Memory.register` gave them; a `TensorMap`, or the bytes of a
            struct; for any parameter its bytes. Two missing at the end are zero: Triton's scratch pointers.
        memory: the global memory; `memory.write_back()` brings results to the registered arrays.
        shared_bytes: dynamic shared memory.
        target: "sm_80" or "sm_90"; sets the limit of shared memory and whether wgmma exists.
        clusters: CTAs in a cluster, along x or along x, y and z. None: what the kernel requires, else 1.
        landing: when bulk copies land: "early", as they are issued; "late", when nothing else can go on; "random", in
            between, which needs a seed.
        seed: run warps by priorities drawn from it, so that one may run far ahead. None: together, in program order.
        checks: look for shared-memory races and reads of data in flight. Bounds and alignment are checked always.
        ctas: numbers of the CTAs to run, x fastest; None: all. A few are enough to count.
        engine: "interpreter", which is the definition, or "native": compiled code, and the interpreter for what it
            lacks, which the report counts. None: `default_engine()`; the report says which it was.
        lane_order: among the checks look for shared memory that lanes of one warp exchange without having met, at a
            `bar.warp.sync` or another barrier. By the interpreter alone.

    Returns:
        Counters, and the findings of the checks, which are no errors.

    Raises:
        ValueError: a bad launch.
        SharedLimit: more shared memory than the target has.
        EmulationError: another of them, where the kernel goes wrong.
    """
    if target not in SHARED_LIMIT:
        raise ValueError(f"target {target!r}: choose one of {', '.join(SHARED_LIMIT)}")
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid {grid}: three numbers of at least 1")
    if threads % 32 or not 32 <= threads <= 1024:
        raise ValueError(f"threads={threads}: a multiple of 32 from 32 to 1024")
    if kernel.required_threads not in (None, threads) or threads > (kernel.max_threads or 1024):
        raise ValueError(
            f"threads={threads}, but {kernel.name} asks for {kernel.required_threads or kernel.max_threads}"
        )
    if landing not in LANDINGS:
        raise ValueError(f"landing={landing!r}: choose one of {', '.join(LANDINGS)}")
    if landing == "random" and seed is None:
        raise ValueError("landing='random' draws from a seed: pass seed=0")
    shape = _cluster(kernel, clusters, grid)
    if kernel.shared_bytes + shared_bytes > SHARED_LIMIT[target]:
        raise SharedLimit(
            f"{kernel.name} asks for {kernel.shared_bytes} static + {shared_bytes} dynamic bytes of shared memory; "
            f"{target} gives a CTA {SHARED_LIMIT[target]}"
        )
    engine = engine or default_engine(lane_order)
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: choose one of {', '.join(ENGINES)}")
    if lane_order and not ENGINES[engine].sees_lanes:
        raise ValueError(f"engine={engine!r} does not look at the order of lanes: use 'interpreter'")
    parameters = pack(kernel, arguments)
    program = _program(kernel, target)
    numbers = _by_cluster(grid, shape, ctas)
    report = Report(ctas=len(numbers), engine=engine)
    size = math.prod(shape)
    lanes = 0 if lane_order else ENGINES[engine].lanes_of_batch(program, threads, size)
    batch = max(1, lanes // threads // size) * size
    faults: dict[tuple[str, int, int], Fault] = {}  # by kind and pair of instructions, the first CTA's
    with np.errstate(all="ignore"):
        for first in range(0, report.ctas, batch):
            machine = ENGINES[engine](
                program,
                numbers[first : first + batch],
                grid,
                threads,
                parameters,
                memory,
                shared_bytes,
                report.counters,
                checks,
                shape,
                landing,
                seed,
                lane_order,
            )
            machine.run()
            report.interpreted += machine.interpreted
            if machine.checker is not None:
                faults = {**machine.checker.faults, **faults}
            machine.forget()
    report.notes = [fault for fault in faults.values() if fault.kind in NOTES]
    report.faults = [fault for fault in faults.values() if fault.kind not in NOTES]
    return report


def default_engine(lane_order: bool = False) -> str:
    """The engine of a launch that names none: "native" where it is built, else "interpreter".

    lane_order: the launch is to look at the order of lanes, which the interpreter alone does.
    """
    return next(name for name in reversed(ENGINES) if ENGINES[name].built() and ENGINES[name].sees_lanes >= lane_order)


def _cluster(kernel: Kernel, asked: int | tuple[int, int, int] | None, grid: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of a cluster. Raises ValueError where kernel, launch and grid disagree."""
    shape = (asked, 1, 1) if isinstance(asked, int) else asked or kernel.cluster or (1, 1, 1)
    if kernel.cluster is not None and shape != kernel.cluster:
        raise ValueError(f"clusters of {shape}, but {kernel.name} requires {kernel.cluster}")
    if min(shape) < 1 or math.prod(shape) > MOST_CTAS:
        raise ValueError(f"clusters of {shape}: 1 to {MOST_CTAS} CTAs")
    if any(count % size for count, size in zip(grid, shape, strict=True)):
        raise ValueError(f"grid {grid} is no whole number of clusters of {shape}")
    return shape


def _by_cluster(grid: tuple[int, int, int], shape: tuple[int, int, int], ctas: Sequence[int] | None) -> np.ndarray:
    """The numbers of the CTAs to run, those of a cluster side by side in the order of their ranks."""
    (x, y, z), (a, b, c) = grid, shape
    boxes = np.arange(x * y * z).reshape(z // c, c, y // b, b, x // a, a)
    numbers = boxes.transpose(0, 2, 4, 1, 3, 5).reshape(-1)
    if ctas is None:
        return numbers
    chosen = np.isin(numbers, np.array(ctas)).reshape(-1, math.prod(shape))
    if (chosen.any(1) != chosen.all(1)).any():
        raise ValueError(f"ctas {list(ctas)} has a part of a cluster of {shape}")
    return np.array(ctas) if math.prod(shape) == 1 else numbers[chosen.reshape(-1)]


def _program(kernel: Kernel, target: str) -> Program:
    """The decoded kernel, kept with it."""
    if target == "sm_80":
        for number in kernel.instructions.of("wgmma", "stmatrix", "elect", "setmaxnreg"):
            ins = kernel.instructions[number]
            raise Unsupported(f"unsupported: {target} has no {ins.root}: {ins.text}")
    program = kernel.__dict__.get("program")
    if program is None:
        program = compile_kernel(kernel)
        kernel.__dict__["program"] = program
    return program
