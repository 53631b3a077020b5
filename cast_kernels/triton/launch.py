"""Launches of compiled kernels without what Triton does again at every call, and the plans that they belong to.

Triton binds and classifies all arguments at each launch, 100 to 150 us for kernels with as many as ours. A plan knows
them: its sizes are constants, its dtypes part of its key, and every address is a multiple of 16. So its first call asks
Triton for the compiled kernels, and every call hands them their addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver as drivers

from cast_kernels.triton import tiles
from cast_kernels.triton.common import interpreting
from cast_kernels.triton.compiling import side_by_side

#: Triton compiles one kernel for addresses that are multiples of this, and another for those that are not.
ALIGNMENT = 16
#: Parts of an allocation begin at multiples of 128 bytes, a cache line.
LINE = 128
#: Plans that are kept of each kind and for each of Triton's drivers, the last that were used.
MOST_PLANS = 64
#: Attribute of a driver that holds its plans: a compiled kernel is loaded into a context, and goes with it.
_PLANS = "cast_kernels_plans"
#: Arguments of a function that makes plans, and what it makes.
Key = ParamSpec("Key")
Made = TypeVar("Made")


def as_odd(number: int) -> int:
    """The number as kernels take it inside of tuples, where `unodd` (blocks.py) gives it back.

    Triton compiles kernels of their own for integers that are 1 and for multiples of 16. A parameter can be kept from
    that by name, what is in a tuple can't: so sizes that change from batch to batch travel as odd numbers above 1.
    """
    return 2 * number + 3


class Buffer(NamedTuple):
    """A tensor that the launches of a plan share."""

    kind: str  # "given" by the caller, "saved" for backward, "scratch" of one call
    number: int  # among its kind
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Up to the next line."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return -(-count // LINE) * LINE


class Launch:
    """One launch of a plan.

    Args:
        kernel: a function under `triton.jit`; its constants come last.
        grid: one to three numbers of programs.
        arguments: for each parameter that is no constant what `places` turns into its place among a call's values, or
            a tuple of such, or of tuples.
        places: a buffer or a number -> its place.
        constants: the kernel's constants and Triton's options, by name.
    """

    kernel: Any
    constants: dict[str, Any]

    def __init__(
        self, kernel: Any, grid: Sequence[int], arguments: Sequence[Any], places: Callable[[Any], int],
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        self.kernel, self.constants = kernel, constants
        self.grid: tuple[int, ...] = (*grid, 1, 1)[:3]
        placed = [_placed(argument, places) for argument in arguments]
        self._named = [_picker(argument) for argument in placed]
        self._plain = _picker_of_all(placed)
        self._tail = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        self._compiled: Any = None
        self._asked: Any = None

    @property
    def ready(self) -> bool:
        """Whether the kernel was compiled, so that a launch takes addresses."""
        return self._compiled is not None

    @property
    def watched(self) -> bool:
        """Whether Triton looks at more than the arguments at each launch, so that none may go past it."""
        return bool(self.kernel.pre_run_hooks or self.kernel.used_global_vals or _stages_hook())

    def __call__(self, values: list[Any], stream: int) -> None:
        """Launch on the current device.

        Args:
            values: the call's tensors and numbers; addresses for tensors if the launch is `ready`.
            stream: the current one.
        """
        compiled = self._compiled
        if compiled is None:
            self.kernel[self.grid](*(pick(values) for pick in self._named), **self.constants)
            return
        arguments = self._plain(values)
        enter, leave, metadata = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook, None
        if not getattr(enter, "calls", enter):
            enter = None
        if not getattr(leave, "calls", leave):
            leave = None
        if enter is not None:
            metadata = compiled.launch_metadata(self.grid, stream, *arguments, *self._tail)
        self._run(
            *self.grid, stream, self._function, self._metadata, metadata, enter, leave, *arguments, *self._tail,
        )  # fmt: skip

    def compile(self, values: list[Any]) -> None:
        """Ask Triton for the kernel on the current device and launch nothing; `keep` takes what it gives.

        Args:
            values: the call's tensors and numbers.
        """
        self._asked = self.kernel.warmup(*(pick(values) for pick in self._named), grid=self.grid, **self.constants)

    def keep(self) -> None:
        """Keep the compiled kernel, unless it is `watched`: which globals it reads is known once it is compiled."""
        asked, self._asked = self._asked, None
        if asked is None or self.watched:
            return
        if hasattr(asked, "result"):  # it was compiled in another thread
            asked = asked.result()
        # `run` loads the kernel, so that it has a `function`.
        self._run, self._function, self._metadata = asked.run, asked.function, asked.packed_metadata
        self._compiled = asked


_HOOKS = triton.knobs.runtime
#: Triton decides this when a kernel is defined, so it holds for the process.
_INTERPRETED = interpreting()


def _stages_hook() -> Any:
    """What a user of Triton puts between its passes; None mostly, and where Triton is too old to have it."""
    return getattr(_HOOKS, "add_stages_inspection_hook", None)


def _placed(argument: Any, places: Callable[[Any], int]) -> Any:
    """The place of a buffer or a number among a call's values; of tuples the same tuple of places."""
    if not _is_tuple(argument):
        return places(argument)
    return getattr(argument, "_make", tuple)(_placed(item, places) for item in argument)


def _picker(place: Any) -> Callable[[list[Any]], Any]:
    """What takes an argument from a call's values, as Triton's compiler wants it: tuples keep their type."""
    if not isinstance(place, tuple):
        return itemgetter(place)
    make, inner = getattr(place, "_make", tuple), [_picker(item) for item in place]
    return lambda values: make(pick(values) for pick in inner)


def _picker_of_all(places: Sequence[Any]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """What takes all arguments from a call's values, as a compiled kernel wants them, in plain tuples.

    One expression of Python: for the largest launch, 83 values in twelve tuples, 0.8 us, where nested pickers take 8.5.
    """

    def expression(place: Any) -> str:
        if isinstance(place, tuple):
            return f"({''.join(f'{expression(item)}, ' for item in place)})"
        return f"values[{place}]"

    picker: Callable[[list[Any]], tuple[Any, ...]] = eval(f"lambda values: {expression(tuple(places))}")
    return picker


def _is_tuple(argument: Any) -> bool:
    return isinstance(argument, tuple) and not isinstance(argument, Buffer)


class Planner:
    """Collects the tensors and the launches of a plan."""

    def __init__(self) -> None:
        self._buffers: dict[str, list[Buffer]] = {"given": [], "saved": [], "scratch": []}
        self._launches: list[tuple[Any, Sequence[int], tuple[Any, ...], dict[str, Any]]] = []

    def _buffer(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        buffer = Buffer(kind, len(self._buffers[kind]), shape, dtype)
        self._buffers[kind].append(buffer)
        return buffer

    def given(self, *shape: int, dtype: torch.dtype) -> Buffer:
        """The next tensor that the caller hands over at each call."""
        return self._buffer("given", shape, dtype)

    def saved(self, *shape: int, dtype: torch.dtype) -> Buffer:
        """The next part of what forward keeps for backward."""
        return self._buffer("saved", shape, dtype)

    def scratch(self, *shape: int, dtype: torch.dtype) -> Buffer:
        """A part of what lives as long as one call."""
        return self._buffer("scratch", shape, dtype)

    def launch(self, kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
        """The next launch; `arguments` are buffers, numbers, and tuples of them or of tuples."""
        self._launches.append((kernel, grid, arguments, constants))

    def launch_first(self, kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
        """As :meth:`launch`, before all others so far."""
        self._launches.insert(0, (kernel, grid, arguments, constants))

    def plan(self, saved_shape: tuple[int, ...] = ()) -> Plan:
        """The plan of all launches so far; `saved_shape` in 4-byte words is at least as much as what is saved."""
        return Plan(self._buffers, self._launches, saved_shape)


class Plan:
    """All launches of one call, with everything computed but addresses: a :class:`cast_kernels.plans.Plan`.

    Attributes:
        saved_shape: 4-byte words of the allocation that is kept for backward, as its maker wants them.
        saved_bytes: that are used of it.
        scratch_bytes: of the allocation that lives as long as a call.
    """

    saved_bytes: int
    scratch_bytes: int

    def __init__(
        self, buffers: dict[str, list[Buffer]], launches: list[tuple[Any, Sequence[int], tuple[Any, ...], Any]],
        saved_shape: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.saved_shape = saved_shape
        self._numbers: list[int | float] = []
        self._parts = {kind: _offsets(buffers[kind]) for kind in ("saved", "scratch")}
        self._begins = {kind: [begin for begin, _ in parts] for kind, parts in self._parts.items()}
        self.saved_bytes, self.scratch_bytes = (sum(b.bytes for b in buffers[kind]) for kind in ("saved", "scratch"))
        begins, count = {}, 0
        for kind, those in buffers.items():
            begins[kind] = count
            count += len(those)

        def place(what: Any) -> int:
            if isinstance(what, Buffer):
                return begins[what.kind] + what.number
            self._numbers.append(what)
            return count + len(self._numbers) - 1

        self._ready = False
        self.launches: list[Launch] = [
            Launch(kernel, grid, args, place, constants) for kernel, grid, args, constants in launches
        ]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels in their order."""
        return tuple(launch.kernel.__name__ for launch in self.launches)

    def run(self, given: list[Tensor], saved: Tensor | None = None, inputs: int = 0) -> None:
        """Make all launches.

        Args:
            given: contiguous tensors on the current device, in the planner's order.
            saved: `aligned`, of `saved_bytes` at least; None if the plan keeps nothing.
            inputs: so many of `given`, the first, are only read: one whose address is not a multiple of 16 is copied.

        Raises:
            ValueError: another tensor's address is not a multiple of 16, or `saved` is elsewhere.
        """
        addresses: list[Any] = list(map(Tensor.data_ptr, given))
        if reduce(or_, addresses) % ALIGNMENT:
            _align(given, addresses, inputs)
        if saved is not None and (saved.device != given[0].device or saved.data_ptr() % ALIGNMENT):
            raise ValueError(f"what was saved is on {saved.device} at {saved.data_ptr():#x}; see `aligned`")
        scratch = _scratch(given[0], self.scratch_bytes) if self.scratch_bytes else None
        if _INTERPRETED:
            values = self._views(given, saved, scratch)
            for launch in self.launches:
                launch(values, 0)
            return
        active = drivers.active
        stream = active.get_current_stream(active.get_current_device())
        ready = self._ready
        if not ready:
            ready = all(launch.ready for launch in self.launches) or self._compile(given, saved, scratch)
            self._ready = ready
        if getattr(active, "takes_tensors", False) or not ready:
            addresses = self._views(given, saved, scratch)
        else:
            for kind, base in (("saved", saved), ("scratch", scratch)):
                if base is not None:
                    addresses += map(base.data_ptr().__add__, self._begins[kind])
            addresses += self._numbers
        for launch in self.launches:
            launch(addresses, stream)

    def _compile(self, given: list[Tensor], saved: Tensor | None, scratch: Tensor | None) -> bool:
        """Compile what is not ready, side by side, and return whether all is."""
        new = [launch for launch in self.launches if not (launch.ready or launch.watched)]
        if new:
            values = self._views(given, saved, scratch)
            here = not getattr(drivers.active, "runs_on_cpu", False)
            side_by_side([partial(launch.compile, values) for launch in new], here)
            for launch in new:
                launch.keep()
        return all(launch.ready for launch in self.launches)

    def _views(self, given: list[Tensor], saved: Tensor | None, scratch: Tensor | None) -> list[Any]:
        """The call's tensors and numbers: for Triton's compiler, its interpreter, and whoever looks at launches."""
        values: list[Any] = list(given)
        for kind, base in (("saved", saved), ("scratch", scratch)):
            flat = None if base is None else base.view(-1).view(torch.uint8)
            for offset, (_, _, shape, dtype) in self._parts[kind]:
                assert flat is not None
                count = torch.Size(shape).numel() * dtype.itemsize
                values.append(flat[offset : offset + count].view(dtype).view(shape))
        return values + self._numbers


def _align(given: list[Tensor], addresses: list[int], inputs: int) -> None:
    """Copy those of the first, the inputs, whose address is not a multiple of 16; ValueError for another tensor."""
    for i, address in enumerate(addresses):
        if address % ALIGNMENT:
            if i >= inputs:
                raise ValueError(f"tensor {i} of a plan is at address {address:#x}, no multiple of {ALIGNMENT}")
            given[i] = aligned(given[i])
            addresses[i] = given[i].data_ptr()


def aligned(x: Tensor) -> Tensor:
    """The tensor, contiguous, at an address that plans take; mostly it is."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _scratch(like: Tensor, size: int) -> Tensor:
    """So many bytes on the tensor's device."""
    return like.new_empty(size, dtype=torch.uint8)


def _offsets(buffers: list[Buffer]) -> list[tuple[int, Buffer]]:
    """(byte at which it begins, buffer), one behind the other."""
    found, begin = [], 0
    for buffer in buffers:
        found.append((begin, buffer))
        begin += buffer.bytes
    return found


def planned(make: Callable[Key, Made]) -> Callable[Key, Made]:
    """`make`, with a bounded cache of its plans: by its arguments, device, Triton's settings and table of tiles.

    The cache lies on Triton's active driver, so no compiled kernel outlives the context that it was loaded into.
    Nothing is kept for the interpreter, whose time goes elsewhere.
    """

    def find(*arguments: Key.args, **none: Key.kwargs) -> Made:
        if _INTERPRETED:
            return make(*arguments, **none)
        active = drivers.active
        caches = vars(active).setdefault(_PLANS, {})
        cache = caches.get(make)
        if cache is None:
            cache = caches.setdefault(make, lru_cache(MOST_PLANS)(lambda _, *rest, **more: make(*rest, **more)))
        compilation = triton.knobs.compilation.instrumentation_mode
        device = active.get_current_device()
        made: Made = cache((device, _HOOKS.debug, compilation, _stages_hook(), tiles.changes), *arguments, **none)
        return made

    return find
