"""Running a kernel over its grid, a batch of CTAs at a time."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ptx_emulator import atomics, convert, copies, floating, integer, loads, matrix, mma, moves, warp, wgmma  # noqa: F401  (they register instructions)
from ptx_emulator.checks import Fault
from ptx_emulator.counters import Counters
from ptx_emulator.errors import SharedLimit, Unsupported
from ptx_emulator.execute import Machine
from ptx_emulator.memory import Memory
from ptx_emulator.program import Program, compile_kernel
from ptx_emulator.syntax import Kernel, Parameter

#: Target -> bytes of shared memory that a CTA may have: 163 KiB and 227 KiB.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448}
BATCH_LANES = (
    16384  # lanes of a batch: enough to hide NumPy's cost per call, few enough for a register to stay in cache
)
SCRATCH_PARAMETERS = 2  # Triton ends every kernel with two pointers to scratch memory that these kernels do not use
_FORMAT = {"f16": "<e", "f32": "<f", "f64": "<d"}


@dataclass
class Report:
    """What a launch did: counters summed over all CTAs, their number, and the findings of the checks."""

    counters: Counters = field(default_factory=Counters)  #: summed over all CTAs that ran
    faults: list[Fault] = field(default_factory=list)  #: findings of the checks
    ctas: int = 0  #: how many ran


def launch(
    kernel: Kernel,
    *,
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[int | float],
    memory: Memory,
    shared_bytes: int = 0,
    target: str = "sm_80",
    clusters: int = 1,
    checks: bool = True,
    ctas: Sequence[int] | None = None,
) -> Report:
    """Execute a kernel.

    Args:
        kernel: from `parse(...).kernels`.
        grid: CTAs along x, y and z.
        threads: threads of a CTA, along x; a multiple of 32, at most 1024.
        arguments: one number per parameter, addresses as `Memory.register` gave them. Two missing at the end are zero:
            Triton's scratch pointers.
        memory: the global memory; `memory.write_back()` brings results to the registered arrays.
        shared_bytes: dynamic shared memory.
        target: "sm_80" or "sm_90"; sets the limit of shared memory and whether wgmma exists.
        clusters: CTAs in a cluster; 1 only.
        checks: look for shared-memory races and reads of data in flight. Bounds and alignment are checked always.
        ctas: numbers of the CTAs to run, x fastest; None: all. A few are enough to count.

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
    if clusters != 1:
        raise Unsupported(f"unsupported: clusters of {clusters} CTAs")
    if kernel.shared_bytes + shared_bytes > SHARED_LIMIT[target]:
        raise SharedLimit(
            f"{kernel.name} asks for {kernel.shared_bytes} static + {shared_bytes} dynamic bytes of shared memory; "
            f"{target} gives a CTA {SHARED_LIMIT[target]}"
        )
    parameters = pack(kernel, arguments)
    program = _program(kernel, target)
    numbers = np.arange(grid[0] * grid[1] * grid[2]) if ctas is None else np.array(ctas)
    report = Report(ctas=len(numbers))
    batch = max(1, BATCH_LANES // threads)
    faults: dict[tuple[str, int, int], Fault] = {}  # by kind and pair of instructions, the first CTA's
    with np.errstate(all="ignore"):
        for first in range(0, report.ctas, batch):
            machine = Machine(
                program,
                numbers[first : first + batch],
                grid,
                threads,
                parameters,
                memory,
                shared_bytes,
                report.counters,
                checks,
            )
            machine.run()
            if machine.checker is not None:
                faults = {**machine.checker.faults, **faults}
    report.faults = list(faults.values())
    return report


def _program(kernel: Kernel, target: str) -> Program:
    """The decoded kernel, kept with it."""
    if target == "sm_80":
        for ins in kernel.instructions:
            if ins.root in ("wgmma", "stmatrix", "elect", "setmaxnreg"):
                raise Unsupported(f"unsupported: {target} has no {ins.root}: {ins.text}")
    program = kernel.__dict__.get("program")
    if program is None:
        program = compile_kernel(kernel)
        kernel.__dict__["program"] = program
    return program


def pack(kernel: Kernel, arguments: Sequence[int | float]) -> np.ndarray:
    """The parameter space of a launch as bytes. Raises ValueError or TypeError for arguments that do not fit."""
    wanted = len(kernel.parameter_list)
    values = list(arguments)
    if len(values) == wanted - SCRATCH_PARAMETERS:
        values += [0] * SCRATCH_PARAMETERS
    if len(values) != wanted:
        raise ValueError(f"{kernel.name} has {wanted} parameters, {len(arguments)} arguments were given")
    last = kernel.parameter_list[-1] if wanted else None
    space = np.zeros(last.offset + last.size if last else 0, np.uint8)
    for parameter, value in zip(kernel.parameter_list, values, strict=True):
        space[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(_bytes(parameter, value), np.uint8)
    return space


def _bytes(parameter: Parameter, value: int | float) -> bytes:
    if isinstance(value, float | np.floating):
        kind = parameter.type if parameter.type in _FORMAT else {4: "f32", 8: "f64"}.get(parameter.size)
        if kind is None or parameter.type[0] in "us":
            raise TypeError(f"parameter {parameter.name} is .{parameter.type}; it cannot take the float {value}")
        return struct.pack(_FORMAT[kind], float(value))
    if isinstance(value, int | np.integer | bool):
        if parameter.type in _FORMAT:
            return struct.pack(_FORMAT[parameter.type], float(value))
        bits = 8 * parameter.size
        if not -(1 << (bits - 1)) <= int(value) < 1 << bits:
            raise ValueError(f"parameter {parameter.name} has {bits} bits; {value} does not fit")
        return (int(value) & ((1 << bits) - 1)).to_bytes(parameter.size, "little")
    raise TypeError(f"parameter {parameter.name} takes a number, not {type(value).__name__}")
