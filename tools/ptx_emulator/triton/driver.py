"""A Triton driver without a GPU: a program's own launches compile for a target and end in a function of ours.

Triton asks its active driver for the target, loads the binary through it and calls its launcher. This one compiles
for the target that it was given, takes CPU tensors, and hands each launch to a `launcher`: a :class:`Recorder`, which
runs nothing, or :class:`ptx_emulator.triton.launcher.Emulator`, which runs the PTX on the CPU. So what is compiled
or executed is what the program launches, with its grid, its strides and its arguments.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget

from ptx_emulator.targets import Target
from ptx_emulator.triton.descriptors import expand, is_descriptor, obstacle

if TYPE_CHECKING:
    DriverBase = object  # Triton declares no types
else:
    from triton.backends.driver import DriverBase

#: A driver's device number is new for each context: Triton keeps compiled kernels and the shared-memory limit by
#: device, so nothing that was compiled for one target can be met under another. No machine has this many GPUs.
_DEVICE_NUMBERS = itertools.count(1 << 16)


class Argument(NamedTuple):
    """One argument that the compiled kernel takes."""

    name: str  #: as the kernel's source has it; of a tuple's item with its place, "sizes.0"
    type: str  #: Triton's: `*bf16` for a pointer, `i32`, `fp32`, `nvTmaDesc` for a tensor map
    value: Any  #: the tensor, or the number, or what the map is made of


@dataclass(frozen=True)
class Launch:
    """One launch as a GPU would get it."""

    kernel: str  #: name of the entry point
    target: Target  #: what it was compiled for
    grid: tuple[int, int, int]  #: programs along x, y and z
    arguments: tuple[Argument, ...]  #: without the constexprs
    constexprs: Mapping[str, Any]  #: with the arguments that Triton made constant: 1, None
    asm: Mapping[str, Any]  #: "ttir", "ttgir", "ptx", "cubin"; for AMD "amdgcn", "hsaco"
    metadata: Any  #: Triton's, with shared, num_warps, num_stages, hash

    @property
    def identity(self) -> str:
        """The same for launches of the same compiled kernel."""
        return str(self.metadata.hash)

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return int(self.metadata.num_warps) * self.target.warp_size

    @property
    def ctas(self) -> tuple[int, int, int]:
        """The grid in CTAs: Triton's counts programs, which are clusters where a kernel asks for some."""
        x, y, z = self.grid
        return x * int(getattr(self.metadata, "num_ctas", 1)), y, z


class Launcher(Protocol):
    """What a driver hands launches to."""

    #: Whether a kernel that asks for more shared memory than a CTA may have is refused before it is launched.
    enforces_limits: bool

    def launch(self, launch: Launch) -> None:
        """Take one launch. Tensors are on the CPU and may be written."""


@dataclass
class Record:
    """One compiled kernel that was launched."""

    first: Launch  #: its first launch
    grids: list[tuple[int, int, int]]  #: of each launch, in order

    @property
    def launches(self) -> int:
        """How many there were."""
        return len(self.grids)


@dataclass
class Recorder:
    """Runs nothing and keeps one record per distinct compiled kernel: what the kernels would write stays as it was."""

    enforces_limits = False  # a kernel over the limit is to appear in the table, not to end it
    records: dict[str, Record] = field(default_factory=dict)  #: by `Launch.identity`

    def launch(self, launch: Launch) -> None:
        """Keep its grid, and the launch itself if it is its kernel's first."""
        record = self.records.setdefault(launch.identity, Record(launch, []))
        record.grids.append(launch.grid)


#: A launch of one configuration, and the quantiles to return -> so many times.
Benchmarker = Callable[..., list[float]]
AnyLauncher = TypeVar("AnyLauncher", bound=Launcher)


class OfflineDriver(DriverBase):
    """Triton's active driver inside of :func:`offline_driver`."""

    target: Target
    launcher: Launcher
    benchmarker: Benchmarker | None

    #: Kernels may be given CPU tensors; host code asks for this with getattr(driver, "runs_on_cpu", False).
    runs_on_cpu = True
    #: Plans hand it tensors where a GPU's driver gets addresses: who looks at a launch wants their shapes and bounds.
    takes_tensors = True

    def __init__(self, target: Target, launcher: Launcher, benchmarker: Benchmarker | None = None) -> None:
        self.target, self.launcher, self.benchmarker = target, launcher, benchmarker
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
            if not x * y * z:  # which Triton's own launchers leave out
                return
            asm = self._code(source, metadata)
            arguments, constexprs = sort_arguments(source.signature, values, getattr(metadata, "tensordesc_meta", None))
            self.launcher.launch(Launch(metadata.name, self.target, (x, y, z), arguments, constexprs, asm, metadata))

        return run

    def _code(self, source: Any, metadata: Any) -> Mapping[str, Any]:
        """The kernel's code in every form. Triton gives a launcher none: it is in the cache that the kernel came from.

        Raises:
            LookupError: the kernel was compiled outside of this driver, and for another target perhaps.
        """
        self.functions.add(source.fn)
        kernels = source.fn.device_caches[self.device][0].values()
        asm = next((kernel.asm for kernel in kernels if kernel.hash == metadata.hash), None)
        if asm is not None:
            return dict(asm)
        text = triton.runtime.cache.get_cache_manager(metadata.hash).get_file(f"{source.name[:150]}.ptx")
        if text is None:
            raise LookupError(
                f"{metadata.name} was compiled before the offline driver for {self.target.name} was active, so its PTX "
                "is not at hand: compile it inside"
            )
        return {"ptx": Path(text).read_text()}

    def _load_binary(self, name: str, binary: bytes, shared: int, device: int, *_: Any) -> tuple[Any, ...]:
        """Module (None: Triton has nothing to unload), function, registers, spills, most threads of a CTA."""
        return None, name, registers_in(binary), 0, 1024

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

    def get_benchmarker(self) -> Benchmarker:
        if self.benchmarker is None:
            raise RuntimeError(
                "nothing can be timed without a GPU: launch with a fixed configuration, not with autotune"
            )
        return self.benchmarker

    def get_empty_cache_for_benchmark(self) -> Any:
        raise RuntimeError("nothing can be timed without a GPU: leave triton.testing.do_bench out")


def registers_in(binary: bytes) -> int:
    """Registers of a thread, as a cubin states them; 0 where it does not.

    A kernel's attributes are in `.nv.info`: form 4 (a size and a value), attribute 0x2f (registers), 8 bytes: the
    kernel's symbol and the number. Programs divide by it when they ask how many CTAs fit.
    """
    at = binary.find(b"\x04\x2f\x08\x00")
    return int.from_bytes(binary[at + 8 : at + 12], "little") if at >= 0 else 0


def refuse_unsupported(source: Any, metadata: Any) -> None:
    """Say so when a kernel needs what this driver does not give it.

    Raises:
        NotImplementedError: tensor descriptors of a kind that is not emulated.
    """
    kinds = [leaf for name, kind in source.signature.items() for leaf in _leaves(name, kind, kind)]
    for name, kind, _ in kinds:
        if is_descriptor(kind) and (why := obstacle(kind, getattr(metadata, "tensordesc_meta", None))):
            raise NotImplementedError(f"{metadata.name} takes a tensor descriptor ({name}): {why}; use pointers")


def sort_arguments(
    signature: Mapping[str, Any], values: Any, descriptors: Sequence[Mapping[str, Any]] | None = None
) -> tuple[tuple[Argument, ...], dict[str, Any]]:
    """Arguments that the kernel takes, and the constants compiled into it. Tuples are flattened as `name.0`, tensor
    descriptors are expanded as `name.map` and what follows it.

    Args:
        signature: name -> Triton's type.
        values: as many.
        descriptors: what the compiled kernel says of each tensor descriptor, in their order; nothing below sm_90.
    """
    arguments: list[Argument] = []
    told = iter(descriptors or ())
    constexprs: dict[str, Any] = {}
    for (name, kind), value in zip(signature.items(), values, strict=True):
        for leaf in _leaves(name, kind, value):
            if leaf.type == "constexpr":
                constexprs[leaf.name] = getattr(leaf.value, "value", leaf.value)
            elif is_descriptor(leaf.type):
                expanded = expand(leaf.type, leaf.value, next(told, None))
                arguments += [Argument(f"{leaf.name}.{part}", kind, value) for part, kind, value in expanded]
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
def offline_driver(
    target: Target, launcher: AnyLauncher, cache: Path | None = None, benchmarker: Benchmarker | None = None
) -> Iterator[AnyLauncher]:
    """Make launches of Triton kernels compile for `target` and end in `launcher`, which is also what `as` gives.

    Args:
        target: the architecture.
        launcher: takes every launch.
        cache: folder of compiled kernels that may be used again; None means a temporary one.
        benchmarker: what `triton.autotune` asks for a configuration's time; None: that is refused.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, under which nothing is compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it")
    config = triton.runtime.driver
    previous = config._active  # not `active`: asking for that looks for a GPU, and raises where there is none
    driver = OfflineDriver(target, launcher, benchmarker)
    temporary = tempfile.TemporaryDirectory(prefix="ptx-emulator-")
    with temporary as folder, triton.knobs.cache.scope(), _settled():
        triton.knobs.cache.dir = str(cache or folder)
        config.set_active(driver)
        try:
            yield launcher
        finally:
            config._active = previous
            for function in driver.functions:
                function.device_caches.pop(driver.device, None)


@contextmanager
def _settled() -> Iterator[None]:
    """Let Python's collector of cycles look at new objects alone. Those that there are belong to modules, mostly; to
    look through all of torch's and Triton's takes 0.2 s each time."""
    if gc.get_freeze_count():  # the caller, or a driver around this one, has settled already
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
