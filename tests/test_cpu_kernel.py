"""The native core itself: every instruction-set level, threads, memory bounds, and its refusals.

Called as a script with the name of a level, it prints the pooled errors of that level as JSON: a process chooses its
level once, so each level needs a process of its own.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import threading
import time

import pytest
import torch
from bcast_cases import CASES, Case, run, small
from levels import LEVELS, check_level, run_at
from torch import Tensor

import cast_kernels
from cast_kernels import _native
from cast_kernels.cpu import bcast as cpu
from cast_kernels.cpu.common import RECOMPUTE_CODES
from cast_kernels.problem import PARAMETER_NAMES, Problem

pytestmark = pytest.mark.skipif(_native.CORE is None, reason=f"nothing to test: {_native.REASON}")


#: What the shared cases are too small for: windows longer than a block of keys or of rows, and heads of every width.
LONG = [
    small(batch=1, frames=2, patches=150, dim=24, bottleneck=16, heads=2, windows=("space-time",) * 2, seed=50),
    small(batch=1, frames=2, patches=290, dim=24, bottleneck=24, heads=2, windows=("space", "space"), seed=51),
    small(batch=1, frames=130, patches=2, dim=20, bottleneck=20, heads=1, windows=("time", "time"), seed=52),
    small(batch=2, frames=2, patches=100, dim=70, bottleneck=66, heads=2, windows=("space", "space-time"), seed=53),
    small(batch=2, frames=4, patches=9, dim=72, bottleneck=128, heads=2, windows=("time", "space"), seed=54),
    small(batch=1, frames=2, patches=3, dim=5, bottleneck=3, heads=3, windows=("time", "space"), seed=55),
]


def pooled_ratios(cases: list[Case]) -> dict[str, float]:
    """Error against fp64 over eager's, per tensor name, both pooled over all cases relative to the tensors' size.

    One small tensor's ratio scatters by a factor of two between equally good summation orders; the pool does not.
    """
    squares: dict[str, list[float]] = {}
    for case in cases:
        ours, eager, exact = (
            run(case, torch.float32, "cpu"), run(case, torch.float32, "eager"), run(case, torch.float64, None)
        )  # fmt: skip
        assert ours.keys() == exact.keys()
        for name, truth in exact.items():
            size = float(truth.square().mean())
            if size == 0.0:  # a softmax over one key passes no gradient
                assert not ours[name].any(), name
                continue
            sums = squares.setdefault(name, [0.0, 0.0])
            for i, values in enumerate((ours, eager)):
                sums[i] += float((values[name] - truth).square().mean()) / size
    return {name: math.sqrt(a / b) for name, (a, b) in squares.items()}


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_as_exact_as_eager(level: str) -> None:
    ratios = run_at(level, __file__)
    assert len(ratios) >= 4 + 28, "both outputs, both input gradients, 28 parameter gradients"
    assert all(ratio <= 2.0 for ratio in ratios.values()), ratios


# --- raw calls -------------------------------------------------------------------------------------------------------


class Guarded:
    """Float32 tensors inside larger ones: `guard` floats on either side, at addresses that no vector is aligned to."""

    GUARD = 37

    def __init__(self, fill: float) -> None:
        self.fill = fill
        self.owners: list[Tensor] = []

    def take(self, shape: tuple[int, ...], values: Tensor | None = None) -> Tensor:
        count = math.prod(shape)
        owner = torch.full((count + 2 * self.GUARD,), self.fill)
        self.owners.append(owner)
        inner = owner[self.GUARD : self.GUARD + count].view(shape)
        return inner if values is None else inner.copy_(values)

    def intact(self) -> bool:
        guards = [torch.cat([x[: self.GUARD], x[-self.GUARD :]]) for x in self.owners]
        return all(torch.equal(g.isnan(), torch.full_like(g, self.fill).isnan()) for g in guards) and all(
            bool((g == self.fill).all()) or math.isnan(self.fill) for g in guards
        )


def raw_call(case: Case, threads: int, fill: float, given_fill: float, recompute: str = "nothing") -> dict[str, Tensor]:
    """Forward and backward on guarded memory: results pre-filled with `fill`, inputs surrounded by `given_fill`."""
    core = _native.core()
    codes = [{"time": 0, "space": 1, "space-time": 2}[w] for w in case.windows]
    codes = [c if d in case.directions else -1 for c, d in zip(codes, cast_kernels.DIRECTIONS, strict=True)]
    sizes = (case.batch, case.frames, case.patches, case.dim, case.bottleneck, case.heads)
    native = core.Problem(*sizes, *codes, 1e-6)
    given, made = Guarded(given_fill), Guarded(fill)
    streams = [given.take(tuple(x.shape), x) for x in case.inputs()]
    scales = [given.take(tuple(x.shape), x).data_ptr() if x is not None else 0 for x in case.scales()]
    flat = [None if p is None else given.take(tuple(p.shape), p.detach()) for p in case.module().gathered().flat()]
    addresses = [0 if p is None else p.data_ptr() for p in flat]
    outputs = [made.take(tuple(x.shape)) if c >= 0 else None for x, c in zip(streams, codes, strict=True)]
    mode = RECOMPUTE_CODES[recompute]
    saved = made.take((case.batch, core.saved_per_clip(native, mode)))
    core.bcast_forward(
        native, *(x.data_ptr() for x in streams), *scales, addresses,
        *(0 if x is None else x.data_ptr() for x in outputs), saved.data_ptr(), mode, threads,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    grads = [given.take(tuple(x.shape), torch.randn(x.shape, generator=generator)) for x in streams]
    input_grads = [made.take(tuple(x.shape)) for x in streams]
    parameter_grads = [None if p is None else made.take(tuple(p.shape)) for p in flat]
    core.bcast_backward(
        native, *(x.data_ptr() for x in streams), *scales, addresses, saved.data_ptr(), mode,
        *(x.data_ptr() if c >= 0 else 0 for x, c in zip(grads, codes, strict=True)),
        *(x.data_ptr() for x in input_grads), [0 if g is None else g.data_ptr() for g in parameter_grads], threads,
    )  # fmt: skip
    assert given.intact(), "an input's surroundings were written"
    assert made.intact(), "something was written past a result"
    names = ("spatial_out", "temporal_out", "saved", "grad_spatial", "grad_temporal", *PARAMETER_NAMES)
    results = (*outputs, saved, *input_grads, *parameter_grads)
    return {name: x for name, x in zip(names, results, strict=True) if x is not None}


RAW = [
    small(seed=60),
    small(scaled=True, positions=False, seed=61),
    small(directions=("t2s",), seed=62),
    small(directions=("s2t",), windows=("time", "space-time"), seed=63),
    small(batch=5, frames=8, patches=25, dim=64, bottleneck=32, heads=4, seed=64),
    small(batch=1, dim=47, bottleneck=21, heads=3, seed=65),  # rows that end one float before a whole vector
    LONG[0],
    LONG[3],
    LONG[5],
]


@pytest.mark.parametrize("recompute", ["nothing", "cheap", "all"])
@pytest.mark.parametrize("case", RAW, ids=str)
def test_results_are_written_whole_and_nothing_else_is(case: Case, recompute: str) -> None:
    """NaN around the inputs reaches no result, NaN in the results' memory is all overwritten, guards stay."""
    plain, poisoned = raw_call(case, 2, 0.0, 0.0, recompute), raw_call(case, 2, math.nan, math.nan, recompute)
    for name, x in poisoned.items():
        assert torch.equal(x, plain[name]), f"{name} depends on memory outside the inputs, or is not written whole"


@pytest.mark.parametrize("case", RAW, ids=str)
def test_bits_do_not_depend_on_threads(case: Case) -> None:
    one = raw_call(case, 1, 0.0, 0.0)
    for threads in (2, 3, 7):
        for name, x in raw_call(case, threads, 0.0, 0.0).items():
            assert torch.equal(x, one[name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("case", RAW, ids=str)
def test_bits_do_not_depend_on_what_is_kept(case: Case) -> None:
    kept = raw_call(case, 2, 0.0, 0.0)
    for recompute in ("cheap", "all"):
        again = raw_call(case, 2, math.nan, math.nan, recompute)
        for name in kept.keys() - {"saved"}:
            assert torch.equal(again[name], kept[name]), f"{name}, recompute={recompute}"


def test_a_clip_does_not_depend_on_its_batch() -> None:
    module, (spatial, temporal) = small(batch=5).module(backend="cpu"), small(batch=5).inputs()
    with torch.no_grad():
        together = module(spatial, temporal)
        for i in range(5):
            alone = module(spatial[i : i + 1], temporal[i : i + 1])
            assert all(torch.equal(x[i : i + 1], y) for x, y in zip(together, alone, strict=True))


def test_wanted_gradients_do_not_depend_on_the_others() -> None:
    case = small(scaled=True)
    module, full = case.module(backend="cpu"), run(case, torch.float32, "cpu")
    frozen = [p for i, p in enumerate(module.parameters()) if i % 3 == 0]
    for parameter in frozen:
        parameter.requires_grad_(False)
    outputs = module(*case.inputs(), *case.scales())
    torch.autograd.backward(outputs, case.output_grads())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad.double(), full[f"grad.{name}"]), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("windows", [("time", "space"), ("space", "space-time")], ids="+".join)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_spreads_as_in_the_reference(windows: tuple[str, str], value: float) -> None:
    """The reference, not eager: PyTorch's CPU attention answers a NaN query with zeros."""
    case = small(windows=windows)
    spatial, temporal = case.inputs()
    temporal[1, 1, 4, 3] = value
    module = case.module(backend="cpu")
    with torch.no_grad():
        ours = module(spatial, temporal)
        exact = cast_kernels.reference.bcast(
            spatial, temporal, module.gathered(), num_heads=case.heads, windows=windows
        )  # fmt: skip
    for x, y in zip(ours, exact, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert y.isnan().any()


@pytest.mark.parametrize("recompute", ["nothing", "cheap", "all"])
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_both_sides_agree_on_what_is_saved(case: Case, recompute: str) -> None:
    problem = cast_kernels.ops.bcast.pose(*case.inputs(), case.module().gathered(), case.heads, case.windows)
    native = cpu._native_problem(_native.core(), problem, 1e-6, recompute)
    assert _native.core().saved_per_clip(native, RECOMPUTE_CODES[recompute]) == cpu.saved_words(problem, recompute)


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients() -> None:
    case = small(batch=0)
    module, inputs = case.module(backend="cpu"), case.inputs(grad=True)
    outputs = module(*inputs)
    assert [x.shape for x in outputs] == [x.shape for x in inputs]
    sum(x.sum() for x in outputs).backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


# --- living with Python ----------------------------------------------------------------------------------------------


def _ticks_in_the_middle_of_a_call() -> list[float]:
    """When another thread ran between a fifth and four fifths of a forward call."""
    module = small(batch=4, frames=8, patches=196, dim=256, bottleneck=128, heads=4).module(backend="cpu")
    inputs = small(batch=4, frames=8, patches=196, dim=256, bottleneck=128, heads=4).inputs()
    span: list[float] = []

    def compute() -> None:
        core_call = cpu.forward
        problem = cast_kernels.ops.bcast.pose(*inputs, module.gathered(), 4, ("time", "space"))
        span.append(time.perf_counter())
        core_call(problem, *inputs, module.gathered(), None, None, 1e-6, "")
        span.append(time.perf_counter())

    worker, ticks = threading.Thread(target=compute), []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    worker.join()
    start, end = span
    return [t for t in ticks if start + 0.2 * (end - start) < t < start + 0.8 * (end - start)]


def test_other_threads_run_while_the_core_computes() -> None:
    # A busy machine may give another thread no turn in one call.
    tries = (_ticks_in_the_middle_of_a_call() for _ in range(5))
    assert any(tries), "no other thread ran in the middle of five calls: the GIL was held"


def _run_in_fork(queue: multiprocessing.Queue[float]) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        outputs = small(batch=4).module(backend="cpu")(*small(batch=4).inputs())
    queue.put(float(outputs[0].double().sum()))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_worker_computes_with_one_thread() -> None:
    """As in a data loader's worker: the parent's pool threads do not survive the fork."""
    with torch.no_grad():
        expected = small(batch=4).module(backend="cpu")(*small(batch=4).inputs())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_run_in_fork, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == float(expected[0].double().sum())
    child.join(timeout=60)
    assert child.exitcode == 0


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": -1}, "batch is -1"),
        ({"frames": 0}, "frames is 0, but must be at least 1"),
        ({"heads": 5}, "not a multiple of the 5 heads"),
        ({"t2s_window": 3}, "window is 3, but must be -1 .absent., 0 .time., 1 .space. or 2"),
    ],
)
def test_sizes_that_make_no_problem_are_refused(changed: dict[str, int], message: str) -> None:
    sizes = {"batch": 1, "frames": 2, "patches": 3, "dim": 8, "bottleneck": 4, "heads": 2}
    sizes |= {"t2s_window": 0, "s2t_window": 1, "eps": 1e-6}
    with pytest.raises(ValueError, match=message):
        _native.core().Problem(**(sizes | changed))


def test_missing_pointers_and_threads_are_refused() -> None:
    core = _native.core()
    native = core.Problem(1, 2, 3, 8, 4, 2, 0, 1, 1e-6)
    x = torch.zeros(1000)
    with pytest.raises(ValueError, match="spatial input is missing"):
        core.bcast_forward(native, 0, 0, 0, 0, [0] * 28, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="down or norm parameter of the spatial stream is missing"):
        core.bcast_forward(native, x.data_ptr(), x.data_ptr(), 0, 0, [0] * 28, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="threads is 0"):
        core.bcast_forward(native, x.data_ptr(), x.data_ptr(), 0, 0, [0] * 28, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="recompute is 3"):
        core.bcast_forward(native, x.data_ptr(), x.data_ptr(), 0, 0, [0] * 28, 0, 0, 0, 3, 1)
    with pytest.raises(ValueError, match="buffer `saved` for backward is missing"):
        core.bcast_forward(native, *[x.data_ptr()] * 2, 0, 0, [x.data_ptr()] * 28, *[x.data_ptr()] * 2, 0, 1, 1)
    with pytest.raises(ValueError, match="`saved` of forward is missing"):
        core.bcast_backward(native, *[x.data_ptr()] * 2, 0, 0, [x.data_ptr()] * 28, 0, 0, 0, 0, 0, 0, [0] * 28, 1)


def test_memory_that_cannot_be_had_is_a_memory_error() -> None:
    core = _native.core()
    x = torch.zeros(1)
    native = core.Problem(1, 2, 3, 1 << 44, 4, 2, 0, 1, 1e-6)
    with pytest.raises(MemoryError):
        core.bcast_forward(native, *[x.data_ptr()] * 2, 0, 0, [x.data_ptr()] * 28, *[x.data_ptr()] * 2, 0, 2, 1)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"device": "cuda"}, "on cuda"), ({"dtype": torch.float64}, "torch.float64"), ({}, "native core, ")],
)
def test_can_run_says_why(changed: dict[str, object], reason: str) -> None:
    fields = {"dtype": torch.float32, "device": "cpu"} | changed
    verdict = cpu.can_run(Problem(1, 2, 3, 8, 4, 2, "time", "space", **fields))  # type: ignore[arg-type]
    assert verdict.ok == (not changed)
    assert reason in verdict.reason


def test_the_multiply_add_ceiling_is_measured() -> None:
    one = _native.core().measure_fma_ceiling(1, 0.02)
    assert 0.5 < one < 1000, "GFLOP/s of one core"


if __name__ == "__main__":
    check_level()
    print(json.dumps(pooled_ratios([*(case for case in CASES if case.patches < 100), *LONG])))
