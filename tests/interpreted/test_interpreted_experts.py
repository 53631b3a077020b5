"""The experts' ops on backend `triton`, interpreted: right in every dtype, same bits, and the contract with PyTorch."""

from __future__ import annotations

import adapter_cases
import ffn_cases
import pytest
import self_attention_cases
import torch
from bcast_cases import assert_at_most_twice_eager
from torch import Tensor

import cast_kernels
from cast import CAST
from cast_kernels import backends
from cast_kernels.ops import adapter as adapter_op
from cast_kernels.ops import ffn as ffn_op
from cast_kernels.triton import adapter as triton_adapter
from cast_kernels.triton import ffn as triton_ffn

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LEVELS = ["nothing", "cheap", "all"]
FFN = [
    ffn_cases.Case(lead=(3, 7), dim=48, hidden=64, adapter=16, scaled=True),
    ffn_cases.Case(lead=(1,), dim=80, hidden=32, adapter=48, activation="quick_gelu"),
    ffn_cases.Case(lead=(33,), dim=16, hidden=48, adapter=32, activation="quick_gelu", scaled=True),
]
ATTENTION = [
    self_attention_cases.Case(batch=2, tokens=19, dim=64, heads=4, adapter=32),
    self_attention_cases.Case(batch=1, tokens=33, dim=48, heads=3, adapter=16, qkv_bias=False),
]
CASES = [(adapter_cases, case) for case in adapter_cases.CASES[:4]]  # the widest takes seconds here
CASES += [(ffn_cases, case) for case in FFN] + [(self_attention_cases, case) for case in ATTENTION]
cases = pytest.mark.parametrize(("op", "case"), CASES, ids=lambda x: str(x) if not hasattr(x, "run") else x.__name__)


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_fp64_is_at_most_twice_eager(op, case, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    """The same numbers in every dtype, and the same bits at every recompute level ("all" is "cheap" here)."""
    exact, eager = op.run(case, torch.float64, None), op.run(case, dtype, "eager")
    ours = [op.run(case, dtype, "triton", level) for level in ("nothing", "cheap")]
    assert_at_most_twice_eager(ours[0], eager, exact)
    assert all(torch.equal(ours[1][name], value) for name, value in ours[0].items())


@cases
@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_error_is_at_most_twice_eager(op, case, compute: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    exact = op.run(case, torch.float64, None)
    eager, ours = (op.run(case, torch.float32, name, autocast=compute) for name in ("eager", "triton"))
    assert_at_most_twice_eager(ours, eager, exact)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_kept_for_backward(level: str) -> None:
    """The adapter's hidden values, or the FFN's and the adapter's, in the compute dtype; or nothing."""

    def kept(op, case) -> int:  # type: ignore[no-untyped-def]
        seen: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            op.run(case, torch.bfloat16, "triton", level)
        return seen[-1].numel() * 4

    case = adapter_cases.Case()
    assert kept(adapter_cases, case) == (45 * case.adapter * 2 if level == "nothing" else 0)
    assert kept(ffn_cases, FFN[0]) == (21 * (64 + 16) * 2 if level == "nothing" else 0)


ADAPTER = ("down_weight", "down_bias", "up_weight", "up_bias")
SUBSETS = [("x",), ADAPTER, ("x", *ADAPTER), *((name,) for name in ADAPTER)]
FFN_SUBSETS = [("norm_weight", "norm_bias"), ("fc1_weight",), ("fc1_bias",), ("fc2_weight",), ("fc2_bias",)]


@pytest.mark.parametrize("level", ["nothing", "cheap"])
@pytest.mark.parametrize(
    ("op", "case", "subset"),
    [(adapter_cases, adapter_cases.CASES[2], subset) for subset in [*SUBSETS, ("residual",), ("x", "residual")]]
    + [(ffn_cases, FFN[0], subset) for subset in SUBSETS + FFN_SUBSETS],
    ids=str,
)
def test_wanted_gradients_do_not_depend_on_the_others(op, case, subset, level: str) -> None:  # type: ignore[no-untyped-def]
    full = op.run(case, torch.float32, "triton", level)
    got = op.run(case, torch.float32, "triton", level, wanted=subset)
    assert set(got) == {"y", *(f"grad.{name}" for name in subset)}
    for name, value in got.items():
        assert torch.equal(value, full[name]), name


def test_a_frozen_trunk_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter alone: no walk through the FFN. x and adapter: no gradient of LayerNorm's or the FFN's parameters."""
    seen: list[tuple[bool, ...]] = []
    true = triton_ffn._ffn_backward

    def watched(problem, n, h, grad, p, w, through, wanted):  # type: ignore[no-untyped-def]
        dn, grads = true(problem, n, h, grad, p, w, through, wanted)
        seen.append((through, dn is not None, *(g is not None for g in grads)))
        return dn, grads

    monkeypatch.setattr(triton_ffn, "_ffn_backward", watched)
    ffn_cases.run(FFN[0], torch.float32, "triton", wanted=ADAPTER)
    ffn_cases.run(FFN[0], torch.float32, "triton", wanted=("x", *ADAPTER))
    assert seen == [(False,) * 6, (True, True, False, False, False, False)]


def test_no_rows_and_strides() -> None:
    for case in (adapter_cases.Case(lead=(0,), skip=True), ffn_cases.Case(lead=(0, 3), dim=48, hidden=32, adapter=16)):
        op = adapter_cases if isinstance(case, adapter_cases.Case) else ffn_cases
        ours, eager = (op.run(case, torch.float32, name) for name in ("triton", "eager"))  # type: ignore[attr-defined]
        assert all(torch.equal(ours[name], value) for name, value in eager.items())
    case, wide, results = adapter_cases.Case(), torch.randn(15, 3, 96, requires_grad=True), []
    for name in ("triton", "eager"):
        x = wide.transpose(0, 1)[:, :, ::2]
        y = cast_kernels.adapter(x, case.parameters(), residual=x.flip(0), skip=True, backend=name)
        results.append((y, *torch.autograd.grad(y[1:, ::2].square().sum(), wide)))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "level", "grad"),
    [(torch.float32, "nothing", True), (torch.bfloat16, "cheap", True), (torch.float32, "cheap", False)],
    ids=str,
)
def test_opcheck(dtype: torch.dtype, level: str, grad: bool) -> None:
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    case = adapter_cases.Case(lead=(7,), skip=True, scaled=True)
    x, residual, p = case.stream("x", dtype, grad), case.stream("residual", dtype, grad), case.parameters(dtype, grad)
    kept = triton_adapter.saved_words(adapter_op.pose(x, p, residual, True, level)) if grad else 0
    arguments = (x, residual, list(p), case.row_scale(dtype), True, 0.5, level, dtype, kept, "triton")
    torch.library.opcheck(torch.ops.cast_kernels.adapter, arguments, **tolerance)
    wide = ffn_cases.Case(lead=(7,), dim=48, hidden=32, adapter=16, scaled=True)
    x, parameters = wide.x(dtype, grad), wide.parameters(dtype, grad)
    kept = triton_ffn.saved_words(ffn_op.pose(x, parameters, "gelu", level)) if grad else 0
    arguments = (x, list(parameters), wide.row_scale(dtype), "gelu", 1e-5, 0.5, level, dtype, kept, "triton")
    torch.library.opcheck(torch.ops.cast_kernels.ffn, arguments, **tolerance)


def test_compile_fullgraph_with_dynamic_rows() -> None:
    torch._dynamo.reset()
    parameters = adapter_cases.Case().parameters(grad=True)

    def call(x: Tensor, residual: Tensor) -> Tensor:
        return cast_kernels.adapter(x, parameters, residual=residual, skip=True, scale=0.5, backend="triton")

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        case = adapter_cases.Case(lead=(batch, 7))
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            got = compiled(case.stream("x", grad=True), case.stream("residual"))
        want = call(case.stream("x", grad=True), case.stream("residual"))
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(y.square().sum(), list(parameters)) for y in (got, want)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))


def test_flop_formula_equals_what_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for wanted in (*SUBSETS[:2], ("up_bias",), ("down_weight",), None):
        counts = []
        for name in ("triton", "eager"):
            with FlopCounterMode(display=False) as counter:
                adapter_cases.run(adapter_cases.CASES[1], torch.float32, name, wanted=wanted)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0, wanted


def test_the_fused_model_trains_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """CAST(fused=True) runs the experts' ops on this backend where it can, and gets what eager gets."""
    chosen: list[tuple[str, str]] = []
    true = backends.select

    def watched(backend: str, problem: backends.AnyProblem) -> str:
        name = true(backend, problem)
        chosen.append((type(problem).__name__, name))
        return name

    monkeypatch.setattr(backends, "select", watched)
    video, results = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)), []
    torch.manual_seed(1)
    weights = CAST("tiny", depth=2, num_frames=4, image_size=16, heads={"action": 5}).state_dict()
    weights = {name: torch.randn_like(t) * 0.05 + t for name, t in weights.items()}
    for fused in (True, False):
        chosen.clear()
        model = CAST("tiny", depth=2, num_frames=4, image_size=16, heads={"action": 5}, fused=fused)
        model.load_state_dict(weights)
        logits = model(video)["action"]
        logits.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((logits, grads))
        ran = {op for op, name in chosen if name == "triton"}
        assert ran == ({"FFNProblem", "SelfAttentionProblem"} if fused else set())
    (ours, our_grads), (eager, eager_grads) = results
    torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)
    for name, gradient in eager_grads.items():
        torch.testing.assert_close(our_grads[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
