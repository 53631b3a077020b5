"""A Triton driver without a GPU: the product's own launches compile for a target and end in a function of ours.

Triton asks its active driver for the target, loads the binary through it and calls its launcher. This one compiles
for the target that it was given, takes CPU tensors, and hands each launch to a `launcher`: a :class:`Recorder`, which
runs nothing, or :class:`cast_kernels.evidence.emulator.Emulator`, which runs the PTX on the CPU. So what is compiled
or executed is what the product launches, with its grid, its strides and its arguments.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget

from cast_kernels.evidence.targets import Target

if TYPE_CHECKING:
    DriverBase = object  # Triton declares no types
else:
    from triton.backends.driver import DriverBase

#: A driver's device number is new for each context: Triton keeps compiled kernels and the shared-memory limit by
#: device, so nothing that was compiled for one target can be met under another. No machine has this many GPUs.
_DEVICE_NUMBERS = itertools.count(1 << 16)


class Argument(NamedTuple):
    """One argument that the compiled kernel takes."""

    name: str
    type: str  # Triton's: "*bf16" for a pointer, "i32", "fp32"
    value: Any  # the tensor, or the number


@dataclass(frozen=True)
class Launch:
    """One launch as a GPU would get it."""

    kernel: str  # name of the entry point
    target: Target
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]  # without the constexprs
    constexprs: Mapping[str, Any]  # with the arguments that Triton made constant: 1, None
    asm: Mapping[str, Any]  # "ttir", "ttgir", "ptx", "cubin"; for AMD "amdgcn", "hsaco"
    metadata: Any  # Triton's, with shared, num_warps, num_stages, hash

    @property
    def identity(self) -> str:
        """The same for launches of the same compiled kernel."""
        return str(self.metadata.hash)

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return int(self.metadata.num_warps) * self.target.warp_size


class Launcher(Protocol):
    """What a driver hands launches to."""

    #: Whether a kernel that asks for more shared memory than a CTA may have is refused before it is launched.
    enforces_limits: bool

    def launch(self, launch: Launch) -> None:
        """Take one launch. Tensors are on the CPU and may be written."""


@dataclass
class Record:
    """One compiled kernel that was launched."""

    first: Launch
    grids: list[tuple[int, int, int]]

    @property
    def launches(self) -> int:
        return len(self.grids)


@dataclass
class Recorder:
    """Runs nothing and keeps one record per distinct compiled kernel: what the kernels would write stays as it was."""

    enforces_limits = False  # a kernel over the limit is to appear in the table, not to end it
    records: dict[str, Record] = field(default_factory=dict)

    def launch(self, launch: Launch) -> None:
        record = self.records.setdefault(launch.identity, Record(launch, []))
        record.grids.append(launch.grid)


AnyLauncher = TypeVar("AnyLauncher", bound=Launcher)


class OfflineDriver(DriverBase):
    """Triton's active driver inside of :func:`offline_driver`."""

    target: Target
    launcher: Launcher

    #: Kernels may be given CPU tensors; host code asks for this with getattr(driver, "runs_on_cpu", False).
    runs_on_cpu = True
    #: Plans hand it tensors where a GPU's driver gets addresses: who looks at a launch wants their shapes and bounds.
    takes_tensors = True

    def __init__(self, target: Target, launcher: Launcher) -> None:
        self.target, self.launcher = target, launcher
        self.device: int = next(_DEVICE_NUMBERS)
        self.functions: set[Any] = set()  # that were launched: their caches hold kernels of this device
        self.utils: SimpleNamespace = SimpleNamespace(
            load_binary=self._load_binary,
            unload_module=lambda module: None,
            get_device_properties=self._properties,
        )

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton's search for the machine's GPU must not find this one

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Triton's constructor of a launcher for one compiled kernel; the launcher is what it returns."""
        refuse_unsupported(source, metadata)

        def run(x: int, y: int, z: int, stream: int, function: Any, packed: Any, launch: Any, enter: Any, leave: Any,
                *values: Any) -> None:  # fmt: skip
            self.functions.add(source.fn)
            # Triton gives a launcher the binary only. The kernel, with its PTX, is in the cache that it came from.
            kernels = source.fn.device_caches[self.device][0].values()
            asm = next(kernel.asm for kernel in kernels if kernel.hash == metadata.hash)
            arguments, constexprs = sort_arguments(source.signature, values)
            self.launcher.launch(Launch(metadata.name, self.target, (x, y, z), arguments, constexprs, asm, metadata))

        return run

    def _load_binary(self, name: str, binary: bytes, shared: int, device: int, *_: Any) -> tuple[Any, ...]:
        """Module (None: Triton has nothing to unload), function, registers, spills, most threads of a CTA."""
        return None, name, 0, 0, 1024

    def _properties(self, device: int) -> dict[str, int]:
        limit = self.target.shared_limit if self.launcher.enforces_limits else 1 << 30
        return {
            "max_shared_mem": limit,
            "multiprocessor_count": self.target.processors,
            "warpSize": self.target.warp_size,
            "max_num_regs": self.target.registers,
        }

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        if device != self.device:
            raise ValueError(f"device {device} was asked for; this driver has device {self.device} only")

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("this driver's launcher is not in C++")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed without a GPU: launch with a fixed configuration, not with autotune")


def refuse_unsupported(source: Any, metadata: Any) -> None:
    """Say so when a kernel needs what this driver does not give it.

    Raises:
        NotImplementedError: tensor descriptors from the host, or scratch memory.
    """
    descriptors = [name for name, kind in source.signature.items() if str(kind).startswith("tensordesc")]
    if descriptors:
        raise NotImplementedError(f"{metadata.name} takes tensor descriptors ({', '.join(descriptors)}); use pointers")
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, scratch, 0):
            raise NotImplementedError(f"{metadata.name} asks for scratch memory: {scratch} is not 0")


def sort_arguments(signature: Mapping[str, Any], values: Any) -> tuple[tuple[Argument, ...], dict[str, Any]]:
    """Arguments that the kernel takes, and the constants compiled into it. Tuples are flattened as `name.0`."""
    arguments: list[Argument] = []
    constexprs: dict[str, Any] = {}
    for (name, kind), value in zip(signature.items(), values, strict=True):
        for leaf in _leaves(name, kind, value):
            if leaf.type == "constexpr":
                constexprs[leaf.name] = getattr(leaf.value, "value", leaf.value)
            else:
                arguments.append(leaf)
    return tuple(arguments), constexprs


def _leaves(name: str, kind: Any, value: Any) -> Iterator[Argument]:
    # No function inside of another: one that calls itself is a cycle, in which tensors would outlive their launch, and
    # autograd copies a gradient that somebody else holds.
    if isinstance(kind, tuple):
        for i, (inner, item) in enumerate(zip(kind, value, strict=True)):
            yield from _leaves(f"{name}.{i}", inner, item)
    else:
        yield Argument(name, kind, value)


@contextmanager
def offline_driver(target: Target, launcher: AnyLauncher, cache: Path | None = None) -> Iterator[AnyLauncher]:
    """Make launches of Triton kernels compile for `target` and end in `launcher`, which is also what `as` gives.

    Args:
        target: the architecture.
        launcher: takes every launch.
        cache: folder of compiled kernels that may be used again; None means a temporary one.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, under which nothing is compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it")
    config = triton.runtime.driver
    previous = config._active  # not `active`: asking for that looks for a GPU, and raises where there is none
    driver = OfflineDriver(target, launcher)
    with tempfile.TemporaryDirectory(prefix="cast-kernels-") as temporary, triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache or temporary)
        config.set_active(driver)
        try:
            yield launcher
        finally:
            config._active = previous
            for function in driver.functions:
                function.device_caches.pop(driver.device, None)
