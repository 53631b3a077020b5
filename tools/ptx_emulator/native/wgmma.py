"""Operations for wgmma in a CTA that runs alone, and what its checks ask of the registers around it.

The core asks of each product whether its registers were written since the last `wgmma.fence`, by identity of arrays.
The machine has a token for each watched register instead: an operation after each instruction that writes one renews
it, and a move hands the source's on.
"""

from dataclasses import replace

from ptx_emulator.core.forms.wgmma import read_mma_async
from ptx_emulator.core.syntax import Instruction, Literal, Register, registers_in
from ptx_emulator.native.encode import Encoder, Operation, encoder
from ptx_emulator.native.library import NONE
from ptx_emulator.native.liveness import writes_first
from ptx_emulator.native.products import KINDS


@encoder("wgmma")
def encode_wgmma(e: Encoder, ins: Instruction) -> Operation | None:
    if not e.alone or ins.guard is not None:
        return None
    if "fence" in ins.modifiers:
        return Operation("wgmma.fence", ())
    if "commit_group" in ins.modifiers:
        return Operation("wgmma.commit", ())
    if "wait_group" in ins.modifiers:
        keep = ins.operands[0]
        return Operation("wgmma.wait", (int(keep.text, 0),), steps=True) if isinstance(keep, Literal) else None
    return _product(e, ins)


def _product(e: Encoder, ins: Instruction) -> Operation | None:
    """The numbers of a product in the order of `MmaAsync` in csrc/ptx/wgmma.h."""
    mma = read_mma_async(e.decoder, ins)
    key = e.keys.setdefault(mma.registers, len(e.keys))
    if any(other != mma.registers and not set(other).isdisjoint(mma.registers) for other in e.keys):
        return None
    a_registers = e.list_of([e.number(r) for r in mma.a_registers])
    registers = e.list_of([e.number(r) for r in mma.registers])
    watched = e.list_of([e.watched[r] for r in mma.registers])
    inputs = e.list_of([e.watched[r] for r in mma.a_registers])
    layouts = (int(mma.a_layout.mn_major), int(mma.b_layout.mn_major))
    a = NONE if mma.a_registers else e.number(mma.a)
    numbers = [key, mma.b_layout.rows, mma.b_layout.depth, KINDS[mma.kind], int(mma.sign < 0), *layouts, a]
    numbers += [e.number(mma.b), a_registers, e.number(mma.scale), int(mma.negated), registers, watched]
    numbers += [inputs, len(mma.a_registers), e.counter(mma.name)]
    return Operation("wgmma.product", (e.list_of(numbers),), steps=True)


@encoder("fence", "membar")
def encode_fence(e: Encoder, ins: Instruction) -> Operation | None:
    """A fence between proxies; any other changes nothing where no warp has a clock."""
    if not e.shared or "mbarrier_init" in ins.modifiers or "tensormap::generic" in ins.modifiers:
        return None
    return Operation("fence.proxy.async", (), steps=True) if "proxy" in ins.modifiers else Operation("nothing", ())


def around(e: Encoder, ins: Instruction, operations: list[Operation]) -> list[Operation]:
    """The operations of an instruction with what the checks of wgmma ask of it."""
    if not e.alone or not operations or ins.root == "wgmma":
        return operations
    named = [registers_in(operand) for operand in ins.operands]
    touched = frozenset().union(*named, {ins.guard.index} if ins.guard else ()) & e.watched.keys()
    if not touched:
        return operations
    written = (named[0] if writes_first(ins) else frozenset()) & e.watched.keys()
    lists = [e.list_of([e.watch(r) for r in sorted(some)]) for some in (touched, written)]
    before = Operation("wgmma.uses", (lists[0], len(touched), lists[1], len(written)), guarded=False)
    if not written:
        return [before, *operations]
    after = Operation("wgmma.touch", (lists[1], len(written)))
    if ins.root == "mov" and len(operations) == 1 and operations[0].name.startswith("mov."):
        source = ins.operands[1]
        old = e.watch(source.index) if isinstance(source, Register) else -1
        after = replace(after, name="wgmma.rename", operands=(e.watch(next(iter(written))), old))
    return [before, *operations, after]
