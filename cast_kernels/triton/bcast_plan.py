"""Plans of B-CAST: sizes, buffers and launches of a forward. `bcast_backward_plan.py` goes on from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from cast_kernels.problem import PARAMETER_NAMES, WINDOWS, Parameters, Problem, Recompute
from cast_kernels.triton import casts, tiles
from cast_kernels.triton.bcast_exchange import Asking, exchange
from cast_kernels.triton.bcast_project import Projected, project
from cast_kernels.triton.common import architecture
from cast_kernels.triton.launch import LINE, Buffer, Plan, Planner, planned

STREAMS = ("spatial", "temporal")


class Kind(NamedTuple):
    """What a plan depends on besides the problem."""

    streams: torch.dtype  # of both, as kernels read them
    parameters: torch.dtype  # of all, as they come, and of their gradients
    outputs: tuple[torch.dtype, torch.dtype]  # as the streams came
    present: tuple[bool, ...]  # which of PARAMETER_NAMES kernels read
    scaled: tuple[bool, bool]  # whether the spatial, the temporal branch has drop-path factors
    eps: float
    recompute: str
    wanted: tuple[bool, ...] = ()  # backward: of the two inputs and PARAMETER_NAMES


class Tokens(NamedTuple):
    """One stream's tokens. The kernels take streams of equal frames and patches; plans do not count on it."""

    frames: int  # of a clip
    patches: int  # of a frame
    cls: int  # tokens of a frame before its patches

    @property
    def of_a_clip(self) -> int:
        return self.frames * (self.patches + self.cls)

    @property
    def patches_of_a_clip(self) -> int:
        return self.frames * self.patches


class Way(NamedTuple):
    """One direction's view of the problem."""

    name: str  # t2s or s2t
    asking: str  # the stream that asks and receives; only the spatial one has CLS
    answering: str
    window: str
    by: tuple[int, int]  # position in the window = frame * by[0] + patch * by[1]
    asking_length: int  # tokens of a window of the asking stream
    answering_length: int


def tokens(problem: Problem) -> dict[str, Tokens]:
    """Each stream's tokens. Sizes may be symbolic."""
    return {
        "spatial": Tokens(problem.frames, problem.patches, 1),
        "temporal": Tokens(problem.frames, problem.patches, 0),
    }


def ways(problem: Problem) -> dict[str, Way]:
    """The directions that the problem has. Sizes may be symbolic."""
    found, of = {}, tokens(problem)
    for name, asking, answering, window in (
        ("t2s", "spatial", "temporal", problem.t2s_window),
        ("s2t", "temporal", "spatial", problem.s2t_window),
    ):
        if window is not None:
            by = {"time": (1, 0), "space": (0, 1), "space-time": (of[asking].patches, 1)}[window]
            lengths = [WINDOWS[window](of[stream].frames, of[stream].patches) for stream in (asking, answering)]
            found[name] = Way(name, asking, answering, window, by, *lengths)
    return found


class Part(NamedTuple):
    """A part of what forward keeps: rows of one clip."""

    owner: str  # a stream, or a direction
    name: str
    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def words(self) -> int:
        """4-byte words of one clip, rounded up to a line."""
        return (self.rows * self.columns * self.dtype.itemsize + LINE - 1) // LINE * (LINE // 4)


def kept(problem: Problem, recompute: str) -> list[Part]:
    """What forward keeps, one behind the other. Sizes may be symbolic."""
    if recompute in ("", Recompute.ALL):
        return []
    of, d, compute = tokens(problem), problem.bottleneck_dim, problem.compute
    parts = [Part(stream, "z", of[stream].of_a_clip, d, compute) for stream in STREAMS]
    for name, way in ways(problem).items():
        asking, answering = of[way.asking].patches_of_a_clip, of[way.answering].patches_of_a_clip
        parts.append(Part(name, "o", asking, d, compute))
        parts.append(Part(name, "lse", asking, problem.num_heads, torch.float32))
        if recompute == Recompute.NOTHING:
            parts.append(Part(name, "q", asking, d, compute))
            parts.append(Part(name, "kv", answering, 2 * d, compute))
            parts.append(Part(name, "h", of[way.asking].of_a_clip, d, compute))
    return parts


@dataclass
class Attention:
    """What kernels leave for each other of one direction."""

    q: Buffer
    kv: Buffer
    o: Buffer
    lse: Buffer | None
    h: Buffer | None


class Draft:
    """A plan in the making: the problem's sizes, the tensors that kernels share, and a method for each launch."""

    problem: Problem
    kind: Kind
    planner: Planner
    tokens: dict[str, Tokens]
    ways: dict[str, Way]

    def __init__(self, problem: Problem, kind: Kind) -> None:
        self.problem, self.kind, self.planner = problem, kind, Planner()
        self.tokens, self.ways = tokens(problem), ways(problem)
        self.frames: int = problem.batch * problem.frames  # of all clips
        self.rows: dict[str, int] = {name: problem.batch * of.of_a_clip for name, of in self.tokens.items()}
        self.patch_rows: dict[str, int] = {
            name: problem.batch * of.patches_of_a_clip for name, of in self.tokens.items()
        }
        self.arch: str = architecture()
        self._rounded: dict[Buffer, Buffer] = {}
        given = self.planner.given
        self.x: dict[str, Buffer] = {name: given(self.rows[name], problem.dim, dtype=kind.streams) for name in STREAMS}
        self.shapes: dict[str, Sequence[int]] = _shapes(problem)
        flat: list[Any] = [
            given(*self.shapes[name], dtype=kind.parameters) if there else None
            for name, there in zip(PARAMETER_NAMES, kind.present, strict=True)
        ]
        self.weights: Any = Parameters.from_flat(flat)  # fmt: skip
        self.scale: dict[str, Buffer | None] = {
            name: given(problem.batch, dtype=torch.float32) if scaled else None
            for name, scaled in zip(STREAMS, kind.scaled, strict=True)
        }
        self.positions: bool = any(
            there for name, there in zip(PARAMETER_NAMES, kind.present, strict=True) if _is_table(name)
        )

    def tile(self, kernel: str) -> tiles.Tile:
        bits, rows = self.problem.compute.itemsize * 8, sum(self.rows.values())
        if kernel == "project" and self.kind.streams.itemsize * 8 > bits:
            kernel = "project_wide"
        return tiles.find(self.arch, kernel, bits, self.problem.bottleneck_dim, rows)

    def computed(self, operand: Buffer) -> Buffer:
        """The tensor as products read it: in the compute dtype, rounded by the plan's first launch if it is not."""
        if operand.dtype == self.problem.compute:
            return operand
        if operand not in self._rounded:
            self._rounded[operand] = self.planner.scratch(*operand.shape, dtype=self.problem.compute)
        return self._rounded[operand]

    def plan(self) -> Plan:
        """The plan of all launches."""
        casts.add(self.planner, self._rounded)
        words = sum(part.words for part in kept(self.problem, self.kind.recompute))
        return self.planner.plan((self.problem.batch, words))

    def share(self, backward: bool) -> None:
        """Make the tensors that launches share: those that are kept, and those that live as long as the call."""
        problem, d = self.problem, self.problem.bottleneck_dim
        parts = {
            (part.owner, part.name): self.planner.saved(problem.batch * part.rows, part.columns, dtype=part.dtype)
            for part in kept(problem, self.kind.recompute)
        }

        def made(owner: str, name: str, rows: int, columns: int, dtype: torch.dtype = problem.compute) -> Buffer:
            return parts.get((owner, name)) or self.planner.scratch(rows, columns, dtype=dtype)

        self.z: dict[str, Buffer] = {name: made(name, "z", self.rows[name], d) for name in STREAMS}
        self.attention: dict[str, Attention] = {}
        for name, way in self.ways.items():
            asking, answering = self.patch_rows[way.asking], self.patch_rows[way.answering]
            lse = parts.get((name, "lse"))
            if lse is None and backward:
                lse = self.planner.scratch(asking, problem.num_heads, dtype=torch.float32)
            self.attention[name] = Attention(
                made(name, "q", asking, d), made(name, "kv", answering, 2 * d), made(name, "o", asking, d), lse,
                parts.get((name, "h")),
            )  # fmt: skip
        self.cls: Buffer = self.planner.scratch(self.frames, d, dtype=torch.float32)

    def bottleneck(self) -> dict[str, int]:
        """The kernels' constants of the bottleneck's width."""
        chunk, chunks = tiles.chunking(self.problem.bottleneck_dim)
        return {"D": self.problem.bottleneck_dim, "CHUNK": chunk, "CHUNKS": chunks}

    def directions(self) -> dict[str, bool]:
        """The kernels' constants of which directions there are, and whether any has positions."""
        return {"T2S": "t2s" in self.ways, "S2T": "s2t" in self.ways, "POSITIONS": self.positions}

    def by(self) -> list[int]:
        """Position in the window = frame * by[0] + patch * by[1], t2s; then s2t."""
        return [step for name in ("t2s", "s2t") for step in (self.ways[name].by if name in self.ways else (0, 0))]

    def roles(self, stream: str) -> tuple[Way | None, Way | None]:
        """The direction in which the stream asks, and the one in which it answers."""
        asks = next((way for way in self.ways.values() if way.asking == stream), None)
        return asks, next((way for way in self.ways.values() if way.answering == stream), None)

    def directed(self, stream: str) -> tuple[Any, Any]:
        """Tensors of both roles. The kernel reads nothing that matters of an absent one: the other stands in."""
        asks, answers = (None if way is None else getattr(self.weights, way.name) for way in self.roles(stream))
        return asks or answers, answers or asks

    def project(self, from_z: bool = False) -> None:
        """Launch what fills z (unless `from_z`, which reads it), queries, keys and values, and CLS's n."""
        problem, tile = self.problem, self.tile("project")
        sides = []
        for stream in STREAMS:
            weights = getattr(self.weights, stream)
            (asks, answers), (q, kv), z = self.roles(stream), self.directed(stream), self.z[stream]
            sides.append(Projected(
                self.x[stream], z, self.attention[asks.name].q if asks else z,
                self.attention[answers.name].kv if answers else z,
                weights.down_weight if from_z else self.computed(weights.down_weight), weights.down_bias,
                weights.norm_weight, weights.norm_bias, q.q_pos, kv.kv_pos, self.computed(q.q_weight), q.q_bias,
                self.computed(kv.kv_weight), kv.kv_bias,
            ))  # fmt: skip
        if not self.positions:
            sides = [side._replace(q_pos=side.norm, kv_pos=side.norm) for side in sides]  # not read
        spatial_tiles, temporal_tiles = (triton.cdiv(self.rows[stream], tile.rows) for stream in STREAMS)
        self.planner.launch(
            project, (spatial_tiles + temporal_tiles,), *sides, self.cls, self.frames, problem.frames, problem.patches,
            spatial_tiles, self.kind.eps, *self.by(), DIM=problem.dim, **self.bottleneck(), **self.directions(),
            FROM_Z=from_z, BM=tile.rows, BK=tile.k, BN=tile.columns, STAGES=tile.stages,
            WIDEN_STAGES=tile.widen_stages, num_warps=tile.warps,
        )  # fmt: skip

    def exchange(self, outputs: dict[str, Buffer] | None) -> None:
        """Launch the attention and, with `outputs` by stream, what the asking streams become."""
        problem = self.problem
        longest = sorted(self.ways.values(), key=lambda way: -way.answering_length)
        sides = [self._asking(way, outputs) for way in longest]
        shapes = [self._shape(way, outputs is None) for way in longest]
        first, second, tile = shapes[0], shapes[-1], shapes[0].tile
        lengths = [way.answering_length for way in longest]
        kept = self.attention[longest[0].name]
        self.planner.launch(
            exchange, (sum(shape.programs for shape in shapes),), sides[0], sides[-1], self.cls,
            self.patch_rows[longest[0].asking], self.frames, problem.frames, problem.patches, lengths[0], lengths[-1],
            first.programs, problem.head_dim**-0.5,
            **{f"FIRST_{name}": value for name, value in first.constants.items()},
            **{f"SECOND_{name}": value for name, value in second.constants.items()}, BOTH=len(sides) == 2,
            DIM=problem.dim, **self.bottleneck(), HEADS=problem.num_heads, HEAD=problem.head_dim,
            ATTEND_ONLY=outputs is None, STORE_LSE=kept.lse is not None, STORE_H=kept.h is not None,
            BKEY=tile.keys, BK=tile.k, BN=tile.columns,
            STAGES=tile.stages, WIDEN_STAGES=tile.widen_stages, KEY_STAGES=tile.key_stages, num_warps=tile.warps,
        )  # fmt: skip

    def projections(self, way: Way, attend_only: bool = False) -> tuple[Buffer, Buffer, Buffer, Buffer]:
        """Weights and biases of the output and the up-projection, rounded unless nothing reads them."""
        weights, direction = getattr(self.weights, way.asking), getattr(self.weights, way.name)
        proj, up = direction.proj_weight, weights.up_weight
        if not attend_only:
            proj, up = self.computed(proj), self.computed(up)
        return proj, direction.proj_bias, up, weights.up_bias

    def _asking(self, way: Way, outputs: dict[str, Buffer] | None) -> Asking:
        x, mine = self.x[way.asking], self.attention[way.name]
        return Asking(
            x, x if outputs is None else outputs[way.asking], mine.q, mine.kv, mine.o, mine.lse or mine.o,
            mine.h or mine.o, self.scale[way.asking] or x, *self.projections(way, attend_only=outputs is None),
        )  # fmt: skip

    def _shape(self, way: Way, attend_only: bool) -> _Shape:
        tile = self.tile("exchange_short")
        short = tile.queries % way.answering_length == 0
        if not short:
            tile = self.tile("exchange")
        scale = "none" if self.scale[way.asking] is None else "token" if way.asking == "spatial" else "clip"
        constants: dict[str, Any] = {
            "CLS": self.tokens[way.asking].cls == 1, "BY_PATCH": way.window == "time", "ONE_BLOCK": short,
            "SCALE": scale, "BM": tile.rows, "BQ": tile.queries,
        }  # fmt: skip
        rows = (self.patch_rows if attend_only else self.rows)[way.asking]
        return _Shape(tile, triton.cdiv(rows, tile.rows), constants)


class _Shape(NamedTuple):
    """How one direction of `exchange` is cut."""

    tile: tiles.Tile
    programs: int
    constants: dict[str, Any]


@planned
def forward_plan(problem: Problem, kind: Kind) -> Plan:
    """The forward. Given: both streams, the parameters, the scales, then outputs of the streams that receive."""
    draft = Draft(problem, kind)
    outputs = {
        name: draft.planner.given(draft.rows[name], problem.dim, dtype=dtype)
        for name, dtype in zip(STREAMS, kind.outputs, strict=True)
        if draft.roles(name)[0]
    }
    draft.share(backward=False)
    draft.project()
    draft.exchange(outputs)
    return draft.plan()


def _is_table(name: str) -> bool:
    return name.endswith("_pos")


def _shapes(problem: Problem) -> dict[str, Sequence[int]]:
    """The shape of each of PARAMETER_NAMES."""
    dim, d, of = problem.dim, problem.bottleneck_dim, ways(problem)
    vectors = {"up_bias": dim, "kv_bias": 2 * d}
    matrices = {"down_weight": (d, dim), "up_weight": (dim, d), "kv_weight": (2 * d, d)}
    matrices |= dict.fromkeys(("q_weight", "proj_weight"), (d, d))
    shapes: dict[str, Sequence[int]] = {}
    for full in PARAMETER_NAMES:
        owner, name = full.split("_", 1)
        if name in matrices:
            shapes[full] = matrices[name]
        elif _is_table(full):
            way = of.get(owner)
            shapes[full] = () if way is None else (way.asking_length if name == "q_pos" else way.answering_length, d)
        else:
            shapes[full] = (vectors.get(name, d),)
    return shapes
