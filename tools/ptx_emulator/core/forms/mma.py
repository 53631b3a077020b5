"""mma.sync: products of small matrices spread over the registers of a warp.

Source: PTX ISA, "Warp-level matrix instructions: mma", with the fragment layouts of its figures. With g = lane / 4 and
t = lane % 4: A register r holds row g + 8(r%2); C register i holds row g + 8(i/2), column 2t + i%2; B has column g.
The order of k is free as long as A and B share it: here k runs over (register, half, t). Products and sums are float32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator.core.decode import Action, Decoder, Modifiers, instruction, items
from ptx_emulator.core.errors import Unsupported
from ptx_emulator.core.formats import canonical, f16_to_f32
from ptx_emulator.core.forms.matrix import whole_warps
from ptx_emulator.core.ordered import products_in_order
from ptx_emulator.core.spaces import Array
from ptx_emulator.core.state import Part, State
from ptx_emulator.core.syntax import Instruction

CACHED_FRAGMENTS = 64
QUAD = np.complex128  # four float32 of a row of a fragment, copied as one element
LOW_HALF = np.uint32(0xFFFF)


def halves_of(kind: str) -> list[Callable[[Array], Array]]:
    """The float32 numbers in a 32-bit register of a fragment, first to last."""
    sixteen = np.uint32(16)
    if kind == "bf16":
        return [lambda a: (a << sixteen).view(np.float32), lambda a: (a & np.uint32(0xFFFF0000)).view(np.float32)]
    if kind == "f16":
        return [
            lambda a: f16_to_f32((a & LOW_HALF).astype(np.uint16)),
            lambda a: f16_to_f32((a >> sixteen).astype(np.uint16)),
        ]
    if kind == "tf32":  # the hardware reads the upper 19 bits only
        return [lambda a: (a & np.uint32(0xFFFFE000)).view(np.float32)]
    raise Unsupported(f"unsupported: matrix elements of type {kind}")


class Fragments(Part):
    """Fragments as matrices: the registers' arrays, kept so that their identities stay theirs, and the matrix."""

    def __init__(self, m: State) -> None:
        self.kept: dict[tuple[object, ...], tuple[tuple[Array, ...], Array]] = {}


def fragment(m: State, registers: tuple[int, ...], rows: int, kind: str) -> Array:
    """A fragment as float32 matrices [warps, 8 * rows, k], rows being 2 for A and 1 for B (transposed).

    Kept while the registers stay the same: an A fragment meets many B fragments.
    """
    arrays = tuple(m.r[r] for r in registers)
    key = (rows, kind, *map(id, arrays))
    kept = m.of(Fragments).kept
    found = kept.get(key)
    if found is not None:
        return found[1]
    halves = halves_of(kind)
    count = len(registers) // rows
    out = np.empty((m.ctas * m.warps, rows, 8, count, len(halves)), QUAD)
    for number, array in enumerate(arrays):
        lanes = array if array.shape == m.shape else np.broadcast_to(array, m.shape)
        for place, half in enumerate(halves):
            out[:, number % rows, :, number // rows, place] = (
                np.ascontiguousarray(half(lanes)).view(QUAD).reshape(-1, 8)
            )
    matrix = out.view(np.float32).reshape(m.ctas * m.warps, 8 * rows, 4 * count * len(halves))
    if len(kept) >= CACHED_FRAGMENTS:
        del kept[next(iter(kept))]
    kept[key] = (arrays, matrix)
    return matrix


# shape and element type -> (registers of A, registers of B, k)
_SHAPES: dict[tuple[str, str], tuple[int, int, int]] = {
    ("m16n8k16", "bf16"): (4, 2, 16),
    ("m16n8k16", "f16"): (4, 2, 16),
    ("m16n8k8", "bf16"): (2, 1, 8),
    ("m16n8k8", "f16"): (2, 1, 8),
    ("m16n8k8", "tf32"): (4, 2, 8),
    ("m16n8k4", "tf32"): (2, 1, 4),
}


@instruction("mma")
def build_mma(d: Decoder, ins: Instruction) -> Action | None:
    mods = Modifiers(ins)
    mods.drop("sync", "aligned", "row", "col")
    types = mods.types()
    shape = mods.left.pop(0) if mods.left else ""
    mods.end()
    if (
        len(types) != 4
        or types[0] != "f32"
        or types[3] != "f32"
        or types[1] != types[2]
        or (shape, types[1]) not in _SHAPES
    ):
        raise Unsupported(f"unsupported: {ins.text}")
    if "row" not in ins.modifiers or "col" not in ins.modifiers:
        raise Unsupported(f"unsupported: {ins.text}")
    kind = types[1]
    size_a, size_b, depth = _SHAPES[shape, kind]
    lists = [items(o) for o in ins.operands]
    if [len(one) for one in lists] != [4, size_a, size_b, 4]:
        raise Unsupported(f"unsupported: {ins.text}")
    outs = [d.destination(o, "f32", ins) for o in lists[0]]
    a = tuple(d.source(o, "b32", ins) for o in lists[1])
    b = tuple(d.source(o, "b32", ins) for o in lists[2])
    c = [d.source(o, "f32", ins) for o in lists[3]]
    name, flops, text = f"mma.{shape}.{kind}", 2 * 16 * 8 * depth, ins.text

    def multiply(m: State, mask: Array | None) -> None:
        whole_warps(m, mask, text)
        warps = m.ctas * m.warps
        sums = products_in_order(fragment(m, a, 2, kind), fragment(m, b, 1, kind)).reshape(warps, 2, 32, 2)
        active = warps if mask is None else int(np.broadcast_to(mask, m.shape).reshape(-1, 32).any(1).sum())
        m.counters.tensor(name, flops * active)
        r: list[Any] = m.r
        results = []
        for i in range(4):
            old = r[c[i]]
            wide = old if old.shape == m.shape else np.broadcast_to(old, m.shape)
            total = np.add(sums[:, i // 2, :, i % 2], wide.view(np.float32).reshape(warps, 32))
            results.append(canonical(total).reshape(m.shape))
        for out, value in zip(outs, results, strict=True):
            r[out] = value if mask is None else np.where(mask, value, r[out])

    return multiply
