"""The launches as they are built: what csrc/cuda launches, with the resources that ptxas reported.

The row kernels are `rows`' but for sums of columns, which `weight_gradient` makes. What a CTA of the other kernels
executes was counted by the emulator.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from cast_kernels.evidence.cuda_model import rows
from cast_kernels.evidence.cuda_model.arithmetic import USUAL, Cta, Launch
from cast_kernels.evidence.cuda_model.problem import Choice, Sizes
from cast_kernels.evidence.cuda_model.rows import SMS, Product, RowKernel

_COMPILED = Path(__file__).parents[3] / "benchmarks/evidence/cuda_compile.json"
#: Machine instructions for one of PTX: divisions and addresses. By hand, in the loops of the attention kernels.
MACHINE = 1.1
_SECTOR, _WAVEFRONT = 32, 128  # bytes
#: Of csrc/cuda: rows of a tile; members of a position that a CTA adds, and the most shares of them; CTAs of a cluster.
_TILE, _MEMBERS, _SPLITS, _PAIR = 64, 64, 8, 2


@dataclass(frozen=True)
class Counted:
    """What one CTA executes: one clip of the paper's size in bf16, by `ptx_emulator`, 2026-11-30."""

    instructions: int  # PTX's, of warps
    flops: int  # by mma.sync
    wavefronts: int  # of shared memory
    loads: int  # sectors
    stores: int
    chain: float = 0.0  # loads one behind the other, by hand

    def cta(self, more: float = 0.0, chain: float | None = None) -> Cta:
        """As the model takes it; `more` instructions, and another chain where it depends on the batch."""
        return Cta(
            {"mma": self.flops}, self.wavefronts * _WAVEFRONT, intake=self.loads * _SECTOR,
            issue=(self.instructions + more) * MACHINE, chain=self.chain if chain is None else chain,
        )  # fmt: skip

    @property
    def l2(self) -> int:
        """Bytes that L2 hands over or takes."""
        return (self.loads + self.stores) * _SECTOR


#: A CTA of each kind.
COUNTED: dict[str, Counted] = {
    "prepare, a square": Counted(2304, 0, 256, 320, 256, 1),
    "prepare, 64 positions": Counted(13240, 3145728, 3840, 2512, 64, 3),
    "attention, space": Counted(16516, 3670016, 2432, 1824, 640, 1),
    "attention, space, last rows": Counted(6351, 917504, 1088, 1584, 40, 1),
    "attention, time": Counted(4496, 262144, 384, 768, 640),
    "attention_backward, queries": Counted(15184, 5111808, 3504, 2400, 512, 1),
    "attention_backward, queries, last rows": Counted(6617, 1277952, 1632, 1620, 32, 1),
    "attention_backward, keys": Counted(23068, 6815744, 5760, 3060, 1024, 4),
    "attention_backward, keys, last rows": Counted(11864, 1703936, 2640, 2580, 64, 4),
    "attention_backward, time": Counted(9012, 1179648, 1208, 1088, 1536, 1),
    "position_sums, 8 members": Counted(1368, 0, 0, 192, 48, 1),
    "finish, a matrix": Counted(4710, 0, 1, 774, 129, 5),
    "finish, of time": Counted(7916, 0, 1097, 1288, 129, 6),
    "finish, of space": Counted(44566, 0, 13481, 4366, 129, 18),
    "finish, a table": Counted(24168, 0, 12800, 3840, 32),
    "finish, a norm": Counted(25131, 0, 80, 6128, 2, 22),
}  # fmt: skip
#: What each further member of a position takes a CTA of `position_sums`, counted as the difference of two.
MEMBER = (5562 - 1368) / (49 - 8)


@cache
def compiled(kernel: str) -> Any:
    """A kernel's row of benchmarks/evidence/cuda_compile.json, in bf16."""
    found = json.loads(_COMPILED.read_text())["kernels"]
    return next(row for row in found if row["kernel"] == kernel)


def launch(
    name: str, kernel: str, ctas: Sequence[tuple[int, Cta]], l2: float, dram: float, cluster: int = 1, threads: int = 0
) -> Launch:
    """A launch with the resources of its kernel; `threads` that spill, where not all do."""
    used = compiled(kernel)
    stack = used["stack_bytes"] * (threads or used["threads"])
    kept = max(USUAL.local / used["ctas"] - used["shared_bytes"], 0.0)  # of the stack, by L1
    spilled = used["spills"] * (threads or used["threads"]) * 4 * max(0.0, 1 - kept / stack) if stack else 0.0
    return Launch(name, ctas, l2, dram, cluster, used["ctas"], int(spilled))


def _of_rows(made: Launch, kernel: str, sizes: Sizes, by_streams: bool = True) -> Launch:
    """The same with what ptxas reported."""
    streams = f"_{'fp32' if sizes.cast else 'bf16'}" if by_streams else ""
    name = f"bcast_{kernel}_bf16{streams}_{sizes.d}"
    return launch(made.name, name, made.ctas, made.l2, made.dram, made.cluster, threads=128)


def _counted(name: str, kernel: str, ctas: Sequence[tuple[int, Counted, Cta]], dram: float) -> Launch:
    return launch(name, kernel, [(n, cta) for n, _, cta in ctas], sum(n * one.l2 for n, one, _ in ctas), dram)


def _squares(elements: int) -> int:
    return elements // (_TILE * _TILE)


def prepare(sizes: Sizes, tables: bool, matrices: int, rounded: int = 0) -> Launch:
    """Squares of matrices, and squares of tables: the longest last, as in the grid."""
    square, table = COUNTED["prepare, a square"], COUNTED["prepare, 64 positions"]
    count = 3 * sizes.d // _TILE * (1 + -(-sizes.patches // _TILE)) if tables else 0
    moved = matrices * (sizes.stream_bytes + 2) + rounded * 6 + tables * sizes.positions * 3 * sizes.d * 2
    kernel = f"bcast_prepare_bf16_{'fp32' if sizes.cast else 'bf16'}"
    ctas = [(_squares(matrices + rounded), square, square.cta()), (count, table, table.cta())]
    return _counted("prepare", kernel, [one for one in ctas if one[0]], moved)


def _tiles(sizes: Sizes) -> tuple[int, int, int]:
    """Tiles of 64 queries: those of windows of space that are full, those that end one, those of windows of time."""
    windows = sizes.batch * sizes.frames
    full = sizes.patches // _TILE
    ends = -(-sizes.patches // _TILE) - full
    return windows * full, windows * ends, sizes.batch * -(-sizes.frames * sizes.patches // _TILE)


def attention(sizes: Sizes) -> Launch:
    """A window's queries by 64: 196 are three tiles and one of four rows."""
    groups, kinds = sizes.d // _TILE, ("space", "space, last rows", "time")
    counts = _tiles(sizes)
    ctas = [(groups * n, COUNTED[f"attention, {k}"], COUNTED[f"attention, {k}"].cta())
            for n, k in zip(counts, kinds, strict=True)]  # fmt: skip
    return _counted("attention", "bcast_attention_bf16_32", ctas, 8 * sizes.unit + 2 * sizes.scores)


def attention_backward(sizes: Sizes) -> Launch:
    """Both directions by `mma.sync`: scores of longer windows twice, for queries and for keys."""
    groups = sizes.d // _TILE
    full, ends, time = _tiles(sizes)
    kinds = {"queries": full, "queries, last rows": ends, "keys": full, "keys, last rows": ends, "time": time}
    ctas = [(groups * n, COUNTED[f"attention_backward, {k}"], COUNTED[f"attention_backward, {k}"].cta())
            for k, n in kinds.items()]  # fmt: skip
    moved = (8 + 7) * sizes.unit + 2 * sizes.scores  # of windows of space O as well
    return _counted("attention_backward", "bcast_attention_backward_bf16_32", ctas, moved)


def exchange_h(sizes: Sizes, choice: Choice) -> Launch:
    """O Wo' -> h, for a backward that has not kept it. GELU is computed and left."""
    d = sizes.d
    made = RowKernel(
        "exchange for h", [Product(d, d, 2)], d * (rows.FIRST + rows.GELU + rows.STORE), 0.0, leaving=2 * d,
        coming=dict.fromkeys(sizes.rows, 0), tensors=2 * sizes.unit + sizes.narrow,
    ).launch(sizes, replace(choice, split_tail=False))  # fmt: skip
    return _of_rows(made, "exchange", sizes)


def exchange_backward(sizes: Sizes, choice: Choice) -> Launch:
    """dy Wu -> dh by GELU's gradient at h -> dO; also g. Under autocast dy leaves once more, rounded."""
    d, cast = sizes.d, int(sizes.cast)
    made = RowKernel(
        "exchange_backward", [Product(sizes.dim, d, sizes.stream_bytes), Product(d, d, 0)],
        d * (rows.READ + rows.GELU_BACKWARD + 2 * rows.STORE) + cast * sizes.dim * rows.STORE, d * rows.STORE,
        leaving=3 * 2 * d + cast * 2 * sizes.dim, coming=dict.fromkeys(sizes.rows, 2 * d),
        tensors=sizes.wide + 4 * sizes.narrow + cast * sizes.wide / 2,
    ).launch(sizes, choice)  # fmt: skip
    return _of_rows(made, "exchange_backward", sizes)


def project_backward(sizes: Sizes, choice: Choice) -> Launch:
    """dQ, dK, dV -> dz by LayerNorm's backward -> dx = dz Wd + dy. xhat comes in twice."""
    d, wide_row = sizes.d, sizes.dim * sizes.stream_bytes
    made = RowKernel(
        "project_backward", [Product(3 * d, d, 2), Product(d, sizes.dim, 0)],
        d * (2 * rows.READ + rows.NORM_BACKWARD + rows.STORE),
        sizes.dim * (rows.FIRST + rows.RESIDUAL + rows.STORE), leaving=wide_row + 2 * d,
        coming=dict.fromkeys(sizes.rows, wide_row + 4 * d),
        tensors=6 * sizes.unit + 2 * sizes.narrow + 4 * sizes.all_rows + 2 * sizes.wide, again=sizes.narrow,
    ).launch(sizes, choice)  # fmt: skip
    return _of_rows(made, "project_backward", sizes)


def splits(sizes: Sizes) -> dict[str, int]:
    """Shares of a position's members, in windows of time and of space."""
    members = {"time": sizes.batch * sizes.patches, "space": sizes.batch * sizes.frames}
    return {way: min(-(-count // _MEMBERS), _SPLITS) for way, count in members.items()}


def position_sums(sizes: Sizes) -> Launch:
    """dQ, dK and dV once more: 384 columns and a share of a position's members a CTA, eight loads at once."""
    base, shares, ctas, l2 = COUNTED["position_sums, 8 members"], splits(sizes), [], 0.0
    lengths = {"time": sizes.frames, "space": sizes.patches}
    for way, length in lengths.items():
        members = -(-sizes.patch_rows // length // shares[way])
        count = 3 * length * shares[way]
        ctas.append((count, base.cta(MEMBER * (members - 8), chain=members / 8)))
        l2 += count * (members * sizes.d * 2 + sizes.d * 4)
    return launch("position_sums", "bcast_position_sums_bf16", ctas, l2, l2)


def pairs(sizes: Sizes) -> int:
    """Pairs of tiles, 256 x 384, of the ten matrices: 384 rows are two."""
    d, by = sizes.d, 2 * 128
    of = ((sizes.dim, d), (d, d), (d, d), (2 * d, d), (d, sizes.dim))
    return 2 * sum(-(-m // by) * (n // d) for m, n in of)


def weight_gradient(sizes: Sizes) -> Launch:
    """256 x 384 by clusters of two, equal shares of the steps; the sums of left's columns beside the products."""
    clusters = SMS // _PAIR
    steps = sum(pairs(sizes) // 2 * -(-count // _TILE) for count in sizes.rows.values())
    share, left = -(-steps // clusters), pairs(sizes) + clusters - 1
    sides, read = (128 + 384) * _TILE * 2, 2 * (64 + 384) * _TILE * 2
    cta = Cta(
        {"wgmma": share * 2.0 * 128 * 384 * _TILE}, share * (sides + read), intake=share * sides,
        issue=share * (rows.STEP * 8 + 1400), epilogue=left / clusters * 128 * 384 / 32, warps=8,
    )  # fmt: skip
    written = left * 2 * 128 * 384 * 4
    wide = sizes.wide * 2 // sizes.stream_bytes
    operands = 2 * wide + 2 * sizes.narrow + 2 * 6 * sizes.unit
    fetched = SMS * share * (128 + 384 / _PAIR) * _TILE * 2
    return launch(
        "weight_gradient", f"bcast_weight_gradient_bf16_{sizes.d}", [(SMS, cta)], fetched + written,
        operands + written, _PAIR,
    )  # fmt: skip


def finish(sizes: Sizes) -> Launch:
    """Parts of matrices, corrections by position sums, tables, norms. What is longest begins last, as in the grid."""
    d, shares = sizes.d, splits(sizes)
    matrix = d * d // (16 * 128)  # CTAs
    plain, time, space = (COUNTED[f"finish, {kind}"] for kind in ("a matrix", "of time", "of space"))
    table, norm = COUNTED["finish, a table"], COUNTED["finish, a norm"]
    tables = {"time": -(-sizes.frames // 8), "space": -(-sizes.patches // 8)}
    ctas = [(2 * 5 * matrix, plain, plain.cta()), (3 * matrix, time, time.cta()), (3 * matrix, space, space.cta())]
    for way, count in tables.items():
        # 2d rows of W: each thread brings the sums of three, then a quarter of W by 16.
        ctas.append((2 * count * d // 64, table, table.cta(chain=3 * shares[way] + 2 * d / 64)))
    ctas.append((2 * d // 8, norm, norm.cta()))
    written = (pairs(sizes) + SMS // _PAIR - 1) * 2 * 128 * 384 * 4
    summed = sum(shares[way] * length * 3 * d * 4 for way, length in (("time", sizes.frames), ("space", sizes.patches)))
    kernel = f"bcast_finish_bf16_{'fp32' if sizes.cast else 'bf16'}"
    return _counted("finish", kernel, ctas, written + summed + sizes.matrices * sizes.stream_bytes)


def forward(sizes: Sizes, choice: Choice) -> list[Launch]:
    """A training forward."""
    gamma = 2 * 3 * sizes.d**2
    return [
        prepare(sizes, True, gamma + (sizes.matrices - gamma if sizes.cast else 0)),
        _of_rows(rows.project(sizes, choice), "project", sizes), attention(sizes),
        _of_rows(rows.exchange_kernel(sizes).launch(sizes, choice), "exchange", sizes),
    ]  # fmt: skip


def backward(sizes: Sizes, choice: Choice) -> list[Launch]:
    """A backward with every gradient."""
    again, gamma = sizes.again, 2 * 3 * sizes.d**2
    turned = sizes.matrices  # all transposed
    kept = again * (gamma + sizes.cast * 2 * (sizes.dim * sizes.d + sizes.d**2))  # as forward reads them
    rounded = sizes.wide // sizes.stream_bytes if sizes.cast else 0  # x
    launches = [prepare(sizes, again, turned + kept, rounded)]
    if again:
        launches += [
            _of_rows(rows.project_again(sizes, choice), "project_again", sizes, by_streams=False),
            exchange_h(sizes, choice),
        ]
    return [
        *launches, exchange_backward(sizes, choice), attention_backward(sizes), project_backward(sizes, choice),
        position_sums(sizes), weight_gradient(sizes), finish(sizes),
    ]  # fmt: skip
