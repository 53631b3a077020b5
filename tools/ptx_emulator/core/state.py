"""What an instruction may touch: registers, memories, the checker, the counters, and what its family keeps of a batch.

An instruction's action gets the `State` of a batch and a mask of its lanes. Which block runs next is none of its
business: `execute.Machine` extends the state by control flow, and nothing here knows of it.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np

from ptx_emulator.core.batch import Batch
from ptx_emulator.core.checks import Checker
from ptx_emulator.core.counters import Counters
from ptx_emulator.core.kernel import Kernel
from ptx_emulator.core.memory import Memory
from ptx_emulator.core.schedule import Priorities
from ptx_emulator.core.spaces import Array


class Part:
    """What one family of instructions keeps of a batch, such as its barriers. `State.of` makes it at the first use."""

    def __init__(self, m: "State") -> None: ...

    def settle(self, m: "State") -> None:
        """Wake the lanes whose wait has ended."""

    def in_flight(self) -> bool:
        """Whether a copy into shared memory is on its way."""
        return False

    def may_part(self) -> bool:
        """Whether the batch's CTAs may go on in separate batches."""
        return True

    def part(self, m: "State", ctas: Array) -> "Part | None":
        """What the batch `m`, which goes on with some of the CTAs, is to keep; None: it begins anew."""
        return None


AnyPart = TypeVar("AnyPart", bound=Part)


class State(Batch):
    """What the instructions of one batch of CTAs read and write."""

    def __init__(
        self,
        kernel: Kernel,
        cta_numbers: Array,
        threads: int,
        cluster_shape: tuple[int, int, int],
        shared_end: int,
        parameters: Array,
        memory: Memory,
        counters: Counters,
        landing: str,
    ) -> None:
        super().__init__(kernel, cta_numbers, threads, cluster_shape, shared_end)
        self.memory: Memory = memory
        self.counters: Counters = counters
        self.parameters: Array = parameters
        self.landing: str = landing
        self.constants: Array = np.frombuffer(bytes(kernel.constants.data), np.uint8)
        local = (self.ctas, threads, kernel.local_bytes)
        self.local: Array | None = np.full(local, 0x7F, np.uint8) if kernel.local_bytes else None
        self.checker: Checker | None = None
        self.schedule: Priorities | None = None
        self.r: list[Any] = []  # an array for each register
        self.renamed: dict[int, tuple[Array, Array]] = {}  # register -> its value, and the value that it is a copy of
        self.live: Array = np.ones(self.shape, bool)  # kept while lanes are apart
        self.asleep: Array = np.full(self.shape, -1, np.int32)  # the block at whose end a lane sleeps
        self.polling: Array = self.asleep.copy()  # the instruction by which a lane's test has just failed
        self.progress = 0  # counts what may let a failed test succeed
        self.nanoseconds = 0  # that have passed while no thread could go on
        self.waits: dict[int, Wait] = {}  # number of a block -> its end, where lanes may sleep there
        self.parts: dict[type[Part], Part] = {}

    def of(self, kind: type[AnyPart]) -> AnyPart:
        """What a family of instructions keeps of this batch."""
        found = self.parts.get(kind)
        if found is None:
            found = self.parts[kind] = kind(self)
        assert isinstance(found, kind)
        return found

    def poll(self, lanes: Array, number: int) -> None:
        """The lanes' test, instruction `number`, has failed: they go on when nobody else can."""
        self.polling[lanes] = number

    def tick(self, number: int) -> int:
        """Begin a step that touches memory: instruction `number` executes. Steps order the accesses."""
        self.step += 1
        if self.checker is not None:
            self.trace.append(number)
        return self.step

    def full(self, value: Array) -> Array:
        """`value` for every lane, shape (CTAs, threads)."""
        return value if value.shape == self.shape else np.broadcast_to(value, self.shape)

    def set(self, register: int, value: Array, mask: Array | None) -> None:
        """Write `value` to the lanes of the mask."""
        self.r[register] = value if mask is None else np.where(mask, value, self.r[register])

    def perform(self, number: int, action: Callable[["State", Array | None], None], mask: Array | None) -> None:
        """Execute instruction `number`, which ends a block, on the lanes of the mask."""
        action(self, mask)

    def wake(self, lanes: Array) -> None:
        """Let sleeping lanes go on with the block after the one they sleep at."""
        self.asleep[lanes] = -1

    def sleepers(self, among: Array) -> Iterator[tuple["Wait", Array]]:
        """Each block end at which some of the lanes sleep, and those lanes."""
        for number in np.unique(self.asleep[among & (self.asleep >= 0)]):
            yield self.waits[int(number)], among & (self.asleep == number)

    def in_flight(self) -> bool:
        """Whether a copy into shared memory is on its way."""
        return any(part.in_flight() for part in self.parts.values())

    def part(self, ctas: Array) -> Self:
        """A state that goes on with some of the CTAs, where nothing is in flight."""
        other = copy.copy(self)
        other.hold(self.cta_numbers[ctas])
        other.shared = self.shared.part(ctas)
        other.local = None if self.local is None else self.local[ctas]
        other.trace, other.renamed = list(self.trace), {}
        other.pending_registers, other.pending_inputs = set(), set()
        other.r = [value[ctas] if value.shape[0] == self.ctas else value for value in self.r]
        other.live, other.asleep = np.ones(other.shape, bool), np.full(other.shape, -1, np.int32)
        other.polling = other.asleep.copy()
        other.parts = {}
        for kind, part in self.parts.items():
            other.parts[kind] = part.part(other, ctas) or kind(other)
        if self.checker is not None:
            other.checker = self.checker.part(other)
        return other


@dataclass
class Wait:
    """The end of a block at which lanes may sleep; `at` is the instruction's number."""

    at: int
    text: str
    guard: int | None = field(default=None, init=False)
    negated: bool = field(default=False, init=False)

    def together(self, m: State, live: Array | None) -> bool:
        """All live lanes of the batch have come: pass it at once and return True where that is simpler than `enter`."""
        return False

    def enter(self, m: State, lanes: Array) -> Array:
        """The lanes, (CTAs, threads), have come; returns those that sleep, until someone calls `State.wake`."""
        raise NotImplementedError

    def tell(self, m: State, lanes: Array) -> str:
        """For a report of a deadlock: what the sleeping lanes wait for."""
        raise NotImplementedError
