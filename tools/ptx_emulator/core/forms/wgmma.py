"""wgmma: asynchronous products of a warpgroup (four warps) with operands in shared memory.

Source: PTX ISA, "Asynchronous warpgroup level matrix instructions". A product is computed at issue, but its
accumulators stay apart from the registers until `wgmma.wait_group` has waited for its group: the hardware promises no
earlier moment.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction, items
from ptx_emulator.core.descriptors import Layout, read_operand
from ptx_emulator.core.errors import Divergence, Unsupported
from ptx_emulator.core.formats import canonical
from ptx_emulator.core.forms.mma import fragment
from ptx_emulator.core.ordered import products_in_order
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import Part, State
from ptx_emulator.core.syntax import TYPE_BYTES, Instruction, Literal, Not, Register

GROUP_THREADS = 128
ROWS = 64


@dataclass
class Product:
    """A product in flight. active: [CTAs, warpgroups]; group: number of the wgmma-group, per warpgroup."""

    registers: tuple[int, ...]
    inputs: tuple[int, ...]
    active: Array
    group: Array
    number: int
    regions: list[Any]


class Products(Part):
    """The wgmma state of one batch."""

    def __init__(self, m: State) -> None:
        self.shape: tuple[int, int] = (m.ctas, m.threads // GROUP_THREADS)
        self.group: Array = np.zeros(self.shape, np.int64)
        self.flying: list[Product] = []
        self.matrices: dict[tuple[int, ...], Array] = {}  # accumulators not yet in registers, [warpgroups, 64, N]
        self.held: dict[tuple[int, ...], Array] = {}  # for which warpgroups, [CTAs, warpgroups]
        self.settled: dict[tuple[int, ...], tuple[Array, list[Array]]] = {}  # and those whose registers hold them
        self.fenced: dict[int, Any] | None = None  # the watched registers' values at the last fence

    def may_part(self) -> bool:
        """Not with products that wait in groups."""
        return False


def products(m: State, text: str) -> Products:
    """The batch's wgmma state."""
    if m.threads % GROUP_THREADS:
        raise Divergence(f"{m.threads} threads are no whole number of warpgroups: {text}")
    return m.of(Products)


def active_groups(m: State, mask: Array | None, text: str) -> Array:
    """Which warpgroups execute, [CTAs, warpgroups]; raises Divergence when a part of one does."""
    state = products(m, text)
    if mask is None:
        return np.ones(state.shape, bool)
    lanes = np.broadcast_to(mask, m.shape).reshape(*state.shape, GROUP_THREADS)
    if (lanes.any(2) != lanes.all(2)).any():
        raise Divergence(f"reached by some threads of a warpgroup only: {text}")
    return np.all(lanes, axis=2)


def from_registers(m: State, registers: tuple[int, ...]) -> Array:
    """Accumulator registers as matrices [warpgroups, 64, N]: register i holds row 16w + l/4 + 8(i/2%2), column 8(i/4) +
    2(l%4) + i%2."""
    groups = m.lanes // GROUP_THREADS
    out = np.empty((groups, 4, 2, 8, len(registers) // 4, 4, 2), np.float32)
    for i, register in enumerate(registers):
        lanes = np.broadcast_to(m.r[register], m.shape).view(np.float32).reshape(groups, 4, 8, 4)
        out[:, :, i // 2 % 2, :, i // 4, :, i % 2] = lanes
    return out.reshape(groups, ROWS, 2 * len(registers))


def to_registers(m: State, registers: tuple[int, ...], matrix: Array, mask: Array | None) -> list[Array]:
    """Write matrices back to the accumulator registers; returns the registers' arrays."""
    view = matrix.reshape(-1, 4, 2, 8, len(registers) // 4, 4, 2)
    planes = np.ascontiguousarray(view.transpose(4, 2, 6, 0, 1, 3, 5)).view(np.uint32).reshape(len(registers), *m.shape)
    for i, register in enumerate(registers):
        m.r[register] = planes[i] if mask is None else np.where(mask, planes[i], m.r[register])
    return [m.r[register] for register in registers]


@instruction("wgmma")
def build_wgmma(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    mods.drop("sync", "aligned")
    what = mods.take("fence", "commit_group", "wait_group", "mma_async")
    if what == "mma_async":
        return _product(d, ins)
    mods.end()
    text, number = ins.text, d.current
    if what == "fence":
        watched, own = d.watched, len(d.kernel.registers)

        def fence(m: State, mask: Array | None) -> None:
            active_groups(m, mask, text)
            immediates = range(own, len(m.r))  # and predefined registers
            products(m, text).fenced = {register: m.r[register] for register in (*watched, *immediates)}

        return fence
    if what == "commit_group":

        def commit(m: State, mask: Array | None) -> None:
            active = active_groups(m, mask, text)
            products(m, text).group += active

        return commit
    keep = ins.operands[0] if what == "wait_group" else None
    if not isinstance(keep, Literal):
        raise Unsupported(f"unsupported: {text}")
    newest = int(keep.text, 0)

    def wait(m: State, mask: Array | None) -> None:
        active = active_groups(m, mask, text)
        m.tick(number)
        _wait(m, products(m, text), active, newest)

    return wait


def _wait(m: State, state: Products, waiting: Array, keep: int) -> None:
    """Complete the products of the waiting warpgroups but for those of their newest `keep` groups."""
    still: list[Product] = []
    for product in state.flying:
        done = waiting & product.active & (product.group < state.group - keep)
        if m.checker is not None:
            m.checker.operands_done(product.regions, done)
        left = product.active & ~done
        if left.any():
            product.active = left
            still.append(product)
    state.flying = still
    for registers, matrix in list(state.matrices.items()):
        busy = np.zeros(state.shape, bool)
        for product in still:
            if product.registers == registers:
                busy |= product.active
        held = state.held[registers]
        ready = waiting & held & ~busy
        if not ready.any():
            continue
        arrays = to_registers(m, registers, matrix, None if ready.all() else np.repeat(ready, GROUP_THREADS, axis=1))
        if ready.all():
            state.settled[registers] = (matrix, arrays)
        held = held & ~ready
        if held.any():
            state.held[registers] = held
        else:
            del state.matrices[registers], state.held[registers]
    m.pending_registers = {r for product in still for r in product.registers}
    m.pending_inputs = {r for product in still for r in product.inputs}


def _scale(operand: Any, ins: Instruction) -> int:
    if not isinstance(operand, Literal) or int(operand.text) not in (1, -1):
        raise Unsupported(f"unsupported: {ins.text}")
    return int(operand.text)


@dataclass(frozen=True)
class MmaAsync:
    """A `wgmma.mma_async` as it is written: numbers of registers, -1 for a descriptor that is none, and layouts."""

    registers: tuple[int, ...]
    a_registers: tuple[int, ...]
    a: int
    b: int
    scale: int
    negated: bool
    sign: int
    kind: str
    a_layout: Layout
    b_layout: Layout
    number: int
    text: str
    name: str

    @property
    def flops(self) -> int:
        """Of one warpgroup."""
        return 2 * ROWS * self.b_layout.rows * self.b_layout.depth


def read_mma_async(d: Decoder, ins: Instruction) -> MmaAsync:
    """A `wgmma.mma_async`. Raises Unsupported."""
    mods = Modifiers(ins)
    mods.drop("sync", "aligned", "mma_async")
    types = mods.types()
    shape = mods.left.pop(0) if mods.left else ""
    mods.end()
    if len(types) != 3 or types[0] != "f32" or types[1] != types[2] or types[1] not in ("bf16", "f16", "tf32"):
        raise Unsupported(f"unsupported: {ins.text}")
    kind = types[1]
    size = 2 if kind != "tf32" else TYPE_BYTES["tf32"]
    depth = 32 // size
    targets = items(ins.operands[0])
    columns = 2 * len(targets)
    if shape != f"m64n{columns}k{depth}" or columns % 8 or not 8 <= columns <= 256:
        raise Unsupported(f"unsupported: {ins.text}")
    registers = tuple(d.destination(o, "f32", ins) for o in targets)
    a_items = items(ins.operands[1])
    a_registers = tuple(d.source(o, "b32", ins) for o in a_items) if len(a_items) > 1 else ()
    if a_registers and len(a_registers) != 4:
        raise Unsupported(f"unsupported: {ins.text}")
    a = -1 if a_registers else d.source(ins.operands[1], "b64", ins)
    b = d.source(ins.operands[2], "b64", ins)
    flag = ins.operands[3]
    scale, negated = d.predicate_source(flag if isinstance(flag, Register | Not | Literal) else Literal("1"), ins)
    scale_a, scale_b = (_scale(o, ins) for o in ins.operands[4:6])
    transposed = [int(o.text) for o in ins.operands[6:] if isinstance(o, Literal)]
    if len(transposed) != (0 if size == 4 else 1 if a_registers else 2) or len(ins.operands) != 6 + len(transposed):
        raise Unsupported(f"unsupported: {ins.text}")
    b_layout = Layout(columns, depth, size, bool(transposed and transposed[-1]))
    a_layout = Layout(ROWS, depth, size, bool(transposed and transposed[0]))
    name = f"wgmma.{shape}.{kind}"
    layouts, sign = (a_layout, b_layout), scale_a * scale_b
    return MmaAsync(registers, a_registers, a, b, scale, negated, sign, kind, *layouts, d.current, ins.text, name)


def _product(d: Decoder, ins: Instruction) -> Action:
    mma = read_mma_async(d, ins)
    kind, text, registers, a_registers = mma.kind, mma.text, mma.registers, mma.a_registers

    def multiply(m: State, mask: Array | None) -> None:
        active = active_groups(m, mask, text)
        state = products(m, text)
        m.tick(mma.number)
        regions: list[Any] = []
        if a_registers:
            left = fragment(m, a_registers, 2, kind)
            if (
                mma.a_layout.size == 2
            ):  # a fragment's k runs over (register, half, t); the document's (register, t, half)
                left = np.ascontiguousarray(left.reshape(-1, 16, 2, 2, 4).swapaxes(3, 4))
            left = left.reshape(-1, ROWS, mma.a_layout.depth)
        else:
            left = read_operand(m, m.r[mma.a], mma.a_layout, kind, active, regions, text)
        right = read_operand(m, m.r[mma.b], mma.b_layout, kind, active, regions, text)
        total = products_in_order(left, right)
        if mma.sign < 0:
            np.negative(total, out=total)
        check_fence(m, state, registers, a_registers, active)
        _accumulate(m, state, registers, total, m.r[mma.scale], mma.negated, active, text)
        launched(m, state, mma, active, regions)

    return multiply


def launched(m: State, state: Products, mma: MmaAsync, active: Array, regions: list[Any]) -> None:
    """The product is in flight."""
    registers, inputs = mma.registers, mma.a_registers
    state.held[registers] = state.held.get(registers, np.zeros(state.shape, bool)) | active
    state.flying.append(Product(registers, inputs, active, state.group.copy(), mma.number, regions))
    m.pending_registers |= set(registers)
    m.pending_inputs |= set(inputs)
    m.counters.tensor(mma.name, mma.flops * int(active.sum()))


def check_fence(m: State, state: Products, registers: tuple[int, ...], inputs: tuple[int, ...], active: Array) -> None:
    """Registers that wgmma reads must not have been written since the last wgmma.fence.

    A plain copy of a value that was in a register at the fence is no such write: LLVM puts the copies that an inline
    instruction's in-and-out operands need behind the fence, where they name registers and move nothing.
    """
    if m.checker is None:
        return
    chained = registers in state.held and bool(state.held[registers][active].all())
    watched = inputs if chained else registers + inputs
    ordered = {id(value) for value in (state.fenced or {}).values()}
    written = [r for r in watched if id(_original(m, r)) not in ordered]
    if state.fenced is None or any(_changed(m, state.fenced[r], m.r[r], active) for r in written):
        m.checker.note("wgmma register written after the last wgmma.fence", m.trace[-1], m.trace[-1])


def _original(m: State, register: int) -> Array:
    """The value that the register is a copy of, or its own."""
    copy, value = m.renamed.get(register, (None, None))
    return value if copy is m.r[register] and value is not None else m.r[register]


def _changed(m: State, before: Array, now: Array, active: Array) -> bool:
    """Whether a register was written; where only some warpgroups are active, whether it changed in them."""
    if before is now:
        return False
    if active.all():
        return True
    different = np.broadcast_to(before != now, m.shape).reshape(*active.shape, GROUP_THREADS)
    return bool(different[active].any())


def _accumulate(
    m: State,
    state: Products,
    registers: tuple[int, ...],
    total: Array,
    scale: Array,
    negated: bool,
    active: Array,
    text: str,
) -> None:
    """Add the accumulators where scale-d holds, and keep the sum for the registers."""
    check_overlap(state, registers, text)
    keep = per_group(m, scale, negated, active, text)
    everyone = bool(active.all())
    if keep.any() or not everyone:
        old = current(m, state, registers)
        if keep.any():
            total = total + old if keep.all() else np.where(keep, total + old, total)
        if not everyone:
            total = np.where(active.reshape(-1, 1, 1), total, old)
    state.matrices[registers] = canonical(total).view(np.float32)


def check_overlap(state: Products, registers: tuple[int, ...], text: str) -> None:
    """Raise Unsupported where other accumulators in flight share some of the registers."""
    for other in state.matrices:
        if other != registers and not set(other).isdisjoint(registers):
            raise Unsupported(f"unsupported: accumulators that overlap with those of another product in flight: {text}")


def per_group(m: State, scale: Array, negated: bool, active: Array, text: str) -> Array:
    """The scale-d predicate of each warpgroup, broadcasting with [warpgroups, 64, N]."""
    keep = ~scale if negated else scale
    if keep.size == 1:
        return keep
    lanes = np.broadcast_to(keep, m.shape).reshape(-1, GROUP_THREADS)
    if ((lanes.any(1) != lanes.all(1)) & active.reshape(-1)).any():
        raise Divergence(f"scale-d differs within a warpgroup: {text}")
    return lanes[:, :1, None]


def current(m: State, state: Products, registers: tuple[int, ...]) -> Array:
    """The accumulators of every warpgroup: from what is held back, else from the registers."""
    held = state.held.get(registers)
    if held is not None and held.all():
        return state.matrices[registers]
    settled = state.settled.get(registers)
    if held is None and settled is not None:
        matrix, arrays = settled
        if all(m.r[r] is array for r, array in zip(registers, arrays, strict=True)):
            return matrix
    loaded = from_registers(m, registers)
    return loaded if held is None else np.where(held.reshape(-1, 1, 1), state.matrices[registers], loaded)
