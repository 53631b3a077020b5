"""Plans of B-CAST's backward: only the launches that lead to a wanted gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from cast_kernels.problem import PARAMETER_NAMES, Direction, Problem, Recompute, Stream
from cast_kernels.triton import position_gradient, sums, weight_gradient
from cast_kernels.triton.bcast_attention_backward import attention_backward
from cast_kernels.triton.bcast_exchange_backward import Received, exchange_backward
from cast_kernels.triton.bcast_plan import STREAMS, Draft, Kind, Way
from cast_kernels.triton.bcast_project_backward import Projected, project_backward
from cast_kernels.triton.launch import Buffer, Plan, planned

#: Parameters behind each other's gradients: those that `exchange_backward` reaches, and what attention has besides.
_BEHIND_EXCHANGE = ("up_weight", "up_bias", "proj_weight", "proj_bias")
_BEHIND_ATTENTION = ("q_bias", "kv_bias", "q_pos", "kv_pos")


class BackwardPlan(NamedTuple):
    """A backward's launches, and what their caller must make.

    Given: both streams, the parameters, the scales, the outputs' gradients of streams that receive; then the gradients
    that kernels write.
    """

    plan: Plan
    written: list[int]  # numbers of the tensors whose gradients kernels write, the two streams first; others are zero


@planned
def backward_plan(problem: Problem, kind: Kind) -> BackwardPlan:
    """The backward of what `kind` says is wanted."""
    draft = _Backward(problem, kind)
    if kind.recompute != Recompute.NOTHING:
        draft.project(from_z=kind.recompute == Recompute.CHEAP)
    if kind.recompute == Recompute.ALL:
        draft.exchange(None)
    draft.back()
    return BackwardPlan(draft.plan(), _written(problem, kind))


def _written(problem: Problem, kind: Kind) -> list[int]:
    """All that are wanted but up-projections that nothing passed through."""
    receives = {"spatial": problem.t2s_window, "temporal": problem.s2t_window}
    unused = [f"{stream}_{name}" for stream in STREAMS if not receives[stream] for name in ("up_weight", "up_bias")]
    names = (*STREAMS, *PARAMETER_NAMES)
    return [i for i, want in enumerate(kind.wanted) if want and names[i] not in unused]


class _Backward(Draft):
    """A backward's plan in the making."""

    def __init__(self, problem: Problem, kind: Kind) -> None:
        super().__init__(problem, kind)
        given = self.planner.given
        self.grad_out = {
            way.asking: given(self.rows[way.asking], problem.dim, dtype=kind.streams) for way in self.ways.values()
        }
        names = (*STREAMS, *PARAMETER_NAMES)
        made: list[Buffer | None] = [None] * len(names)
        for i in _written(problem, kind):
            if i < len(STREAMS):
                made[i] = given(self.rows[names[i]], problem.dim, dtype=kind.streams)
            else:
                made[i] = given(*self.shapes[names[i]], dtype=kind.parameters)
        self.grad_x = dict(zip(STREAMS, made, strict=False))
        flat = made[len(STREAMS) :]
        self.wants = {name for name, grad in zip(PARAMETER_NAMES, flat, strict=True) if grad is not None}
        n, m = len(Stream._fields), len(Direction._fields)
        self.grads: dict[str, Any] = {
            "spatial": Stream(*flat[:n]), "temporal": Stream(*flat[n : 2 * n]),  # type: ignore[arg-type]
            "t2s": Direction(*flat[2 * n : 2 * n + m]), "s2t": Direction(*flat[2 * n + m :]),  # type: ignore[arg-type]
        }  # fmt: skip
        self.share(backward=True)
        self.reductions: list[sums.Reduction] = []
        self.layers: list[weight_gradient.Layer] = []
        self.tables: list[position_gradient.Table] = []

    def back(self) -> None:
        """All launches after those that compute again."""
        behind = {name for name in self.wants if name.split("_", 1)[1] in _BEHIND_EXCHANGE}
        beside = {name for name in self.wants if name.split("_", 1)[1] in _BEHIND_ATTENTION}
        want_x = any(grad is not None for grad in self.grad_x.values())
        projects = want_x or bool(self.wants - behind - beside)
        self._exchange_backward(parameters=bool(behind))
        self.dq: dict[str, Buffer] = {}
        self.dkv: dict[str, Buffer] = {}
        for way in self.ways.values():
            if projects or any(name.startswith(way.name) for name in beside):
                self._attention_backward(way)
        if projects:
            self._project_backward(want_x, parameters=bool(self.wants - behind - beside))
        if self.tables:
            position_gradient.add(self.planner, self.tables, self.problem.frames, self.problem.patches)
        if self.reductions:
            sums.add(self.planner, self.reductions)
        if self.layers:
            weight_gradient.add(self.planner, self.layers, self.tile("weight_gradient"))

    def _scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Buffer:
        return self.planner.scratch(*shape, dtype=dtype or self.problem.compute)

    def _layer(self, left: Buffer, right: Buffer, weight: Buffer | None) -> None:
        if weight is not None:
            self.layers.append(weight_gradient.Layer(self.computed(left), self.computed(right), weight))

    def _reduce(self, partial: Buffer, *vectors: tuple[Buffer | None, int]) -> None:
        """Plan the sums of `partial`'s columns if any of the vectors, each beside its length, is wanted."""
        if any(vector is not None for vector, _ in vectors):
            outputs = [v or self._scratch(length, dtype=self.kind.parameters) for v, length in vectors]
            self.reductions.append(sums.Reduction(partial, outputs))

    def _exchange_backward(self, parameters: bool) -> None:
        """dO for the attention, and both projections' gradients."""
        problem, d, dim = self.problem, self.problem.bottleneck_dim, self.problem.dim
        tile = self.tile("exchange_backward")
        sides: dict[str, Received] = {}
        tiles_of = dict.fromkeys(STREAMS, 0)
        self.do: dict[str, Buffer] = {}
        self.dh: dict[str, Buffer] = {}
        for way in self.ways.values():
            stream, rows, mine = way.asking, self.rows[way.asking], self.attention[way.name]
            tiles_of[stream] = triton.cdiv(rows, tile.rows)
            proj, proj_bias, up, _ = self.projections(way)
            grads, own = self.grads[stream], self.grads[way.name]
            self.do[way.name], self.dh[stream] = self._scratch(self.patch_rows[stream], d), self._scratch(rows, d)
            g = self._scratch(*((rows, d) if parameters else (1,)))
            partial = self._scratch(tiles_of[stream] if parameters else 1, dim + d, dtype=torch.float32)
            # Rounded once, as the product for up_weight reads it too: float32 rows leave no room for three stages.
            grad_y = self.computed(self.grad_out[stream])
            sides[stream] = Received(
                grad_y, mine.h or self._scratch(rows, d), mine.o,
                self.scale[stream] or self.x[stream], g, self.dh[stream], self.do[way.name], partial,
                proj, proj_bias, up,
            )  # fmt: skip
            self._reduce(partial, (grads.up_bias, dim), (own.proj_bias, d))
            self._layer(self.grad_out[stream], g, grads.up_weight)
            patches = self.dh[stream]._replace(shape=(self.patch_rows[stream], d))  # without CLS, which lies behind
            self._layer(patches, mine.o, own.proj_weight)
        some = next(iter(sides.values()))
        self.planner.launch(
            exchange_backward, (sum(tiles_of.values()),), sides.get("spatial", some), sides.get("temporal", some),
            self.cls, self.frames, problem.frames, problem.patches, tiles_of["spatial"],
            SPATIAL_SCALED=self.scale["spatial"] is not None, TEMPORAL_SCALED=self.scale["temporal"] is not None,
            RECOMPUTE_H=self.kind.recompute != Recompute.NOTHING, PARAMETERS=parameters, DIM=dim, **self.bottleneck(),
            BM=tile.rows, BK=tile.k, BN=tile.columns, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip

    def _attention_backward(self, way: Way) -> None:
        """dQ and dKV, the gradients of their biases, and what positions are summed from."""
        problem, d, mine = self.problem, self.problem.bottleneck_dim, self.attention[way.name]
        own = self.grads[way.name]
        tile = self.tile("attention_backward_short")
        length, rows = way.answering_length, self.patch_rows[way.asking]
        short = length <= tile.queries
        if not short:
            tile = self.tile("attention_backward_wide" if problem.head_dim > 32 else "attention_backward")
        held = tile.queries // length * length if short else tile.queries
        clip_tiles = triton.cdiv(self.tokens[way.asking].patches_of_a_clip, held)
        programs = problem.batch * clip_tiles
        biases = own.q_bias is not None or own.kv_bias is not None
        partial = self._scratch(programs if biases else 1, 3 * d, dtype=torch.float32)
        dq = self.dq[way.name] = self._scratch(rows, d)
        dkv = self.dkv[way.name] = self._scratch(self.patch_rows[way.answering], 2 * d)
        self.planner.launch(
            attention_backward, (programs if short else 2 * programs, problem.num_heads),
            mine.q, mine.kv, mine.o, mine.lse, self.do[way.name], dq, dkv, partial, clip_tiles, problem.frames,
            problem.patches, length, programs, problem.head_dim**-0.5, BY_PATCH=way.window == "time", ONE_BLOCK=short,
            BIASES=biases, D=d, HEADS=problem.num_heads, HEAD=problem.head_dim, BM=tile.queries, BLOCK=tile.keys,
            STAGES=tile.key_stages, num_warps=tile.warps,
        )  # fmt: skip
        self._reduce(partial, (own.q_bias, d), (own.kv_bias, 2 * d))
        weights = getattr(self.weights, way.name)
        for table, gradient, weight in (
            (own.q_pos, dq, weights.q_weight), (own.kv_pos, dkv, weights.kv_weight)
        ):  # fmt: skip
            if table is not None:
                self.tables.append(position_gradient.Table(gradient, self.computed(weight), table, way.by))

    def _project_backward(self, want_x: bool, parameters: bool) -> None:
        """dX, and the gradients of norms, down-projections, and of the weights of queries, keys and values."""
        problem, d = self.problem, self.problem.bottleneck_dim
        tile = self.tile("project_backward")
        programs = {stream: triton.cdiv(self.rows[stream], tile.rows) for stream in STREAMS}
        sides = []
        for stream in STREAMS:
            weights, own = getattr(self.weights, stream), self.grads[stream]
            (asks, answers), (q, kv) = self.roles(stream), self.directed(stream)
            dz = self._scratch(self.rows[stream], d)
            partial = self._scratch(programs[stream] if parameters else 1, 3 * d, dtype=torch.float32)
            rows = self.patch_rows[stream] if parameters else 1
            q_input, kv_input = (self._scratch(rows, d) if way else dz for way in (asks, answers))
            grad_x = self.grad_x[stream] or (
                self._scratch(*self.x[stream].shape, dtype=self.kind.streams) if want_x else dz
            )
            sides.append(Projected(
                self.z[stream], self.dq[asks.name] if asks else dz, self.dkv[answers.name] if answers else dz, dz,
                q_input, kv_input, partial, grad_x, self.grad_out[stream] if asks else self.x[stream],
                self.computed(weights.down_weight) if want_x else weights.down_weight,
                weights.norm_weight, weights.norm_bias, q.q_pos, kv.kv_pos,
                self.computed(q.q_weight), self.computed(kv.kv_weight),
            ))  # fmt: skip
            if asks:
                self._layer(self.dq[asks.name], q_input, self.grads[asks.name].q_weight)
            if answers:
                self._layer(self.dkv[answers.name], kv_input, self.grads[answers.name].kv_weight)
            self._layer(dz, self.x[stream], own.down_weight)
            self._reduce(partial, (own.norm_weight, d), (own.norm_bias, d), (own.down_bias, d))
        if not self.positions:
            sides = [side._replace(q_pos=side.norm, kv_pos=side.norm) for side in sides]  # not read
        dh = self.dh.get("spatial", sides[0].dz)
        self.planner.launch(
            project_backward, (sum(programs.values()),), *sides, dh, self.frames, problem.frames, problem.patches,
            programs["spatial"], self.kind.eps, *self.by(), DIM=problem.dim, **self.bottleneck(), **self.directions(),
            WANT_X=want_x, PARAMETERS=parameters, BM=tile.rows, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
