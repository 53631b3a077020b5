"""The problem's sizes, and what of the decomposition may be chosen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """One call of B-CAST: two streams that ask each other, windows of time (t2s) and of space (s2t)."""

    batch: int
    frames: int = 8
    patches: int = 196
    dim: int = 768
    d: int = 384
    heads: int = 12
    stream_bytes: int = 2  # of an element of x, y, dy, dx; 4 under autocast, where parameters have 4 too
    recompute: str = "cheap"  # or "nothing"

    @property
    def patch_rows(self) -> int:
        return self.batch * self.frames * self.patches

    @property
    def rows(self) -> dict[str, int]:
        """Of each stream; the spatial one has CLS."""
        return {"spatial": self.patch_rows + self.batch * self.frames, "temporal": self.patch_rows}

    @property
    def all_rows(self) -> int:
        return sum(self.rows.values())

    @property
    def wide(self) -> int:
        """Bytes of both streams."""
        return self.all_rows * self.dim * self.stream_bytes

    @property
    def narrow(self) -> int:
        """Bytes of both streams' bottlenecks, with CLS."""
        return self.all_rows * self.d * 2

    @property
    def unit(self) -> int:
        """Bytes of one direction's queries, or of its keys: a bottleneck of all patches."""
        return self.patch_rows * self.d * 2

    @property
    def scores(self) -> int:
        """Bytes of one direction's log-sum-exp."""
        return self.patch_rows * self.heads * 4

    @property
    def matrices(self) -> int:
        """Elements of the ten matrices."""
        return 2 * (2 * self.dim * self.d + 4 * self.d * self.d)

    @property
    def positions(self) -> int:
        """Positions of both windows."""
        return self.frames + self.patches

    @property
    def cast(self) -> bool:
        """Whether streams and parameters are rounded for products."""
        return self.stream_bytes == 4

    @property
    def again(self) -> bool:
        """Whether backward computes Q, K, V and h again."""
        return self.recompute != "nothing"


@dataclass(frozen=True)
class Choice:
    """What of the decomposition may be chosen."""

    rows: int = 64  # of a CTA of a row kernel
    cluster: int = 4
    inside: tuple[str, ...] = ()  # directions whose attention is a part of `exchange`
    staggered: bool = False  # 128 rows: persistent CTAs, whose second warpgroup runs some steps behind the first
    split_tail: bool = False  # rows that fill no whole round: their last product's columns over several CTAs
    queries: int = 64  # of a CTA of `attention`
    table_bytes: int = 4  # of an element of the position tables, which are accumulators' first values
    built: bool = False  # the launches of csrc/cuda in place of the design's
    parts: str = "shares"  # of `weight_gradient`: equal shares of all multiprocessors, or two "halves" of each tile

    def ctas(self, rows: int) -> int:
        """CTAs that take so many rows: whole clusters."""
        return self.whole_clusters(-(-rows // self.rows))

    def whole_clusters(self, ctas: int) -> int:
        """So many CTAs, and those that fill the last cluster."""
        return -(-ctas // self.cluster) * self.cluster


def useful(sizes: Sizes, phase: str) -> tuple[float, float]:
    """(bytes, FLOP) that no implementation of a phase can do without.

    Bytes: the streams, their gradients, the parameters, and what forward keeps for backward, each once. FLOP: products
    of the true sizes, nothing computed again.
    """
    d, patches = sizes.d, sizes.patch_rows
    kept = sizes.narrow + 2 * sizes.unit + 2 * sizes.scores
    if not sizes.again:
        kept += 6 * sizes.unit + sizes.narrow
    parameters = sizes.matrices * sizes.stream_bytes
    linear = 2.0 * sizes.all_rows * 2 * sizes.dim * d + 2.0 * 2 * patches * 4 * d * d
    product = 2.0 * patches * sizes.positions * d  # of attention, both directions
    if phase == "forward":
        return 2 * sizes.wide + parameters + kept, linear + 2 * product
    return 3 * sizes.wide + 2 * parameters + kept, 2 * linear + 5 * product
