"""A kernel as the vector machine runs it: each block is cut into segments of operations and interpreted actions."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx_emulator.core.forms.barriers import CtaBarrier, WarpBarrier
from ptx_emulator.core.forms.wgmma import read_mma_async
from ptx_emulator.core.pause import no_collection
from ptx_emulator.core.program import Block, Jump, Leave, Program
from ptx_emulator.core.spaces import Array
from ptx_emulator.native import floats, integers, memories  # noqa: F401  (register encoders)
from ptx_emulator.native.encode import Encoder
from ptx_emulator.native.library import BARRIER, BLOCK_WORDS, JUMP, LEAVE, NEXT, NONE, WORDS, library
from ptx_emulator.native.liveness import Accesses, Places, place
from ptx_emulator.native.products import native_product
from ptx_emulator.native.segments import Segment, cut

#: Predefined registers that differ between the CTAs of a batch.
OF_A_CTA = ("ctaid", "clusterid", "cluster_ctaid", "cluster_ctarank")


@dataclass
class NativeProgram:
    """The segments and interpreted actions, by their place in the body, of each block, by its first instruction."""

    encoder: Encoder
    places: Places
    entry: frozenset[int]  # registers that may be read before they are written
    blocks: dict[int, list[Segment | int]] = field(default_factory=dict)
    products: dict[int, Any] = field(default_factory=dict)  # actions of `wgmma.mma_async`, by their number
    lists: Array = field(default_factory=lambda: np.zeros(1, np.int32))
    operations: Array = field(default_factory=lambda: np.zeros(0, np.int32))  # of all blocks
    table: Array = field(default_factory=lambda: np.zeros(0, np.int32))  # BLOCK_WORDS for each block
    written: frozenset[int] = frozenset()

    @property
    def whole(self) -> bool:
        """Whether a CTA may run from its first block to its end without the interpreter."""
        return bool((self.table.reshape(-1, BLOCK_WORDS)[:, 0] >= 0).all())


def native_program(program: Program, threads: int, shared: bool) -> NativeProgram:
    """The program for CTAs of so many threads, kept with it. shared: the machine may access shared memory."""
    kept = program.__dict__.setdefault("native", {})
    if (threads, shared) not in kept:
        with no_collection():
            found = _encode(program, threads, shared, bool(shared and program.decoder.watched))
            kept[threads, shared] = (
                found if found.whole or not found.encoder.alone else _encode(program, threads, shared)
            )
    return kept[threads, shared]


def parted_program(program: Program, threads: int, shared: bool = True) -> NativeProgram:
    """The program for CTAs whose threads part, by themselves or by a schedule: wgmma is the interpreter's."""
    kept = program.__dict__.setdefault("parted", {})
    if (threads, shared) not in kept:
        with no_collection():
            kept[threads, shared] = _encode(program, threads, shared)
    return kept[threads, shared]


def _encode(program: Program, threads: int, shared: bool, alone: bool = False) -> NativeProgram:
    code, decoder = program.kernel.instructions, program.decoder
    accesses = Accesses.of(code)
    watched = decoder.watched
    widths = [*decoder.widths, *[8] * (decoder.count - len(decoder.widths))]
    places, entry = place(program, accesses, widths, watched)
    for number, name in decoder.specials.items():
        if name.split(".")[0] in OF_A_CTA:
            places.add(number, 4)
    places.add(-1, 8)  # what nobody reads
    numbered = {register: number for number, register in enumerate(sorted(watched))}
    sink = places.offset[-1]
    encoder = Encoder(decoder, library().codes, places.offset, threads, shared, alone, numbered, sink)
    result = NativeProgram(encoder, places, entry)
    result.blocks = cut(program, accesses, encoder)
    for number in code.of("wgmma") if shared and not alone else ():
        ins = code[number]
        if "mma_async" in ins.modifiers and ins.guard is None:
            decoder.current = number
            result.products[number] = native_product(read_mma_async(decoder, ins), encoder.number)
    _tabulate(result, program)
    result.written = frozenset(accesses.writes.tolist())
    result.lists = np.array([*encoder.extra, 0], np.int32)
    return result


def _tabulate(result: NativeProgram, program: Program) -> None:
    """The table of blocks, and their operations one after the other."""
    code = program.kernel.instructions
    rows, operations, count = [], [np.zeros((0, WORDS), np.int32)], 0
    for block in program.blocks:
        items, end = result.blocks[block.first], _end(result, program, block)
        segment = items[0] if items else Segment(0, 0)
        alone = len(items) < 2 and isinstance(segment, Segment)
        if not alone or end is None or not isinstance(segment, Segment):
            rows.append([-1] + [0] * (BLOCK_WORDS - 1))
            continue
        steps = result.encoder.list_of(segment.steps)
        together = isinstance(block.end, CtaBarrier | WarpBarrier)
        together |= any(form.root == "wgmma" for form in code.forms[block.first : block.first + block.size])
        rows.append([count, segment.count, block.size, *end, len(segment.steps), steps, int(together)])
        operations.append(segment.operations)
        count += segment.count
    result.table = np.array(rows, np.int32)
    result.operations = np.concatenate(operations).reshape(-1)


def _end(result: NativeProgram, program: Program, block: Block) -> tuple[int, int, int, int] | None:
    """(kind, target, guard, whether it is negated) of a block's end; None where the machine does not know it."""
    end = block.end
    if end is None:
        return NEXT, 0, NONE, 0
    guard = NONE if end.guard is None else result.encoder.number(end.guard)
    negated = int(end.negated)
    if isinstance(end, Jump):
        return JUMP, end.target, guard, negated
    if isinstance(end, Leave):
        return LEAVE, 0, guard, negated
    if isinstance(end, WarpBarrier):
        return NEXT, 0, NONE, 0  # all lanes of each warp are here
    if isinstance(end, CtaBarrier) and end.count is None and end.waits and end.reduction is None:
        return (BARRIER, 0, NONE, 0) if end.guard is None and end.number in program.decoder.constants else None
    return None
