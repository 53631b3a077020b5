"""The row kernels: narrow a wide row into d channels in registers, a function of the whole row, widen it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cast_kernels.evidence.cuda_model import design
from cast_kernels.evidence.cuda_model.arithmetic import Cta, Launch
from cast_kernels.evidence.cuda_model.design import COLUMNS, DEPTH, STEP_BYTES
from cast_kernels.evidence.cuda_model.problem import Choice, Sizes

SMS = design.HOPPER.processors
#: Instructions for one element in an epilogue. The first three were counted in the machine code of a trial of
#: `project` for bf16 (64 rows, release 13.0.88), GELU's gradient in that of `erff` beside `__expf`; the others by hand.
FIRST = 0.7  # an accumulator's first value: a bias or a table, in loads of 8 bytes
STORE = 1.4  # packed, stored to shared memory, and from there by TMA
NORM = 4.7  # sum, squares of the differences, scaled, packed
GELU = 14.0  # for a result that is rounded to 16 bits, as `gelu_to_round` of Triton's kernels
GELU_BACKWARD = 34.0  # GELU and its gradient at one place
NORM_BACKWARD = 8.0  # two sums of a row, three terms, packed
RESIDUAL = 2.0  # read from shared memory, unpacked, added
READ = 1.0  # read back and unpacked
COLUMN = 2.0  # a column sum: one addition, and its share of butterflies
ROUND = 1.0  # an operand in float32: read from shared memory, rounded, packed
#: Instructions of a warp in one step of a ring: waits, four `wgmma`, the arrival. Counted in the same machine code.
STEP = 38.0


@dataclass(frozen=True)
class Product:
    """rows x k times k x n."""

    k: int
    n: int
    left: int  # bytes of an element of the left side as it comes through the ring; 0: it is in registers

    @property
    def weights(self) -> int:
        """Bytes of the right side."""
        return 2 * self.k * self.n

    @property
    def steps(self) -> float:
        """Of the ring."""
        return self.k * self.n / (COLUMNS * DEPTH)

    def flops(self, rows: int) -> float:
        return 2.0 * rows * self.k * self.n

    def operand(self, rows: int) -> int:
        """Bytes of the left side that come in."""
        return rows * self.k * self.left

    def shared(self, rows: int) -> float:
        """Bytes that shared memory hands over or takes.

        TMA writes both sides. Every 64 rows have a warpgroup whose `wgmma` read the weights; they read the left side
        too, once for each 192 columns, if it has 16 bits. A left side of 32 bits is read by threads, once.
        """
        read = self.steps * STEP_BYTES * rows / 64
        if self.left == 2:
            read += self.steps * rows * DEPTH * 2
        elif self.left == 4:
            read += self.operand(rows)
        return read + self.weights + self.operand(rows)

    def rounding(self, rows: int) -> float:
        """Warp instructions that round the left side."""
        return rows * self.k * ROUND / 32 if self.left == 4 else 0.0


@dataclass(frozen=True)
class RowKernel:
    """One of them at one problem: all that its launch is made from."""

    name: str
    products: Sequence[Product]
    narrow: float  # instructions in epilogues for one row until the last product
    widen: float  # instructions for one row after that
    leaving: int  # bytes of a row that leave: written to shared memory, and read there by TMA
    coming: Mapping[str, int]  # bytes of a row of each stream beside left sides: written there, and read by threads
    tensors: float  # bytes of all tensors but weights, each once
    longest: float = 0.0  # instructions for one row of the longest epilogue between two products
    again: float = 0.0  # bytes that L2 hands over beside these
    before: Mapping[str, Cta] = field(default_factory=dict)  # what 64 rows of a stream take before the first product

    @property
    def weights(self) -> int:
        """Bytes of one stream's weights."""
        return sum(p.weights for p in self.products)

    def cta(self, rows: int, stream: str, columns: int = 1, staggered: bool = False) -> Cta:
        """One CTA: so many rows of a stream, and one of so many shares of the last product's columns."""
        products = self._products(columns)
        operands = sum(p.operand(rows) for p in products)
        between = (self.leaving + self.coming[stream]) / columns
        before, size = self.before.get(stream, Cta({})), rows / 64
        instructions = size * (before.issue + before.epilogue) + rows * (self.narrow + self.widen / columns) / 32
        return Cta(
            {"wgmma": sum(p.flops(rows) for p in products), "mma": size * before.flops},
            sum(p.shared(rows) for p in products),
            2 * rows * between + size * (before.shared + before.staged),
            sum(p.weights for p in products) + operands + rows * self.coming[stream] / columns + size * before.intake,
            issue=sum(p.steps for p in products) * STEP * rows / 16,
            epilogue=instructions + sum(p.rounding(rows) for p in products),
            warps=rows // 16,
            staggered=staggered,
            longest=rows / 2 * self.longest / 32,
            slack=(design.STAGES[128, self._ring] - 1) * 2.0 * 64 * COLUMNS * DEPTH,
        )  # fmt: skip

    def launch(self, sizes: Sizes, choice: Choice) -> Launch:
        """Over both streams. A cluster's CTAs load each weight once together."""
        ctas, fetched = [], 0.0
        for count, stream, rows, columns in self._items(sizes, choice):
            products = self._products(columns)
            ctas.append((count, self.cta(rows, stream, columns, choice.staggered and rows == 128)))
            fetched += count * sum(p.weights for p in products) / choice.cluster
            fetched += count * (1 - 1 / columns) * sum(p.operand(rows) for p in products)  # of all shares but one
        ctas.sort(key=lambda item: -item[1].epilogue)  # the longest first, as far as streams or shares differ
        takes = design.row(choice.rows, self._ring)
        return Launch(
            self.name, ctas, fetched + self.tensors + self.again, self.tensors + 2 * self.weights, choice.cluster,
            takes.per_sm, takes.spilled,
        )  # fmt: skip

    @property
    def _ring(self) -> int:
        """Bytes of an element of the widest operand in the ring."""
        return max(2, *(p.left for p in self.products))

    def _products(self, columns: int) -> list[Product]:
        last = self.products[-1]
        return [*self.products[:-1], Product(last.k, last.n // columns, last.left)]

    def _items(self, sizes: Sizes, choice: Choice) -> list[tuple[int, str, int, int]]:
        """(CTAs, stream, rows of one, shares of the last product's columns)."""
        whole = [(choice.ctas(rows), stream, choice.rows, 1) for stream, rows in sizes.rows.items()]
        if not choice.split_tail:
            return whole
        of_64, size = {stream: -(-rows // 64) for stream, rows in sizes.rows.items()}, choice.rows // 64
        full = sum(of_64.values()) // (SMS * size) * SMS  # CTAs that fill whole rounds
        found, left = [], {}
        for stream, tiles in of_64.items():
            count = min(full, tiles // size)
            full, left[stream] = full - count, choice.whole_clusters(tiles - count * size)
            found.append((count, stream, choice.rows, 1))
        columns = self._columns(sum(left.values()))
        if self._end(sum(left.values()), columns) >= size * self._end(-(-sum(left.values()) // size), 1):
            return whole
        found += [(count * columns, stream, 64, columns) for stream, count in left.items()]
        return [item for item in found if item[0]]

    def _columns(self, left: int) -> int:
        """Shares of the last product's columns that let so many CTAs of 64 rows end first."""
        steps = self.products[-1].n // COLUMNS
        return min((n for n in range(1, steps + 1) if steps % n == 0), key=lambda n: self._end(left, n))

    def _end(self, left: int, columns: int) -> float:
        """FLOP of one multiprocessor until all have so many rows of 64 behind them, each in shares of columns."""
        before = sum(p.flops(64) for p in self.products[:-1])
        return -(-left * columns // SMS) * (before + self.products[-1].flops(64) / columns)


def tables(sizes: Sizes, choice: Choice) -> dict[str, int]:
    """Bytes of a row of the position tables whose position changes from row to row: those of windows of space.

    The spatial stream answers there, with keys and values; the temporal one asks.
    """
    return {"spatial": 2 * sizes.d * choice.table_bytes, "temporal": sizes.d * choice.table_bytes}


def project(sizes: Sizes, choice: Choice) -> Launch:
    """x Wd', LayerNorm, then queries, keys and values from xhat in registers."""
    d, of = sizes.d, tables(sizes, choice)
    return RowKernel(
        "project", [Product(sizes.dim, d, sizes.stream_bytes), Product(d, 3 * d, 0)],
        d * (FIRST + NORM + STORE), 3 * d * (FIRST + STORE), leaving=4 * d * 2, coming=of,
        tensors=sizes.wide + sizes.narrow + 4 * sizes.all_rows + 6 * sizes.unit, longest=d * NORM,
        again=sum(rows * of[name] for name, rows in sizes.rows.items()),
    ).launch(sizes, choice)  # fmt: skip


def exchange_kernel(sizes: Sizes) -> RowKernel:
    """O Wo' -> h, GELU, up, and the residual tile that is written back in place."""
    d, wide_row = sizes.d, sizes.dim * sizes.stream_bytes
    kept = 0 if sizes.again else 1  # h
    return RowKernel(
        "exchange", [Product(d, d, 2), Product(d, sizes.dim, 0)],
        d * (FIRST + GELU + kept * STORE), sizes.dim * (FIRST + RESIDUAL + STORE),
        leaving=wide_row + kept * 2 * d, coming=dict.fromkeys(sizes.rows, wide_row),
        tensors=2 * sizes.unit + 2 * sizes.wide + kept * sizes.narrow, longest=d * GELU,
    )  # fmt: skip


def project_again(sizes: Sizes, choice: Choice) -> Launch:
    """Queries, keys and values from xhat, which is kept."""
    d, of = sizes.d, tables(sizes, choice)
    return RowKernel(
        "project again", [Product(d, 3 * d, 0)], d * READ, 3 * d * (FIRST + STORE), leaving=3 * d * 2,
        coming={name: size + 2 * d for name, size in of.items()}, tensors=sizes.narrow + 6 * sizes.unit,
        again=sum(rows * of[name] for name, rows in sizes.rows.items()),
    ).launch(sizes, choice)  # fmt: skip


def exchange_backward(sizes: Sizes, choice: Choice) -> Launch:
    """dy Wu -> dh by GELU's gradient at h -> dO; also g, which the weight gradient reads.

    h does not fit beside dy Wu in registers: where it is made again from O, it is laid down and read back from L2.
    Under autocast dy leaves once more, rounded, for the weight gradient. GELU's gradient takes longer than a ring lets
    halves of a CTA part: this kernel is never staggered.
    """
    if choice.staggered:
        choice = replace(choice, rows=64, cluster=4, staggered=False)
    d, again, cast = sizes.d, int(sizes.again), int(sizes.cast)
    products = [Product(d, d, 2)] * again + [Product(sizes.dim, d, sizes.stream_bytes), Product(d, d, 0)]
    items = sum(choice.ctas(rows) for rows in sizes.rows.values())
    return RowKernel(
        "exchange_backward", products,
        again * d * (FIRST + STORE) + d * (READ + GELU_BACKWARD + 2 * STORE + COLUMN)
        + sizes.dim * (COLUMN + cast * STORE),
        d * STORE,
        leaving=(3 + again) * 2 * d + cast * 2 * sizes.dim, coming=dict.fromkeys(sizes.rows, 2 * d),
        tensors=sizes.wide + 3 * sizes.narrow + (2 + 2 * again) * sizes.unit + cast * sizes.wide / 2
        + items * column_sums(sizes)["exchange_backward"],
        again=again * sizes.narrow,
    ).launch(sizes, choice)  # fmt: skip


def project_backward(sizes: Sizes, choice: Choice) -> Launch:
    """dQ, dK, dV -> dn -> dz by LayerNorm's backward -> dx = dz Wd + dy."""
    d, wide_row = sizes.d, sizes.dim * sizes.stream_bytes
    items = sum(choice.ctas(rows) for rows in sizes.rows.values())
    return RowKernel(
        "project_backward", [Product(3 * d, d, 2), Product(d, sizes.dim, 0)],
        d * (2 * READ + NORM_BACKWARD + 3 * COLUMN + STORE), sizes.dim * (FIRST + RESIDUAL + STORE),
        leaving=wide_row + 2 * d, coming=dict.fromkeys(sizes.rows, wide_row + 2 * d),
        tensors=6 * sizes.unit + 2 * sizes.narrow + 4 * sizes.all_rows + 2 * sizes.wide
        + items * column_sums(sizes)["project_backward"],
        longest=d * (2 * READ + NORM_BACKWARD + 3 * COLUMN),
    ).launch(sizes, choice)  # fmt: skip


def column_sums(sizes: Sizes) -> dict[str, int]:
    """Bytes that a CTA leaves for vectors' gradients: of up and proj; of the norm's two and down."""
    return {"exchange_backward": (sizes.dim + sizes.d) * 4, "project_backward": 3 * sizes.d * 4}
