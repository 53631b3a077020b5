"""Launches that run: hands PTX, grid and the tensors' memory to the emulator in `tools/ptx_emulator`.

A kernel may touch exactly the bytes that its tensor arguments span, and nothing between them: each span is a buffer
of its own in the emulated memory, with unmapped addresses around it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cast_kernels.evidence.driver import Argument, Launch


class EmulationFault(RuntimeError):
    """A kernel did what no kernel may: out of bounds, misaligned, a race, a read of what has not arrived.

    `kinds` names what was found, each kind once, in the order of appearance.
    """

    def __init__(self, launch: Launch, faults: Iterable[Any]) -> None:
        found = list(faults)
        self.kinds: tuple[str, ...] = tuple(dict.fromkeys(_kind(fault) for fault in found))
        lines = [f"{launch.kernel} on {launch.target.name}, grid {launch.grid}: {', '.join(self.kinds)}"]
        lines += [f"  {fault}" for fault in found[:5]]
        lines += [f"  and {len(found) - 5} more"] if len(found) > 5 else []
        super().__init__("\n".join(lines))


def _kind(fault: Any) -> str:
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

    Raises:
        EmulationFault: at a launch that faults.
        ModuleNotFoundError: there is no emulator beside the package.
    """

    enforces_limits = True  # as a GPU would

    def __init__(self, ptx: Callable[[Launch], str] = lambda launch: launch.asm["ptx"]) -> None:
        self.emulator: Any = load_emulator()
        self.runs: dict[str, KernelRuns] = {}
        self._ptx = ptx
        self._parsed: dict[str, Any] = {}

    def launch(self, launch: Launch) -> None:
        text = self._ptx(launch)
        if text not in self._parsed:
            self._parsed[text] = self.emulator.parse(text).kernels[launch.kernel]
        memory = self.emulator.Memory()
        values = place(memory, launch.arguments)
        begin = time.perf_counter()
        try:
            report = self.emulator.launch(
                self._parsed[text], grid=launch.grid, threads=launch.threads, arguments=values, memory=memory,
                shared_bytes=launch.metadata.shared, target=launch.target.name,
            )  # fmt: skip
        except self.emulator.Unsupported as error:
            raise RuntimeError(f"{launch.kernel} on {launch.target.name}: {error}") from error
        except self.emulator.EmulationError as error:
            raise EmulationFault(launch, [error]) from error
        memory.write_back()
        runs = self.runs.setdefault(launch.kernel, KernelRuns(launch.kernel))
        runs.launches += 1
        runs.ctas += report.ctas
        runs.seconds += time.perf_counter() - begin
        runs.counters.update(counts(report.counters))
        if report.faults:
            raise EmulationFault(launch, report.faults)


def place(memory: Any, arguments: tuple[Argument, ...]) -> list[int | float]:
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


def load_emulator() -> Any:
    """The module `ptx_emulator`: as it is installed, or from `tools/` of the checkout that this package is in."""
    tools = Path(__file__).parents[2] / "tools"
    if importlib.util.find_spec("ptx_emulator") is None:
        if not (tools / "ptx_emulator").is_dir():
            raise ModuleNotFoundError(
                f"no module ptx_emulator, neither installed nor in {tools}: the package brings it beside cast_kernels, "
                "so this installation is not whole; install it again, by pip install . in a checkout"
            )
        sys.path.append(str(tools))
    return importlib.import_module("ptx_emulator")
