"""The registers of a batch, of which the vector machine and the interpreter each keep what the other may not have."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ptx_emulator.core.spaces import Array


class Registers(list[Any]):
    """An array per register, as the core has them, beside the machine's memory, [CTAs, bytes].

    A register that the machine has written is read from there when the interpreter next asks for it. One that the
    interpreter writes is written there at once (`put`), and for the lanes that wrote it alone: where lanes are apart,
    its place may hold another register of the others.
    """

    memory: Array
    threads: int
    place: dict[int, int]  # bytes of a thread in front of each register
    widths: list[int]

    def __init__(
        self,
        first: Iterable[Any],
        memory: Array,
        threads: int,
        place: dict[int, int],
        widths: list[int],
    ) -> None:
        super().__init__(first)
        self.memory, self.threads = memory, threads
        self.place, self.widths = place, widths
        self.stale: set[int] = set()
        self.written: set[int] = set()  # since the last `put`
        self._views: dict[int, Array] = {}

    def view(self, register: int) -> Array:
        """Where the machine keeps a register, [CTAs, threads]."""
        found = self._views.get(register)
        if found is None:
            width, first = self.widths[register], self.place[register] * self.threads
            kind: Any = list.__getitem__(self, register).dtype
            found = self.memory[:, first : first + width * self.threads].view(kind)
            self._views[register] = found
        return found

    def __getitem__(self, register: Any) -> Any:
        if register in self.stale:
            self.stale.discard(register)
            super().__setitem__(register, self.view(register).copy())
        return super().__getitem__(register)

    def __setitem__(self, register: Any, value: Any) -> None:
        super().__setitem__(register, value)
        self.stale.discard(register)
        if register in self.place:
            self.written.add(register)

    def put(self, lanes: Array | None) -> None:
        """Bring what the interpreter has written, for these lanes or for all, into the machine's memory."""
        for register in self.written:
            view, value = self.view(register), super().__getitem__(register)
            np.copyto(view, value, where=True if lanes is None else lanes)
        self.written.clear()

    def part(self, ctas: Array, select: Callable[[Any], Any]) -> "Registers":
        """The registers of some of the CTAs; `select` takes theirs out of an array."""
        values = map(select, super().__iter__())
        other = Registers(values, self.memory[ctas], self.threads, self.place, self.widths)
        other.stale = set(self.stale)
        return other
