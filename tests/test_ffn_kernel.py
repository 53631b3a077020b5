"""The native core's FFN: every instruction-set level, memory bounds, threads, and its refusals.

Called as a script with the name of a level, it prints the pooled errors of that level as JSON: a process chooses its
level once, so each level needs a process of its own.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from ffn_cases import CASES, Case, run
from levels import LEVELS, check_level, run_at

from cast_kernels import _native
from cast_kernels.cpu import ffn as cpu_ffn
from cast_kernels.ops.ffn import pose

pytestmark = pytest.mark.skipif(_native.CORE is None, reason=f"nothing to test: {_native.REASON}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_and_inference_give_the_same_bits(case: Case) -> None:
    x, parameters = case.x().reshape(-1, case.dim), case.parameters()
    problem = pose(x, parameters, case.activation)
    results = [cpu_ffn.forward(problem, x, parameters, None, 1e-5, 0.5, save)[0] for save in (True, False)]
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": -1}, "rows is -1, but must be at least 0"),
        ({"hidden": 0}, "hidden is 0, but must be at least 1"),
        ({"activation": 2}, "activation is 2, but must be 0"),
    ],
)
def test_sizes_that_make_no_problem_are_refused(changed: dict[str, int], message: str) -> None:
    sizes = {"rows": 1, "dim": 2, "hidden": 3, "adapter": 0, "activation": 0, "keep": False, "eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        _native.core().FFNProblem(**(sizes | {"adapter_scale": 0.5} | changed))


def test_missing_pointers_and_threads_are_refused() -> None:
    core, at = _native.core(), torch.zeros(1000).data_ptr()
    native = core.FFNProblem(1, 2, 3, 1, 0, False, 1e-5, 0.5)
    with pytest.raises(ValueError, match="LayerNorm parameter is missing"):
        core.ffn_forward(native, at, [0] * 10, 0, at, 0, 1)
    with pytest.raises(ValueError, match="parameter of the adapter is missing"):
        core.ffn_forward(native, at, [at] * 9 + [0], 0, at, 0, 1)
    with pytest.raises(ValueError, match="input or the output is missing"):
        core.ffn_forward(native, 0, [at] * 10, 0, at, 0, 1)
    with pytest.raises(ValueError, match="threads is 0"):
        core.ffn_forward(native, at, [at] * 10, 0, at, 0, 0)
    with pytest.raises(ValueError, match="`saved` of forward is missing"):
        core.ffn_backward(native, at, [at] * 10, 0, 0, at, at, [0] * 10, 1)


def guarded(values: torch.Tensor, fill: float, owners: list[torch.Tensor]) -> torch.Tensor:
    """The values inside a larger tensor of `fill`, at an address that no vector is aligned to."""
    owner = torch.full((values.numel() + 74,), fill)
    owners.append(owner)
    return owner[37 : 37 + values.numel()].view(values.shape).copy_(values)


def raw_call(case: Case, keep: bool, threads: int, fill: float) -> list[torch.Tensor]:
    """Forward and backward on memory surrounded, and results filled, with `fill`."""
    core, given, made = _native.core(), [], []
    rows = math.prod(case.lead)
    native = core.FFNProblem(rows, case.dim, case.hidden, case.adapter, 0, keep, 1e-5, 0.5)
    x, grad_y = guarded(case.x(), fill, given), guarded(case.grad_y(), fill, given)
    flat = [None if p is None else guarded(p, fill, given) for p in case.parameters()]
    addresses = [0 if p is None else p.data_ptr() for p in flat]
    scale = case.row_scale()
    scale_at = 0 if scale is None else guarded(scale, fill, given).data_ptr()
    empty = [torch.full_like(x, fill), torch.full((rows * core.ffn_saved_per_row(native),), fill)]
    empty += [torch.full_like(x, fill), *(torch.full_like(p, fill) for p in flat if p is not None)]
    y, saved, grad_x, *grads = (guarded(t, fill, made) for t in empty)
    core.ffn_forward(native, x.data_ptr(), addresses, scale_at, y.data_ptr(), saved.data_ptr(), threads)
    grad_at = [g.data_ptr() for g in grads] + [0] * (10 - len(grads))
    core.ffn_backward(
        native, x.data_ptr(), addresses, scale_at, saved.data_ptr(), grad_y.data_ptr(), grad_x.data_ptr(), grad_at,
        threads,
    )  # fmt: skip
    for owner in (*given, *made):
        guards = torch.cat([owner[:37], owner[-37:]])
        assert torch.equal(guards.isnan(), torch.full((74,), math.isnan(fill)))
        assert math.isnan(fill) or bool((guards == fill).all())
    return [y, saved, grad_x, *grads]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_written_whole_and_nothing_else_is(case: Case, keep: bool) -> None:
    plain = raw_call(case, keep, 1, 0.0)
    for threads, fill in ((2, math.nan), (3, 7.0)):
        for ours, other in zip(raw_call(case, keep, threads, fill), plain, strict=True):
            assert torch.equal(ours, other)


def level_errors() -> dict[str, float]:
    """Errors against fp64 over eager's, per tensor, pooled over all cases relative to the tensors' size."""
    squares: dict[str, list[float]] = {}
    for case in CASES:
        ours, eager, exact = (
            run(case, torch.float32, "cpu"), run(case, torch.float32, "eager"), run(case, torch.float64, None)
        )  # fmt: skip
        for name, truth in exact.items():
            size = float(truth.square().mean())
            if size == 0.0:  # the only row's factor is zero
                assert not ours[name].any(), name
                continue
            sums = squares.setdefault(name, [0.0, 0.0])
            for i, values in enumerate((ours, eager)):
                sums[i] += float((values[name] - truth).square().mean()) / size
    return {name: math.sqrt(a / b) for name, (a, b) in squares.items()}


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_as_exact_as_eager(level: str) -> None:
    ratios = run_at(level, __file__)
    assert len(ratios) == 12, "the output, the gradient of x and of ten parameters"
    assert all(ratio <= 2.0 for ratio in ratios.values()), ratios


if __name__ == "__main__":
    check_level()
    print(json.dumps(level_errors()))
