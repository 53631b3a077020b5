"""The machine that runs one batch of CTAs: registers, blocks of instructions, control flow and barriers.

While all lanes agree the batch runs block by block; when they part, each lane keeps its own block and the lowest runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import decode
from .checks import Checker
from .counters import Counters
from .decode import SHARED_BASE, UNSIGNED, Action, Array, Decoder, Modifiers
from .errors import Deadlock, Unsupported
from .memory import Memory
from .parser import TYPE_BYTES, Address, Instruction, Kernel, Not, Operand, Pair, Register, Symbol, Vector
from .shared import SharedMemory

POISON = 0x7FFF_7FFF_7FFF_7FFF  # NaN as f64, as f32, and in every half as f16 and bf16
DONE = np.iinfo(np.int32).max
BARRIERS = 16


@dataclass
class Jump:
    """Go to `target`; lanes for which the guard does not hold go on to the next block."""

    target: int
    guard: int | None = None
    negated: bool = False


@dataclass
class Leave:
    """`ret` or `exit` for the lanes for which the guard holds."""

    guard: int | None = None
    negated: bool = False


@dataclass
class Barrier:
    """A CTA barrier. `count` is None when every live thread takes part; `waits` is False for `arrive`."""

    text: str
    number: int
    count: int | None
    waits: bool
    guard: int | None = None
    negated: bool = False


@dataclass(frozen=True)
class Use:
    """The registers an instruction names, and those it writes. A wgmma names none: it may chain on accumulators."""

    number: int
    touched: frozenset[int]
    written: frozenset[int]


@dataclass
class Block:
    """A straight run of instructions and what ends it; `size` counts all of them."""

    first: int
    body: list[Action] = field(default_factory=list)
    end: Jump | Leave | Barrier | None = None
    size: int = 0
    uses: list["Use"] = field(default_factory=list)
    starts_products: bool = False


@dataclass
class Program:
    """A decoded kernel."""

    kernel: Kernel
    decoder: Decoder
    blocks: list[Block]
    granule: int


def guarded(action: Action, guard: int, negated: bool) -> Action:
    """Run `action` on the lanes whose predicate holds; not at all when there is none."""

    def run(m: "Machine", mask: Array | None) -> None:
        holds = m.r[guard]
        if holds.size == 1:
            if bool(holds.flat[0]) != negated:
                action(m, mask)
            return
        if negated:
            holds = ~holds
        if mask is not None:
            holds = holds & mask
        elif holds.all():
            action(m, None)
            return
        if holds.any():
            action(m, holds)

    return run


def _barrier(decoder: Decoder, ins: Instruction) -> Barrier | None:
    """The barrier an instruction is, or None."""
    if ins.root not in ("bar", "barrier") or "warp" in ins.modifiers or "cluster" in ins.modifiers:
        return None
    mods = Modifiers(ins)
    kind = mods.take("sync", "arrive")
    mods.drop("cta", "aligned")
    mods.end()
    if kind is None:
        raise Unsupported(f"unsupported: {ins.text}")
    numbers = [decoder.source(operand, "u32", ins) for operand in ins.operands]
    return Barrier(ins.text, numbers[0], numbers[1] if len(numbers) > 1 else None, kind == "sync")


def compile_kernel(kernel: Kernel) -> Program:
    """Decode a kernel into blocks. Raises Unsupported for the first instruction that no builder knows."""
    decoder = Decoder(kernel)
    code = kernel.instructions
    leaders = {0, *kernel.labels.values()}
    ends = ("bra", "ret", "exit", "trap")
    for number, ins in enumerate(code):
        if ins.root in ends or _barrier(decoder, ins) is not None:
            leaders.add(number + 1)
    starts = sorted(leader for leader in leaders if leader < len(code))
    index = {start: i for i, start in enumerate(starts)}
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(code)], strict=True):
        block = Block(start, size=stop - start)
        for number in range(start, stop):
            ins = code[number]
            guard = ins.guard.index if ins.guard else None
            barrier = _barrier(decoder, ins)
            if barrier is not None:
                barrier.guard, barrier.negated = guard, ins.guard_negated
                block.end = barrier
            elif ins.root == "bra":
                target = ins.operands[0]
                if not isinstance(target, Symbol) or target.name not in kernel.labels or set(ins.modifiers) - {"uni"}:
                    raise Unsupported(f"unsupported: {ins.text}")
                block.end = Jump(index.get(kernel.labels[target.name], len(starts)), guard, ins.guard_negated)
            elif ins.root in ("ret", "exit"):
                block.end = Leave(guard, ins.guard_negated)
            else:
                decoder.current = number
                action = decode.build(decoder, ins)
                block.uses.append(_use(number, ins))
                block.starts_products |= ins.root == "wgmma"
                block.body.append(action if guard is None else guarded(action, guard, ins.guard_negated))
        blocks.append(block)
    return Program(kernel, decoder, blocks, _granule(code))


def _use(number: int, ins: Instruction) -> Use:
    if ins.root == "wgmma":
        return Use(number, frozenset(), frozenset())
    named = [_registers(operand) for operand in ins.operands]
    touched = frozenset().union(*named) | ({ins.guard.index} if ins.guard else set())
    writes = ins.root not in ("st", "red", "cp", "stmatrix", "prefetch", "fence")
    return Use(number, touched, named[0] if named and writes else frozenset())


def _registers(operand: Operand) -> frozenset[int]:
    """The numbers of the registers in an operand."""
    match operand:
        case Register(index):
            return frozenset({index})
        case Not(inner) | Address(inner, _):
            return _registers(inner)
        case Pair(first, second):
            return _registers(first) | _registers(second)
        case Vector(parts):
            return frozenset().union(*map(_registers, parts))
    return frozenset()


def _granule(code: list[Instruction]) -> int:
    """Bytes per unit of race bookkeeping: the narrowest element that the kernel stores to shared memory, at most 4."""
    sizes = [4]
    for ins in code:
        if ins.root in ("st", "atom", "red") and any(m.startswith("shared") for m in ins.modifiers):
            sizes += [TYPE_BYTES[m] for m in ins.modifiers if m in TYPE_BYTES]
        if ins.root == "stmatrix":
            sizes.append(4)
    return min(sizes)


class Machine:
    """State of one batch of `ctas` CTAs of `threads` threads."""

    def __init__(
        self,
        program: Program,
        cta_numbers: Array,
        grid: tuple[int, int, int],
        threads: int,
        parameters: Array,
        memory: Memory,
        shared_bytes: int,
        counters: Counters,
        checks: bool,
    ) -> None:
        kernel = program.kernel
        self.program, self.kernel, self.memory, self.counters = program, kernel, memory, counters
        self.ctas, self.threads, self.warps = len(cta_numbers), threads, threads // 32
        self.cta_numbers = cta_numbers
        self.lanes = self.ctas * threads
        self.shape = (self.ctas, threads)
        self.every_thread = np.arange(threads)
        self.every_lane_thread = np.tile(self.every_thread, self.ctas)
        self.every_lane_cta = np.repeat(np.arange(self.ctas), threads)
        self.parameters = parameters
        dynamic = program.decoder.dynamic_offset
        self.shared_end = SHARED_BASE + (dynamic + shared_bytes if shared_bytes else kernel.shared_bytes)
        self.shared = SharedMemory(self.ctas, self.shared_end)
        self.local = np.full((self.ctas, threads, kernel.local_bytes), 0x7F, np.uint8) if kernel.local_bytes else None
        self.step = 0
        self.trace: list[int] = [0]
        self.checker = Checker(self, program.granule) if checks else None
        self.copies: list[Any] = []
        self.copy_group: Array | int = 0
        self.products: Any = None
        self.pending_registers: set[int] = set()
        self.pending_inputs: set[int] = set()
        self.fragments: dict[Any, Any] = {}
        self.r: list[Any] = self._registers(grid)
        self.arrived = np.zeros((self.ctas, BARRIERS), np.int64)
        self.taking_part = np.zeros((self.ctas, BARRIERS, self.warps), bool)

    def _registers(self, grid: tuple[int, int, int]) -> list[Any]:
        decoder = self.program.decoder
        poison = {size: np.full((1, 1), POISON & ((1 << 8 * size) - 1), UNSIGNED[size]) for size in UNSIGNED}
        off = np.zeros((1, 1), bool)
        registers: list[Any] = [off if p else poison[w] for p, w in zip(decoder.predicate, decoder.widths, strict=True)]
        registers += [off] * (decoder.count - len(registers))
        for number, value in decoder.constants.items():
            registers[number] = value
        for number, name in decoder.specials.items():
            registers[number] = self._special(name, grid)
        return registers

    def _special(self, name: str, grid: tuple[int, int, int]) -> Array:
        """The value of a predefined register. The block has one dimension; clusters hold one CTA."""
        thread = np.arange(self.threads, dtype=np.uint32)[None, :]
        number = self.cta_numbers[:, None]
        lane = thread % 32
        one = np.ones((1, 1), np.uint32)
        table: dict[str, Callable[[], Any]] = {
            "tid.x": lambda: thread,
            "ntid.x": lambda: one * self.threads,
            "ctaid.x": lambda: number % grid[0],
            "ctaid.y": lambda: number // grid[0] % grid[1],
            "ctaid.z": lambda: number // (grid[0] * grid[1]),
            **{f"nctaid.{axis}": (lambda size=size: one * size) for axis, size in zip("xyz", grid, strict=True)},
            "laneid": lambda: lane,
            "warpid": lambda: thread // 32,
            "nwarpid": lambda: one * self.warps,
            "dynamic_smem_size": lambda: one * (self.shared_end - SHARED_BASE - self.program.decoder.dynamic_offset),
            "total_smem_size": lambda: one * (self.shared_end - SHARED_BASE),
            "lanemask_eq": lambda: np.uint32(1) << lane,
            "lanemask_lt": lambda: (np.uint32(1) << lane) - np.uint32(1),
            "lanemask_le": lambda: (np.uint32(2) << lane) - np.uint32(1),
            "lanemask_gt": lambda: ~((np.uint32(2) << lane) - np.uint32(1)),
            "lanemask_ge": lambda: ~((np.uint32(1) << lane) - np.uint32(1)),
            "cluster_nctarank": lambda: one,
        }
        if name in table:
            return np.asarray(table[name]()).astype(np.uint32)
        if name.startswith("clusterid"):
            return self._special(name.replace("clusterid", "ctaid"), grid)
        return one if name.startswith(("ntid", "cluster_nctaid")) else np.zeros((1, 1), np.uint32)

    def tick(self, number: int) -> int:
        """Begin a step that touches memory: instruction `number` executes. Steps order the accesses."""
        self.step += 1
        if self.checker is not None:
            self.trace.append(number)
        return self.step

    def full(self, value: Array) -> Array:
        """`value` for every lane, shape (CTAs, threads)."""
        return value if value.shape == self.shape else np.broadcast_to(value, self.shape)

    def run(self) -> None:
        """Run the batch to its end."""
        block: int | None = 0
        live: Array | None = None
        while block is not None:
            block, live = self._together(block, live)

    def _execute(self, block: Block, mask: Array | None) -> None:
        warps = self.ctas * self.warps
        if mask is not None:
            warps = int(mask.reshape(-1, 32).any(1).sum())
        self.counters.warp_instructions += warps * block.size
        if not self.pending_registers and not block.starts_products:
            for action in block.body:
                action(self, mask)
            return
        for action, use in zip(block.body, block.uses, strict=True):
            if self.pending_registers and self.checker is not None:
                self._check_use(use)
            action(self, mask)

    def _check_use(self, use: Use) -> None:
        """Report an instruction that touches registers of a wgmma that has not been waited for."""
        assert self.checker is not None
        if not self.pending_registers.isdisjoint(use.touched):
            self.checker.note("register of a pending wgmma used", use.number, self.wgmma_of(use.touched))
        if not self.pending_inputs.isdisjoint(use.written):
            self.checker.note("input register of a pending wgmma overwritten", use.number, self.wgmma_of(use.written))

    def wgmma_of(self, registers: frozenset[int]) -> int:
        """The number of the pending wgmma that has one of the registers."""
        for product in self.products.flying if self.products is not None else []:
            if not registers.isdisjoint(product.registers + product.inputs):
                return product.number
        return 0

    def _holding(self, end: Jump | Leave | Barrier, mask: Array | None) -> Array | bool:
        """The lanes of the mask for which the guard of a block's end holds; True for all, False for none."""
        if end.guard is None:
            return True
        holds = self.r[end.guard]
        if end.negated:
            holds = ~holds
        if holds.size == 1:
            return bool(holds.flat[0])
        holds = self.full(holds)
        inside = holds if mask is None else holds & mask
        if not inside.any():
            return False
        total = self.lanes if mask is None else int(mask.sum())
        return True if int(inside.sum()) == total else inside

    def _together(self, number: int, live: Array | None) -> tuple[int | None, Array | None]:
        """Run while every live lane is at the same block."""
        blocks = self.program.blocks
        while number < len(blocks):
            block = blocks[number]
            self._execute(block, live)
            end = block.end
            if end is None:
                number += 1
                continue
            holding = self._holding(end, live)
            if holding is False:
                number += 1
            elif holding is not True or (
                isinstance(end, Barrier) and (end.count is not None or not end.waits or self.r[end.number].size > 1)
            ):
                return self._apart(number, live, holding)
            elif isinstance(end, Jump):
                number = end.target
            elif isinstance(end, Leave):
                return None, None
            else:
                self._all_arrived(live)
                number += 1
        return None, None

    def _all_arrived(self, live: Array | None) -> None:
        self.counters.barriers += self.ctas
        self.tick(-1)
        if self.checker is not None:
            self.checker.barrier_all()

    def _apart(self, number: int, live: Array | None, holding: Array | bool) -> tuple[int | None, Array | None]:
        """Run lanes that are at different blocks, lowest block first, until they meet again or leave.

        The block `number` has just been executed by the live lanes; `holding` are those for which its end applies.
        """
        blocks = self.program.blocks
        at = np.full(self.shape, number, np.int32)
        if live is not None:
            at[~live] = DONE
        waiting = np.full(self.shape, -1, np.int32)
        active = np.ones(self.shape, bool) if live is None else live
        while True:
            self._part(blocks[number].end, number, active, holding, at, waiting)
            self._release(at, waiting)
            runnable = (at < DONE) & (waiting < 0)
            if not runnable.any():
                if (at == DONE).all():
                    return None, None
                self._deadlock(at, waiting)
            number = int(at[runnable].min())
            active = runnable & (at == number)
            count = int(active.sum())
            if number >= len(blocks):
                at[active] = DONE
                holding, number = False, len(blocks) - 1
                active = np.zeros(self.shape, bool)
                continue
            if count == int((at < DONE).sum()):
                return number, None if count == self.lanes else active
            self._execute(blocks[number], active)
            end = blocks[number].end
            holding = False if end is None else self._holding(end, active)

    def _part(self, end: Any, number: int, active: Array, holding: Array | bool, at: Array, waiting: Array) -> None:
        """Move the active lanes past the end of block `number`."""
        at[active] = number + 1
        if end is None or holding is False:
            return
        moved = active if holding is True else holding
        if isinstance(end, Jump):
            at[moved] = end.target
        elif isinstance(end, Leave):
            at[moved] = DONE
        else:
            names = np.broadcast_to(self.r[end.number], self.shape)
            self.last_barrier = end.text
            counts = None if end.count is None else np.broadcast_to(self.r[end.count], self.shape)
            if int(names[moved].max()) >= BARRIERS:
                raise Unsupported(f"unsupported: barrier {int(names[moved].max())} of {BARRIERS} in {end.text}")
            self._arrive(moved, names, counts, end.waits, waiting)

    def _arrive(self, moved: Array, names: Array, counts: Array | None, waits: bool, waiting: Array) -> None:
        if not hasattr(self, "expected"):
            self.expected = np.zeros((self.ctas, BARRIERS), np.int64)
        for name in np.unique(names[moved]):
            lanes = moved & (names == name)
            self.arrived[:, name] += lanes.sum(1)
            self.taking_part[:, name] |= lanes.reshape(self.ctas, self.warps, 32).any(2)
            ctas = lanes.any(1)
            if counts is not None:
                self.expected[ctas, name] = np.where(lanes, counts, 0).max(1)[ctas]
            if waits:
                waiting[lanes] = name

    def _release(self, at: Array, waiting: Array) -> None:
        """Complete every barrier that all its threads have reached."""
        for cta, name in zip(*np.nonzero(self.arrived), strict=True):
            expected = int(self.expected[cta, name]) or int((at[cta] < DONE).sum())
            if self.arrived[cta, name] < expected:
                continue
            here = waiting[cta] == name
            waiting[cta, here] = -1
            self.counters.barriers += 1
            self.tick(-1)
            if self.checker is not None:
                self.checker.barrier(int(cta), self.taking_part[cta, name], here.reshape(self.warps, 32).any(1))
            self.arrived[cta, name] = 0
            self.expected[cta, name] = 0
            self.taking_part[cta, name] = False

    def _deadlock(self, at: Array, waiting: Array) -> None:
        cta = int(np.nonzero((waiting >= 0).any(1))[0][0])
        names, counts = np.unique(waiting[cta][waiting[cta] >= 0], return_counts=True)
        held = ", ".join(f"{count} threads at barrier {name}" for name, count in zip(names, counts, strict=True))
        raise Deadlock(
            f"no thread can go on at {self.last_barrier}: CTA {int(self.cta_numbers[cta])} has {held} "
            f"of {int((at[cta] < DONE).sum())} live threads"
        )
