"""One call of B-CAST: its tensors as the kernels want them, and one method a launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from cast_kernels.problem import PARAMETER_NAMES, WINDOWS, Direction, Parameters, Problem, Stream
from cast_kernels.triton import position_gradient, sums, tiles, weight_gradient
from cast_kernels.triton.bcast_attention_backward import attention_backward
from cast_kernels.triton.bcast_exchange import exchange
from cast_kernels.triton.bcast_exchange_backward import exchange_backward
from cast_kernels.triton.bcast_project import project
from cast_kernels.triton.bcast_project_backward import project_backward
from cast_kernels.triton.common import architecture

STREAMS = ("spatial", "temporal")
#: A tensor, or one that may be absent.
AnyTensor = TypeVar("AnyTensor", Tensor, Tensor | None)


class Way(NamedTuple):
    """One direction's view of the problem."""

    name: str  # t2s or s2t
    asking: str  # the stream that asks and receives; only the spatial one has CLS
    answering: str
    direction: Direction  # matrices in the compute dtype
    window: str
    by: tuple[int, int]  # position in the window = frame * by[0] + patch * by[1]
    length: int  # tokens of a window


class Side(NamedTuple):
    """One direction's share of `exchange`."""

    operands: list[Tensor | None]
    constants: dict[str, int | bool | str]
    tile: tiles.Tile
    rows: int
    stores_lse: bool
    stores_h: bool


class Call:
    """Sizes, operands and launches of one forward or backward.

    `parts`, which the methods share, maps names to flat buffers: those kept for backward, and those that a launch
    leaves for the next.
    """

    def __init__(
        self, problem: Problem, spatial: Tensor, temporal: Tensor, parameters: Parameters,
        spatial_scale: Tensor | None, temporal_scale: Tensor | None, eps: float,
    ) -> None:  # fmt: skip
        self.problem, self.eps = problem, eps
        # One kernel serves both streams, so what autocast lets differ is widened to one dtype: exact, and rare.
        self.x = dict(zip(STREAMS, _alike([spatial, temporal]), strict=True))
        self.scale = {"spatial": spatial_scale, "temporal": temporal_scale}
        self.scale = {name: None if s is None else s.float().contiguous() for name, s in self.scale.items()}
        self.original = Parameters.from_flat(_alike(parameters.flat()))
        self.weights = _computed(self.original, problem.compute)
        self.ways = _ways(problem, self.weights)
        self.positions = any(table is not None for way in self.ways.values() for table in way.direction[:2])
        if self.positions:
            self.ways = {name: _with_tables(way) for name, way in self.ways.items()}
        self.frames = problem.batch * problem.frames  # of all clips
        self.patch_rows = self.frames * problem.patches
        self.rows = {"spatial": self.frames * (problem.patches + 1), "temporal": self.patch_rows}
        self.arch = architecture()

    def _tile(self, kernel: str) -> tiles.Tile:
        bits, rows = self.problem.compute.itemsize * 8, sum(self.rows.values())
        return tiles.find(self.arch, kernel, bits, self.problem.bottleneck_dim, rows)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x["spatial"].new_empty(shape, dtype=dtype or self.problem.compute)

    def _part(self, parts: dict[str, Tensor], name: str, elements: int, dtype: torch.dtype | None = None) -> Tensor:
        """The part, made if it is not there."""
        if name not in parts:
            parts[name] = self._empty(elements, dtype=dtype)
        return parts[name]

    def _bottleneck(self) -> dict[str, int]:
        chunk, chunks = tiles.chunking(self.problem.bottleneck_dim)
        return {"D": self.problem.bottleneck_dim, "CHUNK": chunk, "CHUNKS": chunks}

    def _directions(self) -> dict[str, int | bool]:
        return {"T2S": "t2s" in self.ways, "S2T": "s2t" in self.ways, "POSITIONS": self.positions}

    def _by(self) -> list[int]:
        return [step for name in ("t2s", "s2t") for step in (self.ways[name].by if name in self.ways else (0, 0))]

    def _roles(self, stream: str) -> tuple[Way | None, Way | None]:
        """The direction in which the stream asks, and the one in which it answers."""
        asks = next((way for way in self.ways.values() if way.asking == stream), None)
        return asks, next((way for way in self.ways.values() if way.answering == stream), None)

    def _directed(self, stream: str) -> tuple[Direction, Direction]:
        """Tensors of both roles. The kernel reads nothing that matters of an absent one: the other stands in."""
        asks, answers = self._roles(stream)
        first = asks or answers
        assert first is not None
        return (asks or first).direction, (answers or first).direction

    # ---- forward ----------------------------------------------------------------------------------------------------

    def project(self, parts: dict[str, Tensor], from_z: bool = False) -> None:
        """Fill z (unless `from_z`, which reads it), queries, keys and values, and CLS's n."""
        problem, d = self.problem, self.problem.bottleneck_dim
        tile = self._tile("project")
        operands: list[Tensor | None] = []
        for stream in STREAMS:
            weights: Stream = getattr(self.weights, stream)
            q, kv = self._directed(stream)
            asks, answers = self._roles(stream)
            z = self._part(parts, f"{stream}_z", self.rows[stream] * d)
            q_out = self._part(parts, f"{asks.name}_q", self.patch_rows * d) if asks else z
            kv_out = self._part(parts, f"{answers.name}_kv", self.patch_rows * 2 * d) if answers else z
            operands += [self.x[stream], z, q_out, kv_out, *weights[:4], q.q_pos, kv.kv_pos]
            operands += [q.q_weight, q.q_bias, kv.kv_weight, kv.kv_bias]
        cls = self._part(parts, "cls", self.frames * d, torch.float32)
        spatial_tiles, temporal_tiles = (triton.cdiv(self.rows[stream], tile.rows) for stream in STREAMS)
        project[(spatial_tiles + temporal_tiles,)](
            *operands, cls, self.frames, problem.frames, problem.patches, spatial_tiles, self.eps, *self._by(),
            DIM=problem.dim, **self._bottleneck(), **self._directions(), FROM_Z=from_z,
            BM=tile.rows, BK=tile.k, BN=tile.columns, STAGES=tile.stages, WIDEN_STAGES=tile.widen_stages,
            num_warps=tile.warps,
        )  # fmt: skip

    def exchange(self, parts: dict[str, Tensor], outputs: dict[str, Tensor] | None) -> None:
        """Attend and, with `outputs` by stream, go on to what the asking streams become.

        lse and h are stored if they are parts; without `outputs` lse always is, for backward is what asks.
        """
        problem = self.problem
        ways = sorted(self.ways.values(), key=lambda way: -way.length)
        sides = [self._side(way, parts, outputs) for way in ways]
        first, second = sides[0], sides[-1]
        tile = first.tile
        programs = [triton.cdiv(side.rows, side.tile.rows) for side in sides]
        exchange[(sum(programs),)](
            *first.operands, *second.operands, parts["cls"], self.patch_rows, self.frames, problem.frames,
            problem.patches, ways[0].length, ways[-1].length, programs[0], problem.head_dim**-0.5,
            **{f"FIRST_{name}": value for name, value in first.constants.items()},
            **{f"SECOND_{name}": value for name, value in second.constants.items()}, BOTH=len(sides) == 2,
            DIM=problem.dim, **self._bottleneck(), HEADS=problem.num_heads, HEAD=problem.head_dim,
            ATTEND_ONLY=outputs is None, STORE_LSE=first.stores_lse, STORE_H=first.stores_h,
            BKEY=tile.keys, BK=tile.k, BN=tile.columns,
            STAGES=tile.stages, WIDEN_STAGES=tile.widen_stages, KEY_STAGES=tile.key_stages, num_warps=tile.warps,
        )  # fmt: skip

    def _side(self, way: Way, parts: dict[str, Tensor], outputs: dict[str, Tensor] | None) -> Side:
        problem, d = self.problem, self.problem.bottleneck_dim
        tile = self._tile("exchange_short")
        short = tile.queries % way.length == 0
        if not short:
            tile = self._tile("exchange")
        weights: Stream = getattr(self.weights, way.asking)
        x = self.x[way.asking]
        o = self._part(parts, f"{way.name}_o", self.patch_rows * d)
        lse, h = parts.get(f"{way.name}_lse"), parts.get(f"{way.name}_h")
        if outputs is None:
            lse = self._part(parts, f"{way.name}_lse", self.patch_rows * problem.num_heads, torch.float32)
        scale, per = self._scale(way.asking)
        operands: list[Tensor | None] = [
            x, x if outputs is None else outputs[way.asking], parts[f"{way.name}_q"], parts[f"{way.name}_kv"], o,
            o if lse is None else lse, o if h is None else h, scale,
            way.direction.proj_weight, way.direction.proj_bias, weights.up_weight, weights.up_bias,
        ]  # fmt: skip
        constants: dict[str, int | bool | str] = {
            "CLS": way.asking == "spatial", "BY_PATCH": way.window == "time", "ONE_BLOCK": short, "SCALE": per,
            "BM": tile.rows, "BQ": tile.queries,
        }  # fmt: skip
        rows = self.patch_rows if outputs is None else self.rows[way.asking]
        return Side(operands, constants, tile, rows, lse is not None, h is not None)

    def _scale(self, stream: str) -> tuple[Tensor, str]:
        """Drop-path factors, and whether there is one a token, one a clip, or none."""
        scale = self.scale[stream]
        if scale is None:
            return self.x[stream], "none"
        return scale, "token" if stream == "spatial" else "clip"

    # ---- backward ---------------------------------------------------------------------------------------------------

    def gradients(
        self, parts: dict[str, Tensor], grad_out: dict[str, Tensor], wanted: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """All gradients in the op's order: two inputs, then the parameters; None for a tensor that is absent."""
        primals = [self.x["spatial"], self.x["temporal"], *self.original.flat()]
        grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in primals]
        by_name = Parameters.from_flat(grads[2:])
        layers: list[weight_gradient.Layer] = []
        self.reductions: list[sums.Reduction] = []
        grad_out = {name: grad_out[name].to(self.x[name].dtype).contiguous() for name in STREAMS}
        layers += self._exchange_backward(parts, grad_out, by_name)
        for way in self.ways.values():
            self._attention_backward(way, parts, getattr(by_name, way.name))
        layers += self._project_backward(parts, grad_out, grads[:2], by_name, any(wanted[:2]))
        if self.positions:
            self._position_gradients(parts, by_name)
        sums.reduce(self.reductions)
        asked_for = {id(grad) for grad, want in zip(grads[2:], wanted[2:], strict=True) if want}
        layers = [layer for layer in layers if id(layer.weight) in asked_for]
        if layers:
            weight_gradient.launch(layers, self._tile("weight_gradient"))
        for stream, receives in (("spatial", "t2s"), ("temporal", "s2t")):
            unused = getattr(by_name, stream)[4:] if receives not in self.ways else ()
            for grad in unused:  # an up-projection that nothing passed through
                if grad is not None:
                    grad.zero_()
        return grads

    def _exchange_backward(
        self, parts: dict[str, Tensor], grad_out: dict[str, Tensor], grads: Parameters
    ) -> list[weight_gradient.Layer]:
        """dO for the attention; returns the up- and the output projections' weight gradients as layers to do."""
        problem, d, dim = self.problem, self.problem.bottleneck_dim, self.problem.dim
        tile = self._tile("exchange_backward")
        recompute = not any(f"{name}_h" in parts for name in self.ways)
        layers, operands, tiles_of = [], {}, dict.fromkeys(STREAMS, 0)
        for way in self.ways.values():
            stream, rows = way.asking, self.rows[way.asking]
            tiles_of[stream] = triton.cdiv(rows, tile.rows)
            weights, own = getattr(self.weights, stream), getattr(grads, way.name)
            g, dh = self._empty(rows, d), self._empty(rows, d)
            do = self._part(parts, f"{way.name}_do", self.patch_rows * d)
            o, h = parts[f"{way.name}_o"].view(self.patch_rows, d), parts.get(f"{way.name}_h")
            partial = self._empty(tiles_of[stream], dim + d, dtype=torch.float32)
            operands[stream] = [grad_out[stream], self._empty(rows, d) if h is None else h, o, self._scale(stream)[0]]
            operands[stream] += [g, dh, do, partial, way.direction.proj_weight, way.direction.proj_bias]
            operands[stream].append(weights.up_weight)
            parts[f"{stream}_dh"] = dh
            self.reductions.append(sums.Reduction(partial, [getattr(grads, stream).up_bias, own.proj_bias]))
            left = grad_out[stream].view(rows, dim).to(problem.compute)
            layers.append(weight_gradient.Layer(left, g, getattr(grads, stream).up_weight))
            layers.append(weight_gradient.Layer(dh[: self.patch_rows], o, own.proj_weight))
        some = next(iter(operands.values()))
        exchange_backward[(sum(tiles_of.values()),)](
            *operands.get("spatial", some), *operands.get("temporal", some), parts.get("cls", some[-4]),
            self.frames, problem.frames, problem.patches, tiles_of["spatial"],
            SPATIAL_SCALED=self.scale["spatial"] is not None, TEMPORAL_SCALED=self.scale["temporal"] is not None,
            RECOMPUTE_H=recompute, DIM=dim, **self._bottleneck(),
            BM=tile.rows, BK=tile.k, BN=tile.columns, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        return layers

    def _attention_backward(self, way: Way, parts: dict[str, Tensor], grads: Direction) -> None:
        """dQ and dKV as parts, and the gradients of their biases."""
        problem, d = self.problem, self.problem.bottleneck_dim
        tile = self._tile("attention_backward_short")
        short = way.length <= tile.queries
        if not short:
            tile = self._tile("attention_backward_wide" if problem.head_dim > 32 else "attention_backward")
        held = tile.queries // way.length * way.length if short else tile.queries
        programs = triton.cdiv(self.patch_rows, held)
        partial = self._empty(programs, 3 * d, dtype=torch.float32)
        dq = self._part(parts, f"{way.name}_dq", self.patch_rows * d)
        dkv = self._part(parts, f"{way.name}_dkv", self.patch_rows * 2 * d)
        attention_backward[(programs if short else 2 * programs, problem.num_heads)](
            parts[f"{way.name}_q"], parts[f"{way.name}_kv"], parts[f"{way.name}_o"], parts[f"{way.name}_lse"],
            parts[f"{way.name}_do"], dq, dkv, partial, self.patch_rows, problem.frames, problem.patches, way.length,
            programs, problem.head_dim**-0.5, BY_PATCH=way.window == "time", ONE_BLOCK=short,
            D=d, HEADS=problem.num_heads, HEAD=problem.head_dim, BM=tile.queries, BLOCK=tile.keys,
            STAGES=tile.key_stages, num_warps=tile.warps,
        )  # fmt: skip
        self.reductions.append(sums.Reduction(partial, [grads.q_bias, grads.kv_bias]))

    def _project_backward(
        self, parts: dict[str, Tensor], grad_out: dict[str, Tensor], grad_x: list[Tensor | None], grads: Parameters,
        want_x: bool,
    ) -> list[weight_gradient.Layer]:  # fmt: skip
        """dX, and the gradients of norms and down-projections' biases; returns the remaining weights as layers."""
        problem, d = self.problem, self.problem.bottleneck_dim
        tile = self._tile("project_backward")
        programs = {stream: triton.cdiv(self.rows[stream], tile.rows) for stream in STREAMS}
        operands: list[Tensor | None] = []
        layers, partials = [], {}
        for stream, grad in zip(STREAMS, grad_x, strict=True):
            weights: Stream = getattr(self.weights, stream)
            own: Stream = getattr(grads, stream)
            q, kv = self._directed(stream)
            asks, answers = self._roles(stream)
            dz = self._empty(self.rows[stream], d)
            partials[stream] = self._empty(programs[stream], 3 * d, dtype=torch.float32)
            buffers: dict[str, Tensor] = {}
            for role, way, width in (("q", asks, d), ("kv", answers, 2 * d)):
                buffers[f"{role}_input"] = self._empty(self.patch_rows, d) if way else dz
                buffers[f"d{role}"] = parts[f"{way.name}_d{role}"].view(self.patch_rows, width) if way else dz
                if way is not None:
                    weight = getattr(getattr(grads, way.name), f"{role}_weight")
                    layers.append(weight_gradient.Layer(buffers[f"d{role}"], buffers[f"{role}_input"], weight))
            x = self.x[stream].view(-1, problem.dim).to(problem.compute)
            layers.append(weight_gradient.Layer(dz, x, own.down_weight))
            out = grad_out[stream] if asks else self.x[stream]
            operands += [parts[f"{stream}_z"], buffers["dq"], buffers["dkv"], dz, buffers["q_input"]]
            operands += [buffers["kv_input"], partials[stream], grad, out]
            operands += [*weights[:1], *weights[2:4], q.q_pos, kv.kv_pos, q.q_weight, kv.kv_weight]
        dh = parts.get("spatial_dh", operands[0])
        project_backward[(sum(programs.values()),)](
            *operands, dh, self.frames, problem.frames, problem.patches, programs["spatial"], self.eps,
            *self._by(), DIM=problem.dim, **self._bottleneck(), **self._directions(), WANT_X=want_x,
            BM=tile.rows, BK=tile.k, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        for stream in STREAMS:
            own = getattr(grads, stream)
            vectors = [own.norm_weight, own.norm_bias, own.down_bias]
            self.reductions.append(sums.Reduction(partials[stream], vectors))
        return layers

    def _position_gradients(self, parts: dict[str, Tensor], grads: Parameters) -> None:
        tables = []
        for way in self.ways.values():
            own: Direction = getattr(grads, way.name)
            for role, table, width in (("q", own.q_pos, 1), ("kv", own.kv_pos, 2)):
                if table is None:  # zeros stood in for it
                    continue
                gradient = parts[f"{way.name}_d{role}"].view(self.patch_rows, width * self.problem.bottleneck_dim)
                weight = way.direction.q_weight if role == "q" else way.direction.kv_weight
                tables.append(position_gradient.Table(gradient, weight, table, way.by))
        position_gradient.launch(tables, self.problem.frames, self.problem.patches)


def _ways(problem: Problem, parameters: Parameters) -> dict[str, Way]:
    by = {"time": (1, 0), "space": (0, 1), "space-time": (problem.patches, 1)}
    ways = {}
    for name, asking, answering in (("t2s", *STREAMS), ("s2t", *reversed(STREAMS))):
        direction: Direction | None = getattr(parameters, name)
        window: str | None = getattr(problem, f"{name}_window")
        if direction is not None and window is not None:
            length = WINDOWS[window](problem.frames, problem.patches)
            ways[name] = Way(name, asking, answering, direction, window, by[window], length)
    return ways


def _with_tables(way: Way) -> Way:
    """The direction with zeros for a table that is missing beside others: kernels add all of them or none."""
    q_pos, kv_pos = (
        way.direction.q_bias.new_zeros(way.length, way.direction.q_bias.numel()) if table is None else table
        for table in way.direction[:2]
    )
    return way._replace(direction=way.direction._replace(q_pos=q_pos, kv_pos=kv_pos))


def _alike(tensors: Sequence[AnyTensor]) -> list[AnyTensor]:
    """The tensors contiguous and in one dtype that holds each one's values; mostly they are."""
    dtype = reduce(torch.promote_types, {x.dtype for x in tensors if x is not None})
    return [x if x is None or (x.dtype == dtype and x.is_contiguous()) else x.to(dtype).contiguous() for x in tensors]


def _computed(parameters: Parameters, compute: torch.dtype) -> Parameters:
    """The parameters; matrices that products read in the compute dtype, rounded in one launch."""
    flat = parameters.flat()
    matrices = {
        i: p
        for i, (name, p) in enumerate(zip(PARAMETER_NAMES, flat, strict=True))
        if p is not None and p.ndim == 2 and p.dtype != compute and not name.endswith("_pos")  # added in fp32
    }
    if matrices:
        rounded = [torch.empty_like(p, dtype=compute) for p in matrices.values()]
        torch._foreach_copy_(rounded, list(matrices.values()))
        for i, matrix in zip(matrices, rounded, strict=True):
            flat[i] = matrix
    return Parameters.from_flat(flat)
