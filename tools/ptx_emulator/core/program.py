"""A decoded kernel: straight runs of instructions and what ends each of them."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

from ptx_emulator.core import decode
from ptx_emulator.core.code import Code
from ptx_emulator.core.decode import Action, Decoder
from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.forms.warp import EXCHANGES, exchange
from ptx_emulator.core.kernel import Kernel
from ptx_emulator.core.pause import no_collection
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import State, Wait
from ptx_emulator.core.syntax import TIMER, TYPE_BYTES, Address, Instruction, Symbol, Tile, registers_in


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


@dataclass(frozen=True)
class Use:
    """The registers an instruction names, and those it writes. A wgmma names none: it may chain on accumulators."""

    number: int
    touched: frozenset[int]
    written: frozenset[int]


class Actions(Sequence[Action]):
    """The actions of a block's instructions. One is built when it is asked for, unless it was built to see its form.

    built: of the kernel's instructions, by their numbers.
    """

    def __init__(self, decoder: Decoder, first: int, count: int, built: dict[int, Action]) -> None:
        self.decoder: Decoder = decoder
        self.numbers: range = range(first, first + count)
        self.built: dict[int, Action] = built
        self._whole: list[Action] | None = None  # all of them

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Action: ...
    @overload
    def __getitem__(self, place: slice) -> list[Action]: ...
    def __getitem__(self, place: int | slice) -> Action | list[Action]:
        if isinstance(place, slice):
            return [self._of(number) for number in self.numbers[place]]
        return self._of(self.numbers[place])

    def __iter__(self) -> Iterator[Action]:
        if self._whole is None:
            self._whole = [self._of(number) for number in self.numbers]
        return iter(self._whole)

    def _of(self, number: int) -> Action:
        action = self.built.get(number)
        if action is None:
            count = self.decoder.count
            self.decoder.current = number
            action = self.built[number] = _action(self.decoder, self.decoder.kernel.instructions[number])
            if self.decoder.count != count:
                raise RuntimeError(f"an instruction has constants of its own, unlike others of its form: {number}")
        return action


@dataclass
class Block:
    """A straight run of instructions and what ends it; `size` counts all of them."""

    first: int
    code: Sequence[Instruction]  # of the kernel
    body: Actions
    end: Jump | Leave | Wait | None = None
    size: int = 0
    starts_products: bool = False

    @cached_property
    def uses(self) -> list[Use]:
        """The registers that each instruction of the body names."""
        stop = self.first + len(self.body)
        return [use_of(number, self.code[number]) for number in range(self.first, stop)]


@dataclass
class Program:
    """A decoded kernel."""

    kernel: Kernel
    decoder: Decoder
    blocks: list[Block]
    granule: int
    clocked: bool  # has what warps of a CTA do to each other, or the async proxy to them, beyond barriers of the CTA

    @property
    def timed(self) -> bool:
        """Whether it reads the time."""
        return any(TIMER in ins.operands for ins in self.kernel.instructions)


def guarded(action: Action, guard: int, negated: bool) -> Action:
    """Run `action` on the lanes whose predicate holds; not at all when there is none."""

    def run(m: State, mask: Array | None) -> None:
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


def _action(decoder: Decoder, ins: Instruction) -> Action:
    action = decode.build(decoder, ins)
    return action if ins.guard is None else guarded(action, ins.guard.index, ins.guard_negated)


def compile_kernel(kernel: Kernel) -> Program:
    """Decode a kernel into blocks. Raises Unsupported for the first instruction that no builder knows."""
    decoder = Decoder(kernel)
    try:
        with no_collection():
            return _compile(kernel, decoder)
    except Unsupported as error:
        raise error.located(kernel.where(decoder.current)) from None


def _compile(kernel: Kernel, decoder: Decoder) -> Program:
    code = kernel.instructions
    examples = [form.example for form in dict.fromkeys(code.forms)]
    clocked = any(_clocked(ins) for ins in examples)
    waits = _waits(code, decoder, clocked)
    ends = {*waits, *code.of("bra", "ret", "exit")}
    leaders = {0, *kernel.labels.values(), *(number + 1 for number in ends)}
    starts = sorted(leader for leader in leaders if leader < len(code))
    index = {start: i for i, start in enumerate(starts)}
    firsts = {form: number for number, form in reversed(list(enumerate(code.forms)))}
    actions: dict[int, Action] = {}
    found: dict[int, Jump | Leave | Wait] = {}
    for number in sorted({*ends, *firsts.values()}):  # all other instructions are of a form that one of these has
        decoder.current = number
        if number in ends:
            found[number] = waits.get(number) or _end(code[number], kernel.labels, index)
        else:
            actions[number] = _action(decoder, code[number])
    products = code.of("wgmma")
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(code)], strict=True):
        end = found.get(stop - 1)
        body = Actions(decoder, start, stop - start - (end is not None), actions)
        starts_products = bisect_left(products, start) < bisect_left(products, stop)
        blocks.append(Block(start, code, body, end, stop - start, starts_products))
    return Program(kernel, decoder, blocks, _granule(examples), clocked)


def _waits(code: Code, decoder: Decoder, clocked: bool) -> dict[int, Wait]:
    """The instructions at which lanes sleep; exchanges of a warp among them where an mbarrier may hold some lanes."""
    found: dict[int, Wait] = {}
    for number in code.of(*EXCHANGES) if clocked else ():
        decoder.current = number
        found[number] = exchange(decoder, code[number])
    for number in code.of(*decode.WAITS):
        decoder.current = number
        end = decode.build_wait(decoder, code[number])
        if end is not None:
            found[number] = end
    return found


def _end(ins: Instruction, labels: Mapping[str, int], index: Mapping[int, int]) -> Jump | Leave:
    """What a branch or a return is to its block. index: instruction -> the block that begins with it."""
    if ins.root != "bra":
        return Leave(_guard(ins), ins.guard_negated)
    target = ins.operands[0]
    if not isinstance(target, Symbol) or target.name not in labels or set(ins.modifiers) - {"uni"}:
        raise Unsupported(f"unsupported: {ins.text}")
    return Jump(index.get(labels[target.name], len(index)), _guard(ins), ins.guard_negated)


def _guard(ins: Instruction) -> int | None:
    return None if ins.guard is None else ins.guard.index


def _clocked(ins: Instruction) -> bool:
    return ins.root in ("mbarrier", "mapa") or bool({"bulk", "cluster", "mbarrier"} & set(ins.modifiers))


def use_of(number: int, ins: Instruction) -> Use:
    """What an instruction does to registers."""
    if ins.root == "wgmma":
        return Use(number, frozenset(), frozenset())
    named = [registers_in(operand) for operand in ins.operands]
    touched = frozenset().union(*named) | ({ins.guard.index} if ins.guard else set())
    writes = bool(named) and not isinstance(ins.operands[0], Address | Tile)
    return Use(number, touched, named[0] if writes else frozenset())


def _granule(code: list[Instruction]) -> int:
    """Bytes per unit of race bookkeeping: the narrowest element that the kernel stores to shared memory, at most 4."""
    sizes = [4]
    for ins in code:
        if ins.root in ("st", "atom", "red") and any(m.startswith("shared") for m in ins.modifiers):
            sizes += [TYPE_BYTES[m] for m in ins.modifiers if m in TYPE_BYTES]
        if ins.root == "stmatrix":
            sizes.append(4)
    return min(sizes)
