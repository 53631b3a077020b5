"""B-CAST's Triton kernels in the interpreter, at toy sizes: every shape of problem against fp64, and bit for bit.

All memory that the host code takes is poisoned with NaN, so an element that no kernel wrote, or one that a kernel
should not have read, shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
import triton_interpreter
from bcast_cases import WINDOWS, Case, assert_at_most_twice_eager, run, small
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import cast_kernels
from cast_kernels.evidence.cases import poisoned_memory
from cast_kernels.triton import sums, tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: No size is a multiple of a tile, and the last of the frame by frame and of the window by window tiles are partial.
TOY = small(batch=2, frames=3, patches=5, dim=48, bottleneck=32, heads=2)
SMALLEST = replace(TOY, batch=1, frames=2, patches=3, dim=16)


#: The interpreter's time goes by the number of tiles, so these are larger than its default, which is `SMALL`.
TILE = tiles.Tile(rows=32, k=32, columns=64, warps=4, stages=1, queries=32, keys=32)
SMALL = tiles.find("interpreter", "project", 32, TOY.bottleneck)


@pytest.fixture(autouse=True)
def tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "find", lambda *_: TILE)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def check(case: Case, dtype: torch.dtype, autocast: torch.dtype | None = None) -> None:
    ours, eager = (run(case, dtype, backend, autocast) for backend in ("triton", "eager"))
    assert_at_most_twice_eager(ours, eager, run(case, torch.float64, None))


# --- against fp64 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("windows", "dtype"),
    [(windows, (FP32, BF16, FP16)[(i + i // 3) % 3]) for i, windows in enumerate(WINDOWS)],
    ids=str,
)
def test_every_pair_of_windows(windows: tuple[str, str], dtype: torch.dtype) -> None:
    check(replace(TOY, windows=windows, seed=1), dtype)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("directions", [("t2s",), ("s2t",)], ids=str)
def test_one_direction(directions: tuple[str, ...], positions: bool, dtype: torch.dtype) -> None:
    # Six rows a vector: over eight seeds a gradient's error was 0.6 to 2.1 times eager's, with a mean of 1.2.
    check(replace(SMALLEST, directions=directions, positions=positions, scaled=not positions, seed=4), dtype)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_drop_path_without_positions(dtype: torch.dtype) -> None:
    """Factors per token position on one stream, per clip on the other, zeros among them."""
    check(replace(TOY, batch=3, frames=2, positions=False, scaled=True, seed=3), dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (replace(SMALLEST, frames=5, patches=7, scaled=True), FP32),  # more than one tile of rows, one is partial
        (replace(SMALLEST, frames=1, patches=37, windows=("space", "space-time")), FP16),  # windows across tiles
        (replace(TOY, batch=1, frames=1, patches=19, windows=("space", "space")), BF16),
    ],
    ids=str,
)  # fmt: skip
def test_rows_and_tiles(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


def test_one_table_is_missing() -> None:
    """The op takes any of the four tables alone; kernels add all or none, so zeros stand in for the others."""
    module, exact = TOY.module(FP32, "triton"), TOY.module(torch.float64, "eager")
    found = []
    for made, dtype in ((module, FP32), (exact, torch.float64)):
        parameters = made.gathered()
        assert parameters.t2s is not None
        parameters = parameters._replace(t2s=parameters.t2s._replace(kv_pos=None))
        outputs = cast_kernels.bcast(*TOY.inputs(dtype), parameters, num_heads=TOY.heads, backend=made.backend)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        grads = {name: p.grad for name, p in made.named_parameters()}
        assert grads["t2s_cross.vmae_time_pos"] is None
        found.append([*outputs, *(g for g in grads.values() if g is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_windows_of_one_token() -> None:
    """Queries and keys have no gradient then, and rounding leaves less than a few units in the last place of one."""
    case = replace(SMALLEST, frames=1, patches=1)
    ours, exact = run(case, FP32, "triton"), run(case, torch.float64, None)
    for name, truth in exact.items():
        torch.testing.assert_close(ours[name], truth, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("bottleneck", "heads", "chunks", "dtype"),
    [
        (16, 1, (16, 1), FP32),
        (32, 1, (32, 1), FP16),  # heads of 32
        (64, 1, (64, 1), BF16),  # heads of 64
        (48, 3, (16, 3), FP32),
        (112, 7, (128, 1), BF16),  # padded
        (256, 4, (128, 2), FP16),
        (352, 11, (128, 3), FP32),  # padded
        (512, 8, (128, 4), BF16),
        (640, 10, (128, 5), FP32),
        (768, 12, (128, 6), BF16),
    ],
)
def test_bottlenecks_and_heads(
    bottleneck: int, heads: int, chunks: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to six chunks, with padded channels in the last and without; heads of 16, 32 and 64."""
    assert tiles.chunking(bottleneck) == chunks
    wide = tiles.Tile(rows=32, k=64, columns=512, warps=4, stages=1, queries=32, keys=32)
    gradient = replace(wide, rows=512, k=32)
    monkeypatch.setattr(tiles, "find", lambda arch, kernel, *_: gradient if kernel == "weight_gradient" else wide)
    monkeypatch.setattr(sums, "COLUMNS", 1024)
    check(replace(SMALLEST, bottleneck=bottleneck, heads=heads, seed=4), dtype)


@pytest.mark.parametrize(
    "tile",
    [
        SMALL,
        tiles.Tile(rows=64, k=32, columns=128, warps=8, stages=3, queries=32, keys=64),
    ],
    ids=["small", "large"],
)
def test_other_tiles(tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "find", lambda *_: tile)
    check(replace(SMALLEST, frames=3, patches=7, scaled=True, seed=5), FP32)


@pytest.mark.parametrize("compute", [BF16, FP16], ids=str)
def test_autocast(compute: torch.dtype) -> None:
    """Streams and parameters in float32, products in the autocast's dtype."""
    check(replace(TOY, seed=6), FP32, compute)


def test_autocast_with_mixed_streams_and_parameters() -> None:
    """One stream in bfloat16 beside one in float32, and some parameters in bfloat16: each gradient in its own dtype."""
    case, found = replace(SMALLEST, seed=7), {}
    for backend in ("triton", "eager"):
        module = case.module(backend=backend)
        module.cross_s_down.to(BF16)
        module.ln_t_cross.to(BF16)
        spatial, temporal = case.inputs()
        inputs = (spatial.requires_grad_(), temporal.to(BF16).requires_grad_())
        with torch.autocast("cpu", BF16):
            outputs = module(*inputs)
        assert [x.dtype for x in outputs] == [FP32, BF16]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        leaves = [*inputs, *module.parameters()]
        assert all(x.grad is not None and x.grad.dtype == x.dtype for x in leaves)
        found[backend] = [*(x.detach() for x in outputs), *(x.grad for x in leaves)]
    for ours, eager in zip(found["triton"], found["eager"], strict=True):
        assert ours.dtype == eager.dtype
        # Two roundings to bfloat16 in a row are 2^-8, and gradients have passed through a dozen.
        assert float((ours.float() - eager.float()).norm()) <= 0.03 * float(eager.float().norm())


# --- bit for bit -----------------------------------------------------------------------------------------------------


@pytest.fixture
def products_in_any_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a product not depend on where in its tile a row stands, as on a GPU; a BLAS adds the last rows otherwise."""

    def create_dot(self: object, a: Any, b: Any, d: Any, *_: object) -> TensorHandle:
        left, right = (x.data if x.dtype.scalar != tl.bfloat16 else triton_interpreter.widen(x.data) for x in (a, b))
        product = np.matmul(left, right, dtype=np.float64) + d.data
        return TensorHandle(product.astype(np.float32), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def gradients(module: cast_kernels.BCAST, case: Case, dtype: torch.dtype = FP32) -> list[Tensor]:
    """Outputs and all gradients."""
    inputs, scales = case.inputs(dtype, grad=True), case.scales(dtype)
    outputs = module(*inputs, *scales)
    leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])]


@pytest.mark.usefixtures("products_in_any_place")
@pytest.mark.parametrize(
    ("windows", "dtype"), [(("time", "space"), FP32), (("time", "space"), BF16), (("space-time", "time"), FP16)]
)
def test_every_recompute_level_gives_the_same_bits(windows: tuple[str, str], dtype: torch.dtype) -> None:
    case = replace(SMALLEST, windows=windows, scaled=True)
    module, results = case.module(dtype, "triton"), []
    for module.recompute in cast_kernels.Recompute:
        results.append(gradients(module, case, dtype))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    assert all(x.isfinite().all() for x in results[0])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    module = SMALLEST.module(dtype, "triton")
    first, second = (gradients(module, SMALLEST, dtype) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_strided_inputs_give_the_same_bits() -> None:
    module, (spatial, temporal) = SMALLEST.module(backend="triton"), SMALLEST.inputs()
    strided = (spatial.mT.contiguous().mT, temporal.transpose(1, 2).contiguous().transpose(1, 2))
    assert not any(x.is_contiguous() for x in strided)
    for x, y in zip(module(*strided), module(spatial, temporal), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("trained", ["inputs", "cross_s_down.weight", "s2t_cross.clip_space_pos"])
def test_frozen_subsets_get_the_same_gradients(trained: str) -> None:
    full = run(SMALLEST, FP32, "triton")
    module, inputs = SMALLEST.module(backend="triton"), SMALLEST.inputs(grad=trained == "inputs")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    outputs = module(*inputs)
    torch.autograd.backward(outputs, SMALLEST.output_grads())
    leaves = dict(zip(("spatial", "temporal"), inputs, strict=True)) | dict(module.named_parameters())
    found = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    assert set(found) == ({"spatial", "temporal"} if trained == "inputs" else {trained})
    for name, grad in found.items():
        assert torch.equal(grad.double(), full[f"grad.{name}"]), name


def test_an_empty_batch() -> None:
    case = replace(TOY, batch=0)
    module, inputs = case.module(backend="triton"), case.inputs(grad=True)
    outputs = module(*inputs)
    assert [tuple(x.shape) for x in outputs] == [(0, 3, 6, 48), (0, 3, 5, 48)]
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


# --- the contract with PyTorch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    from cast_kernels.triton.bcast import saved_words

    # Sizes at which `saved` has no gaps between its parts: opcheck compares all of it.
    case = replace(SMALLEST, frames=4, patches=4)
    module, (spatial, temporal) = case.module(), case.inputs(grad=grad)
    flat = [p.detach().requires_grad_(grad) for p in module.gathered().flat() if p is not None]
    kept = saved_words(module.problem(), "cheap") if grad else 0
    arguments = (spatial, temporal, flat, None, None, case.heads, *case.windows, 1e-6, "cheap", FP32, kept)
    torch.library.opcheck(torch.ops.cast_kernels.bcast, (*arguments, "triton"), atol=1e-5, rtol=1e-4)


def test_compile_without_graph_breaks() -> None:
    module = SMALLEST.module(backend="triton")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        case = replace(SMALLEST, batch=batch)
        for x, y in zip(gradients(compiled, case), gradients(module, case), strict=True):
            assert torch.equal(x, y)


def test_activation_checkpointing() -> None:
    module, inputs = SMALLEST.module(backend="triton"), SMALLEST.inputs(grad=True)
    want = gradients(module, SMALLEST)
    outputs = torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False)
    leaves = [*inputs, *module.parameters()]
    found = [*outputs, *torch.autograd.grad(outputs, leaves, [x.detach() for x in outputs])]
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


# --- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("windows", [("time", "space"), ("space", "space-time")], ids=str)
def test_a_clip_that_is_not_finite_spoils_no_other(windows: tuple[str, str], value: float) -> None:
    """Clips of 42 patches share tiles of 32, so one clip's keys are masked beside another's; windows are 2, 21 and 42.

    The others keep their bits, outputs and gradients; in the broken one at least what the reference has is not finite.
    """
    case = replace(TOY, batch=3, frames=2, patches=21, dim=16, windows=windows)

    def inputs(spoilt: bool) -> tuple[Tensor, Tensor]:
        spatial, temporal = case.inputs()
        if spoilt:
            temporal[1, 1, 4, 3] = spatial[1, 0, 6, 2] = value
        return spatial, temporal

    def step(spoilt: bool) -> list[Tensor]:
        streams = [x.requires_grad_() for x in inputs(spoilt)]
        outputs = case.module(backend="triton")(*streams)
        sum(y.square().sum() for y in outputs).backward()
        return [*(y.detach() for y in outputs), *(x.grad for x in streams if x.grad is not None)]

    ours, healthy = step(True), step(False)
    exact = cast_kernels.reference.bcast(*inputs(True), case.module().gathered(), num_heads=case.heads, windows=windows)
    assert len(ours) == 4
    for found, whole in zip(ours, healthy, strict=True):
        assert torch.equal(found[::2], whole[::2])
        assert not found[1].isfinite().all()
    for found, truth in zip(ours, exact, strict=False):
        assert not (found.isfinite() & ~truth.isfinite()).any()
        assert not truth[1].isfinite().all()
