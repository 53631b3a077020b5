"""Launches that run: hands PTX, grid and the tensors' memory to the emulator.

A kernel may touch the bytes that its tensor arguments span, and no others. Each span is a buffer of its own in the
emulated memory, with unmapped addresses around it.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

import ptx_emulator
from ptx_emulator.targets import Target
from ptx_emulator.triton.descriptors import MAP_TYPE, HostMap
from ptx_emulator.triton.driver import Argument, Launch


class Named(Protocol):
    """What a fault says of a launch."""

    @property
    def kernel(self) -> str: ...
    @property
    def target(self) -> Target: ...
    @property
    def grid(self) -> tuple[Any, ...]: ...


class EmulationFault(RuntimeError):
    """A kernel did what no kernel may: out of bounds, misaligned, a race, a read of what has not arrived.

    `kinds` names what was found, each kind once, in the order of appearance.
    """

    def __init__(self, launch: Named, faults: Iterable[Any]) -> None:
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
    """Exactly the bytes that the tensors view, those that overlap as one, in the order of the arguments.

    Raises:
        TypeError: a pointer argument is no tensor on the CPU.
    """
    found, given = [], list(arguments)
    for name, kind, value in given:
        value = value.base if isinstance(value, HostMap) else value
        if not kind.startswith(("*", MAP_TYPE)):
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
    order = {name: place for place, (name, _, _) in enumerate(given)}
    return sorted(merged, key=lambda span: min(order[name] for name in span.names))


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
        engine: of the emulator: "interpreter", "native", or None for the quickest that is built.
        lane_order: look at the order between the lanes of a warp as well, which the interpreter alone does.

    Raises:
        EmulationFault: at a launch that faults, or in which several warps wrote values to one word that differ, even
            if only as rounding parts float32 numbers: a kernel's bits would depend on which warp comes last.
    """

    enforces_limits = True  # as a GPU would

    def __init__(
        self,
        ptx: Callable[[Launch], str] = lambda launch: launch.asm["ptx"],
        *,
        landing: str = "late",
        seed: int | None = None,
        checks: bool = True,
        engine: str | None = None,
        lane_order: bool = False,
    ) -> None:
        self.runs: dict[str, KernelRuns] = {}
        self._ptx = ptx
        self._parsed: dict[str, ptx_emulator.Kernel] = {}
        self.engine: str = engine or ptx_emulator.default_engine(lane_order)
        self._options: dict[str, Any] = {
            "landing": landing, "seed": seed, "checks": checks, "engine": self.engine, "lane_order": lane_order
        }  # fmt: skip

    def launch(self, launch: Launch) -> None:
        """Execute; raises EmulationFault where something is found."""
        faults, notes = self.execute(launch)
        faults += [note for note in notes if note.differs]
        if faults:
            raise EmulationFault(launch, faults) from next((f for f in faults if isinstance(f, Exception)), None)

    def execute(self, launch: Launch) -> tuple[list[Any], list[ptx_emulator.Fault]]:
        """Execute one launch, count it and write its results -> what was found, and notes.

        Found is the checks' :class:`ptx_emulator.Fault`, or the one error that ended the launch: then only what was
        written before it is written, as a GPU may leave it.

        Raises:
            RuntimeError: the kernel has what the emulator does not execute.
        """
        memory = ptx_emulator.Memory(span.stop - span.start for span in spans(launch.arguments))
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
    """Addresses of the memory that a kernel asks for beside its arguments, zeroed: of all its CTAs, then the one that
    profilers and sanitizers in kernels use; 0 for the one that it does not ask for, nothing if it asks for neither.

    On a GPU the program gives it, by `triton.set_allocator`, and Triton what sanitizers use.
    """
    kinds = ("global_scratch", "profile_scratch")
    sizes = [getattr(launch.metadata, f"{kind}_size", 0) * math.prod(launch.ctas) for kind in kinds]
    if not any(sizes):
        return []
    return [
        memory.register(np.zeros(size, np.uint8), kind) if size else 0 for kind, size in zip(kinds, sizes, strict=True)
    ]


def place(memory: ptx_emulator.Memory, arguments: tuple[Argument, ...]) -> list[int | float | ptx_emulator.TensorMap]:
    """Register the tensors' memory with the emulator -> the arguments' values, addresses for tensors.

    Tensors lie one behind the other in the order of the arguments, so that an access that strays meets the same one in
    every process, wherever the process has its memory. A tensor lies as far behind a multiple of 256 as behind the
    start of its storage, since CUDA's allocators hand out blocks that begin at such multiples.

    Raises:
        ValueError: CUDA's driver would refuse the tensor map of a descriptor.
    """
    placed = []
    for span in spans(arguments):
        offset = (span.start - span.block) % 256
        address = memory.register(memory_of(span), "+".join(span.names), offset=offset)
        placed.append((span, address))
    values: list[int | float | ptx_emulator.TensorMap] = []
    for name, kind, value in arguments:
        if isinstance(value, HostMap):
            values.append(_map(name, value, _address(placed, value.base)))
        else:
            values.append(_address(placed, value) if kind.startswith("*") else value)
    return values


def _map(name: str, given: HostMap, address: int) -> ptx_emulator.TensorMap:
    try:
        return given.at(address)
    except ValueError as error:
        raise ValueError(f"argument {name}: {error}; CUDA's driver refuses such a map") from None


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
