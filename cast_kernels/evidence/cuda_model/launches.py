"""A forward's and a backward's launches; those that are neither row kernels nor attention."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from cast_kernels.evidence.cuda_model import built, design
from cast_kernels.evidence.cuda_model.arithmetic import Cta, Launch
from cast_kernels.evidence.cuda_model.attention import (
    attention_backward_long,
    attention_backward_short,
    exchange,
    position_bytes,
)  # fmt: skip
from cast_kernels.evidence.cuda_model.problem import Choice, Sizes
from cast_kernels.evidence.cuda_model.rows import (
    SMS,
    STEP,
    column_sums,
    exchange_backward,
    project,
    project_again,
    project_backward,
)  # fmt: skip

#: Rows and columns of a tile of `weight_gradient`, rows of a step.
_TILE, _DEEP = (128, 384), 64
#: Products that a float32 product of tables becomes on tensor cores, each of 16 bits.
_SPLIT = 3


def prepare(sizes: Sizes, choice: Choice, tables: bool, matrices: int, rounded: int = 0) -> Launch:
    """Weights as products read them, and position tables: (beta + E) W' + b, for each position of both windows.

    Args:
        sizes: of the call.
        choice: with the tables' element.
        tables: whether they are made.
        matrices: elements of matrices that are read and written.
        rounded: elements of streams that are read in float32 and written in 16 bits.
    """
    products = 2.0 * sizes.positions * 3 * sizes.d * sizes.d if tables else 0.0
    made = sizes.positions * 3 * sizes.d * choice.table_bytes if tables else 0
    moved = matrices * (sizes.stream_bytes + 2) + made + rounded * 6
    each = Cta({"mma": _SPLIT * products / SMS}, issue=(moved / 512 * 3 + _SPLIT * products / 4096 * 2) / SMS)
    return Launch("prepare", [(SMS, each)], moved, moved, per_sm=design.PLAIN.per_sm, spilled=design.PLAIN.spilled)


def weight_gradient(sizes: Sizes, choice: Choice, shared_by: int = 2) -> Launch:
    """The ten matrices in tiles of 128 x 384, both operands MN-major; pairs of CTAs share the side of 384."""
    count = tiles(sizes)
    steps = sum(count // 2 * -(-rows // _DEEP) for rows in sizes.rows.values())  # all with their stream's rows
    ctas = SMS if choice.parts == "shares" else 2 * count
    share, left = -(-steps // ctas), parts(sizes, choice)
    sides = sum(_TILE) * _DEEP * 2
    read = 2 * (64 + _TILE[1]) * _DEEP * 2  # by the wgmmas of two warpgroups
    cta = Cta(
        {"wgmma": share * 2.0 * _TILE[0] * _TILE[1] * _DEEP}, share * (sides + read), intake=share * sides,
        issue=share * STEP * 8, epilogue=left / ctas * _TILE[0] * _TILE[1] / 32, warps=8,
    )  # fmt: skip
    written = left * _TILE[0] * _TILE[1] * 4
    fetched = ctas * share * (_TILE[0] + _TILE[1] / shared_by) * _DEEP * 2
    wide = sizes.wide * 2 // sizes.stream_bytes  # of x, and of dy: in 16 bits
    operands = 2 * wide + 2 * sizes.narrow + 2 * 6 * sizes.unit  # g, dz; dh, O, dQ, dK, dV, xhat
    return Launch(
        "weight_gradient", [(ctas, cta)], fetched + written, operands + written, shared_by,
        design.WEIGHT_GRADIENT.per_sm, design.WEIGHT_GRADIENT.spilled,
    )  # fmt: skip


def tiles(sizes: Sizes) -> int:
    """Tiles of the ten matrices, which are whole ones of them at the paper's size."""
    return sizes.matrices // (_TILE[0] * _TILE[1])


def parts(sizes: Sizes, choice: Choice) -> int:
    """Parts of tiles that are added up afterwards: two of each, or one between two bounds of tiles and of shares."""
    count = tiles(sizes)
    return 2 * count if choice.parts == "halves" else SMS + count - gcd(SMS, count)


def sums(sizes: Sizes, choice: Choice) -> Launch:
    """Parts of matrices, vectors' and positions' sums, corrections for gamma and positions; gradients."""
    items = sum(choice.ctas(rows) for rows in sizes.rows.values())
    partial = parts(sizes, choice) * _TILE[0] * _TILE[1] * 4 + items * sum(column_sums(sizes).values())
    partial += sum(position_bytes(sizes).values())
    moved = partial + sizes.matrices * sizes.stream_bytes
    products = 2.0 * sizes.positions * 3 * sizes.d * sizes.d  # positions' gradients times W, and S' E
    each = Cta({"mma": 2 * _SPLIT * products / SMS}, issue=(moved / 512 * 3 + _SPLIT * products / 1024) / SMS)
    return Launch("sums", [(SMS, each)], moved, moved, per_sm=design.PLAIN.per_sm, spilled=design.PLAIN.spilled)


def forward(sizes: Sizes, choice: Choice) -> list[Launch]:
    """A training forward."""
    if choice.built:
        return built.forward(sizes, choice)
    matrices = sizes.matrices if sizes.cast else 2 * 3 * sizes.d**2
    return [prepare(sizes, choice, True, matrices), project(sizes, choice), *exchange(sizes, choice)]


def backward(sizes: Sizes, choice: Choice) -> list[Launch]:
    """A backward with every gradient."""
    if choice.built:
        return built.backward(sizes, choice)
    launches = []
    if sizes.cast:  # x too, which the weight gradient reads
        elements = sizes.wide // sizes.stream_bytes
        launches.append(prepare(sizes, choice, sizes.again, sizes.matrices, elements))
    elif sizes.again:
        launches.append(prepare(sizes, choice, True, 2 * 3 * sizes.d**2))
    if sizes.again:
        launches.append(project_again(sizes, choice))
    return [
        *launches, exchange_backward(sizes, choice), attention_backward_long(sizes), attention_backward_short(sizes),
        project_backward(sizes, choice), weight_gradient(sizes, choice), sums(sizes, choice),
    ]  # fmt: skip


#: Phase -> its launches.
PHASES: dict[str, Callable[[Sizes, Choice], list[Launch]]] = {"forward": forward, "backward": backward}
