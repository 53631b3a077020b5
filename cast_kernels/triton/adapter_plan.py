"""Plans of the adapter: its forward's launch; its backward's, with the sums over rows that weights and biases take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cast_kernels.triton import casts, sums, tiles, weight_gradient
from cast_kernels.triton.adapter_backward import adapter_backward
from cast_kernels.triton.adapter_forward import adapter_forward
from cast_kernels.triton.common import architecture
from cast_kernels.triton.launch import Buffer, Plan, Planner, planned


class Sizes(NamedTuple):
    """What both plans depend on."""

    rows: int
    dim: int
    width: int
    compute: torch.dtype  # of the products
    parameters: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]
    scaled: bool  # whether there are factors of rows
    scale: float


class Forward(NamedTuple):
    """What a forward's plan depends on besides."""

    x: torch.dtype
    residual: torch.dtype  # and of y
    other: torch.dtype | None  # None: it is not there, as below
    keep_h: bool


class Backward(NamedTuple):
    """What a backward's plan depends on besides."""

    grad_y: torch.dtype
    x: torch.dtype
    kept_h: bool
    addend: torch.dtype | None
    grad_x: torch.dtype | None
    gradients: torch.dtype  # of the parameters
    wanted: tuple[bool, ...]  # of the four parameters


def _constants(kernel: str, sizes: Sizes) -> dict[str, Any]:
    tile = tiles.find(architecture(), kernel, sizes.compute.itemsize * 8, sizes.width)
    chunk, chunks = tiles.chunking(sizes.width)
    return {
        "DIM": sizes.dim, "D": sizes.width, "BM": tile.rows, "BK": tile.k, "BN": tile.columns, "CHUNK": chunk,
        "CHUNKS": chunks, "STAGES": tile.stages, "WIDEN_STAGES": tile.widen_stages, "num_warps": tile.warps,
    }  # fmt: skip


def _parameters(planner: Planner, sizes: Sizes, count: int) -> tuple[list[Buffer], dict[Buffer, Buffer]]:
    """The first parameters, which are given, as the kernels read them; and what must be rounded before, to what."""
    shapes, rounded = ((sizes.width, sizes.dim), (sizes.width,), (sizes.dim, sizes.width), (sizes.dim,)), {}
    read = []
    for shape, dtype in zip(shapes[:count], sizes.parameters[:count], strict=True):
        parameter = planner.given(*shape, dtype=dtype)
        if len(shape) == 2 and dtype != sizes.compute:
            rounded[parameter] = planner.scratch(*shape, dtype=sizes.compute)
        read.append(rounded.get(parameter, parameter))
    return read, rounded


@planned
def forward_plan(sizes: Sizes, kind: Forward) -> Plan:
    """Given x, residual, other, row_scale, the four parameters; y and h to be filled. What is not there is left out."""
    planner, (rows, dim, width, compute, *_) = Planner(), sizes
    x = planner.given(rows, dim, dtype=kind.x)
    residual = planner.given(rows, dim, dtype=kind.residual)
    other = residual if kind.other is None else planner.given(rows, dim, dtype=kind.other)
    row_scale = planner.given(rows, dtype=torch.float32) if sizes.scaled else x
    (down, down_bias, up, up_bias), rounded = _parameters(planner, sizes, 4)
    y = planner.given(rows, dim, dtype=kind.residual)
    h = planner.given(rows, width, dtype=compute) if kind.keep_h else y
    constants = _constants("adapter_forward", sizes)
    planner.launch(
        adapter_forward, (-(-rows // constants["BM"]),), x, residual, other, y, h, row_scale, down, down_bias, up,
        up_bias, rows, sizes.scale, OTHER=kind.other is not None, SCALED=sizes.scaled, STORE_H=kind.keep_h, **constants,
    )  # fmt: skip
    casts.add(planner, rounded)
    return planner.plan()


@planned
def backward_plan(sizes: Sizes, kind: Backward) -> Plan:
    """Given grad_y, x, h, addend, row_scale, down_weight, down_bias, up_weight; grad_x and the wanted parameters'
    gradients to be filled. What is not there is left out."""
    planner, (rows, dim, width, compute, *_) = Planner(), sizes
    train = any(kind.wanted)
    grad_y, x = planner.given(rows, dim, dtype=kind.grad_y), planner.given(rows, dim, dtype=kind.x)
    h = planner.given(rows, width, dtype=compute) if kind.kept_h else x
    addend = x if kind.addend is None else planner.given(rows, dim, dtype=kind.addend)
    row_scale = planner.given(rows, dtype=torch.float32) if sizes.scaled else x
    (down, down_bias, up), rounded = _parameters(planner, sizes, 3)
    grad_x = x if kind.grad_x is None else planner.given(rows, dim, dtype=kind.grad_x)
    constants = _constants("adapter_backward", sizes)
    programs = -(-rows // constants["BM"])
    g, dh, partial = (
        planner.scratch(*shape, dtype=dtype) if train else x
        for shape, dtype in (
            ((rows, width), compute), ((rows, width), compute), ((programs, dim + width), torch.float32)
        )
    )  # fmt: skip
    planner.launch(
        adapter_backward, (programs,), grad_y, x, h, addend, grad_x, g, dh, partial, row_scale, down, down_bias, up,
        rows, sizes.scale, ADDEND=kind.addend is not None, SCALED=sizes.scaled, RECOMPUTE_H=not kind.kept_h,
        WANT_X=kind.grad_x is not None, WANT_PARAMETERS=train, **constants,
    )  # fmt: skip
    shapes = ((width, dim), (width,), (dim, width), (dim,))
    grads = [
        planner.given(*shape, dtype=kind.gradients) if want else None
        for shape, want in zip(shapes, kind.wanted, strict=True)
    ]
    products = ((dh, x, grads[0]), (grad_y, g, grads[2]))
    layers = [weight_gradient.Layer(*product) for product in products if product[2] is not None]
    if layers:
        tile = tiles.find(architecture(), "weight_gradient", compute.itemsize * 8, width)
        weight_gradient.add(planner, layers, tile)
    if any(kind.wanted[1::2]):
        vectors = [
            planner.scratch(length, dtype=kind.gradients) if grad is None else grad
            for length, grad in ((dim, grads[3]), (width, grads[1]))
        ]
        sums.add(planner, [sums.Reduction(partial, vectors)])
    casts.add(planner, rounded)
    return planner.plan()
