"""Launches that run: hands PTX, grid and the tensors' memory to the emulator.

A kernel may touch exactly the bytes that its tensor arguments span, and nothing between them: each span is a buffer
of its own in the emulated memory, with unmapped addresses around it.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

import ptx_emulator
from ptx_emulator.triton.driver import Argument, Launch


class EmulationFault(RuntimeError):
    """A kernel did what no kernel may: out of bounds, misaligned, a race, a read of what has not arrived.

    `kinds` names what was found, each kind once, in the order of appearance.
    """

    def __init__(self, launch: Launch, faults: Iterable[Any]) -> None:
        found = list(faults)
        self.kinds: tuple[str, ...] = tuple(dict.fromkeys(kind_of(fault) for fault in found))
        lines = [f"{launch.kernel} on {launch.target.name}, grid {launch.grid}: {', '.join(self.kinds)}"]
        lines += [f"  {fault}" for fault in found[:5]]
        lines += [f"  and {len(found) - 5} more"] if len(found) > 5 else []
        super().__init__("\n".join(lines))


def kind_of(fault: Any) -> str:
    """A race's kind, or the name of the error that ended the launch."""
    return str(getattr(fault, "kind", type(fault).__name__))


@dataclass
class KernelRuns:
    """What the emulator counted of one kernel, over all its launches."""

    kernel: str
    launches: int = 0
    ctas: int = 0
    seconds: float = 0.0
    counters: Counter[str] = field(default_factory=Counter)
    interpreted: Counter[str] = field(default_factory=Counter)  # opcode -> warp instructions without code

    @property
    def native(self) -> float:
        """The share of the warp instructions that the engine had code for."""
        return 1 - self.interpreted.total() / max(self.counters["warp_instructions"], 1)


class Span(NamedTuple):
    """Memory [start, stop) that some arguments of a launch view, and the address of the block that it lies in."""

    start: int
    stop: int
    block: int
    names: tuple[str, ...]


def spans(arguments: Iterable[Argument]) -> list[Span]:
    """Exactly the bytes that the tensors view, those that overlap as one.

    Raises:
        TypeError: a pointer argument is no tensor on the CPU.
    """
    found = []
    for name, kind, value in arguments:
        if not kind.startswith("*"):
            continue
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            raise TypeError(
                f"argument {name} ({kind}) is {type(value).__name__}; the emulator takes tensors on the CPU"
            )
        if value.numel():
            last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            stop = value.data_ptr() + (last + 1) * value.element_size()
            found.append(Span(value.data_ptr(), stop, value.untyped_storage().data_ptr(), (name,)))
    merged: list[Span] = []
    for span in sorted(found):
        if merged and span.start < merged[-1].stop:
            before = merged.pop()
            span = Span(before.start, max(before.stop, span.stop), before.block, before.names + span.names)
        merged.append(span)
    return merged


def memory_of(span: Span) -> np.ndarray:
    """The span's bytes, writable."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * (span.stop - span.start)).from_address(span.start))


class Emulator:
    """Launcher that executes PTX.

    Args:
        ptx: gives the text to run for a launch, by default what Triton compiled.
        landing: when copies land: "early", "late" or "random".
        seed: of the warps' priorities and of landing="random"; None: warps run in program order.
        checks: look for races and reads of data in flight. Bounds and alignment are checked always.
        engine: of the emulator: "interpreter" or "native".

    Raises:
        EmulationFault: at a launch that faults.
    """

    enforces_limits = True  # as a GPU would

    def __init__(
        self,
        ptx: Callable[[Launch], str] = lambda launch: launch.asm["ptx"],
        *,
        landing: str = "late",
        seed: int | None = None,
        checks: bool = True,
        engine: str = "interpreter",
    ) -> None:
        self.runs: dict[str, KernelRuns] = {}
        self._ptx = ptx
        self._parsed: dict[str, ptx_emulator.Kernel] = {}
        self._options: dict[str, Any] = {"landing": landing, "seed": seed, "checks": checks, "engine": engine}

    def launch(self, launch: Launch) -> None:
        """Execute; raises EmulationFault where something is found."""
        faults, _ = self.execute(launch)
        if faults:
            raise EmulationFault(launch, faults) from next((f for f in faults if isinstance(f, Exception)), None)

    def execute(self, launch: Launch) -> tuple[list[Any], list[ptx_emulator.Fault]]:
        """Execute one launch, count it and write its results -> what was found, and notes.

        Found is the checks' :class:`ptx_emulator.Fault`, or the one error that ended the launch: then only what was
        written before it is written, as a GPU may leave it.

        Raises:
            RuntimeError: the kernel has what the emulator does not execute.
        """
        memory = ptx_emulator.Memory()
        values = [*place(memory, launch.arguments), *scratch(memory, launch)]
        runs = self.runs.setdefault(launch.kernel, KernelRuns(launch.kernel))
        begin = time.perf_counter()
        found: list[Any] = []
        notes: list[ptx_emulator.Fault] = []
        try:
            report = ptx_emulator.launch(
                self._kernel(launch), grid=launch.ctas, threads=launch.threads, arguments=values, memory=memory,
                shared_bytes=launch.metadata.shared, target=launch.target.name, **self._options,
            )  # fmt: skip
        except (ptx_emulator.Unsupported, ptx_emulator.ParseError) as error:
            raise RuntimeError(f"{launch.kernel} on {launch.target.name}: {error}") from error
        except ptx_emulator.EmulationError as error:
            found = [error]
        else:
            found, notes = list(report.faults), report.notes
            runs.ctas += report.ctas
            runs.counters.update(counts(report.counters))
            runs.interpreted.update(report.interpreted)
        memory.write_back()
        runs.launches += 1
        runs.seconds += time.perf_counter() - begin
        return found, notes

    def _kernel(self, launch: Launch) -> ptx_emulator.Kernel:
        """The launch's code, parsed once."""
        text = self._ptx(launch)
        if text not in self._parsed:
            self._parsed[text] = ptx_emulator.parse(text).kernels[launch.kernel]
        return self._parsed[text]


def scratch(memory: ptx_emulator.Memory, launch: Launch) -> list[int]:
    """The address of the memory that a kernel asks for beside its arguments, where it does; of all its CTAs, zeroed.

    On a GPU the program gives it, by `triton.set_allocator`. Behind it, the address of a profiler's: none.
    """
    size = getattr(launch.metadata, "global_scratch_size", 0)
    if not size:
        return []
    return [memory.register(np.zeros(size * math.prod(launch.ctas), np.uint8), "scratch"), 0]


def place(memory: ptx_emulator.Memory, arguments: tuple[Argument, ...]) -> list[int | float]:
    """Register the tensors' memory with the emulator -> the arguments' values, addresses for tensors.

    A span lies as far behind a multiple of 256 as its tensor does behind the start of its storage: the blocks that
    CUDA's allocators hand out begin there.
    """
    placed = []
    for span in spans(arguments):
        offset = (span.start - span.block) % 256
        address = memory.register(memory_of(span), "+".join(span.names), offset=offset)
        placed.append((span, address))
    values: list[int | float] = []
    for argument in arguments:
        values.append(_address(placed, argument.value) if argument.type.startswith("*") else argument.value)
    return values


def _address(placed: list[tuple[Span, int]], tensor: torch.Tensor) -> int:
    """Where the tensor lies in the emulated memory; 0, which nothing may touch, if it is empty."""
    start = tensor.data_ptr()
    return next((a + start - span.start for span, a in placed if span.start <= start < span.stop), 0)


def counts(counters: Any) -> Mapping[str, int]:
    """A report's counters by name; those that are split by kind get a name each."""
    flat: dict[str, int] = {}
    for name, value in vars(counters).items():
        flat |= {f"{name} {kind}": n for kind, n in value.items()} if isinstance(value, dict) else {name: value}
    return flat
