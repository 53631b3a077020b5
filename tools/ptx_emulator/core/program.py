"""A decoded kernel: straight runs of instructions and what ends each of them."""

from dataclasses import dataclass, field

from ptx_emulator.core import decode
from ptx_emulator.core.decode import Action, Decoder
from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.pause import no_collection
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import State, Wait
from ptx_emulator.core.syntax import (
    TYPE_BYTES,
    Address,
    Instruction,
    Kernel,
    Symbol,
    Tile,
    registers_in,
)


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


@dataclass
class Block:
    """A straight run of instructions and what ends it; `size` counts all of them."""

    first: int
    body: list[Action] = field(default_factory=list)
    end: Jump | Leave | Wait | None = None
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
    clocked: bool  # has what warps of a CTA do to each other, or the async proxy to them, beyond barriers of the CTA


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
    leaders = {0, *kernel.labels.values()}
    waits: dict[int, Wait] = {}
    for number, ins in enumerate(code):
        decoder.current = number
        end = decode.build_wait(decoder, ins)
        if end is not None:
            waits[number] = end
        if end is not None or ins.root in ("bra", "ret", "exit"):
            leaders.add(number + 1)
    starts = sorted(leader for leader in leaders if leader < len(code))
    index = {start: i for i, start in enumerate(starts)}
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(code)], strict=True):
        block = Block(start, size=stop - start)
        for number in range(start, stop):
            ins, decoder.current = code[number], number
            guard = ins.guard.index if ins.guard else None
            if number in waits:
                block.end = waits[number]
            elif ins.root == "bra":
                target = ins.operands[0]
                if not isinstance(target, Symbol) or target.name not in kernel.labels or set(ins.modifiers) - {"uni"}:
                    raise Unsupported(f"unsupported: {ins.text}")
                block.end = Jump(index.get(kernel.labels[target.name], len(starts)), guard, ins.guard_negated)
            elif ins.root in ("ret", "exit"):
                block.end = Leave(guard, ins.guard_negated)
            else:
                action = decode.build(decoder, ins)
                block.uses.append(_use(number, ins))
                block.starts_products |= ins.root == "wgmma"
                block.body.append(action if guard is None else guarded(action, guard, ins.guard_negated))
        blocks.append(block)
    return Program(kernel, decoder, blocks, _granule(code), any(_clocked(ins) for ins in code))


def _clocked(ins: Instruction) -> bool:
    return ins.root in ("mbarrier", "mapa") or bool({"bulk", "cluster", "mbarrier"} & set(ins.modifiers))


def _use(number: int, ins: Instruction) -> Use:
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
