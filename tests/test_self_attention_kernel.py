"""Self-attention in the native core: every instruction-set level, memory bounds, refusals.

Called as a script with the name of a level, it checks that level: a process chooses its level once.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from bcast_cases import assert_at_most_twice_eager
from levels import LEVELS, check_level, run_at
from self_attention_cases import CASES, PAPER, Case, run

import cast_kernels
from cast_kernels import _native
from cast_kernels.cpu import self_attention as cpu

pytestmark = pytest.mark.skipif(_native.CORE is None, reason=f"nothing to test: {_native.REASON}")

RECOMPUTE = [r.value for r in cast_kernels.Recompute]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("case", [*CASES, PAPER], ids=str)
def test_both_sides_agree_on_what_is_saved(case: Case, recompute: str) -> None:
    core, problem = _native.core(), case.problem(recompute)
    sizes = (problem.batch, problem.tokens, problem.dim, problem.num_heads, problem.adapter)
    made = core.SelfAttentionProblem(*sizes, RECOMPUTE.index(recompute), 1e-5)
    assert core.self_attention_saved(made) == cpu.saved_words(problem)


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_as_exact_as_eager(level: str) -> None:
    assert run_at(level, __file__) == "exact"


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("case", [Case(), Case(adapter=0), CASES[5], CASES[7]], ids=str)
def test_results_are_written_whole_and_depend_on_inputs_only(case: Case, recompute: str) -> None:
    """NaN around the inputs reaches no result, NaN in the results' memory is all overwritten, guards stay."""

    def call(fill: float) -> list[torch.Tensor]:
        core, guard = _native.core(), 37
        owners: list[torch.Tensor] = []

        def take(shape: tuple[int, ...], values: torch.Tensor | None = None) -> torch.Tensor:
            count = math.prod(shape)
            owners.append(torch.full((count + 2 * guard,), fill))
            inner = owners[-1][guard : guard + count].view(shape)
            return inner if values is None else inner.copy_(values)

        problem = case.problem(recompute)
        sizes = (problem.batch, problem.tokens, problem.dim, problem.num_heads, problem.adapter)
        made = core.SelfAttentionProblem(*sizes, RECOMPUTE.index(recompute), 1e-5)
        shape = tuple(case.x().shape)
        x, grad_y = take(shape, case.x()), take(shape, case.grad_y())
        flat = [None if p is None else take(tuple(p.shape), p) for p in case.parameters()]
        addresses = [0 if p is None else p.data_ptr() for p in flat]
        y, grad_x, saved = take(shape), take(shape), take((cpu.saved_words(problem),))
        grads = [None if p is None else take(tuple(p.shape)) for p in flat]
        core.self_attention_forward(made, x.data_ptr(), addresses, y.data_ptr(), saved.data_ptr(), 2)
        core.self_attention_backward(
            made, x.data_ptr(), addresses, saved.data_ptr(), grad_y.data_ptr(), grad_x.data_ptr(),
            [0 if g is None else g.data_ptr() for g in grads], 2,
        )  # fmt: skip
        for owner in owners:
            ends = torch.cat([owner[:guard], owner[-guard:]])
            assert torch.equal(ends.nan_to_num(7.0), torch.full_like(ends, fill).nan_to_num(7.0)), "a guard was written"
        return [y, saved, grad_x, *(g for g in grads if g is not None)]

    for plain, poisoned in zip(call(0.0), call(math.nan), strict=True):
        assert torch.equal(plain, poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_spreads_as_in_the_reference(value: float) -> None:
    case = Case(batch=2, tokens=150)
    x = case.x()
    x[1, 140, 3] = value
    y = cast_kernels.self_attention(x, case.parameters(), num_heads=5, eps=1e-5, backend="cpu")
    exact = cast_kernels.reference.self_attention(x, case.parameters(), num_heads=5, eps=1e-5)
    assert torch.equal(y.isnan(), exact.isnan())
    assert exact.isnan().any()


def test_the_core_refuses_what_makes_no_problem() -> None:
    core = _native.core()
    with pytest.raises(ValueError, match="tokens is 0, but must be at least 1"):
        core.SelfAttentionProblem(1, 0, 8, 2, 0, 0, 1e-5)
    with pytest.raises(ValueError, match="dim is 8, not a multiple of the 3 heads"):
        core.SelfAttentionProblem(1, 4, 8, 3, 0, 0, 1e-5)
    with pytest.raises(ValueError, match="recompute is 3"):
        core.SelfAttentionProblem(1, 4, 8, 2, 0, 3, 1e-5)
    made, x = core.SelfAttentionProblem(1, 4, 8, 2, 3, 0, 1e-5), torch.zeros(1000)
    with pytest.raises(ValueError, match="projection parameter is missing"):
        core.self_attention_forward(made, x.data_ptr(), [0] * 10, x.data_ptr(), 0, 1)
    with pytest.raises(ValueError, match="adapter is missing"):
        core.self_attention_forward(made, x.data_ptr(), [x.data_ptr()] * 6 + [0] * 4, x.data_ptr(), 0, 1)
    with pytest.raises(ValueError, match="`saved` of forward is missing"):
        core.self_attention_backward(made, x.data_ptr(), [x.data_ptr()] * 10, 0, x.data_ptr(), 0, [0] * 10, 1)
    with pytest.raises(ValueError, match="threads is 0"):
        core.self_attention_forward(made, x.data_ptr(), [x.data_ptr()] * 10, x.data_ptr(), 0, 0)


def _check_accuracy() -> None:
    for case in CASES:
        ours, eager, exact = (
            run(case, torch.float32, "cpu"), run(case, torch.float32, "eager"), run(case, torch.float64, None)
        )  # fmt: skip
        assert_at_most_twice_eager(ours, eager, exact)
    print(json.dumps("exact"))


if __name__ == "__main__":
    check_level()
    _check_accuracy()
