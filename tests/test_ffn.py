"""The op `ffn`: mathematics, every backend against fp64, and the contract with PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from bcast_cases import assert_at_most_twice_eager
from ffn_cases import CASES, PAPER, Case, run

import cast_kernels
from cast_kernels import FFNParameters, Recompute, _native, backends
from cast_kernels.cpu import ffn as cpu_ffn
from cast_kernels.ops.ffn import pose

KERNELS = ["cpu"]
RECOMPUTE = [r.value for r in Recompute]
kernels = pytest.mark.parametrize("backend", KERNELS)
recomputes = pytest.mark.parametrize("recompute", RECOMPUTE)


# --- mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_equals_reference_in_fp64(case: Case) -> None:
    ours, exact = run(case, torch.float64, "eager"), run(case, torch.float64, None)
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        torch.testing.assert_close(ours[name], truth, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("activation", cast_kernels.ACTIVATIONS)
def test_reference_gradcheck(activation: str) -> None:
    case = Case(lead=(3,), dim=4, hidden=5, adapter=2, activation=activation, scaled=True)
    flat = [p for p in case.parameters(torch.float64, grad=True) if p is not None]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return cast_kernels.reference.ffn(
            x, FFNParameters(*parameters), activation=activation, eps=1e-5, row_scale=case.row_scale(torch.float64)
        )

    assert torch.autograd.gradcheck(call, (case.x(torch.float64, grad=True), *flat), fast_mode=True)


def test_the_reference_is_the_published_block() -> None:
    """CLIP's block as published: modules in sequence, the adapter on the same normalised rows at half its size."""
    case = Case(activation="quick_gelu")
    p = case.parameters(torch.float64)
    norm, first, second, down, up = (
        torch.nn.LayerNorm(33), torch.nn.Linear(33, 35), torch.nn.Linear(35, 33), torch.nn.Linear(33, 5),
        torch.nn.Linear(5, 33),
    )  # fmt: skip
    modules = torch.nn.ModuleList([norm, first, second, down, up]).double()
    with torch.no_grad():
        for parameter, value in zip(modules.parameters(), p, strict=True):
            parameter.copy_(value)
        x = case.x(torch.float64)
        hidden = first(norm(x))
        expected = x + second(hidden * torch.sigmoid(1.702 * hidden))
        expected = expected + 0.5 * up(torch.nn.GELU()(down(norm(x))))
    ours = cast_kernels.reference.ffn(x, p, activation="quick_gelu", eps=1e-5)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@kernels
@pytest.mark.parametrize("case", [*CASES, PAPER], ids=str)
def test_error_against_fp64_is_at_most_twice_eager(backend: str, case: Case) -> None:
    ours, eager, exact = (
        run(case, torch.float32, backend), run(case, torch.float32, "eager"), run(case, torch.float64, None)
    )  # fmt: skip
    assert_at_most_twice_eager(ours, eager, exact)


@kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_error_is_at_most_twice_eager(backend: str, case: Case) -> None:
    ours, eager, exact = (
        run(case, torch.bfloat16, backend), run(case, torch.bfloat16, "eager"), run(case, torch.float64, None)
    )  # fmt: skip
    assert_at_most_twice_eager(ours, eager, exact)


@pytest.mark.skipif(_native.ISA == "avx512_bf16", reason="dense products take bfloat16 operands on this processor")
@kernels
@recomputes
def test_bfloat16_is_float32_rounded_once(backend: str, recompute: str) -> None:
    """The cases' numbers are bfloat16 in every dtype, so both runs see the same."""
    case = Case(lead=(3, 31), scaled=True)
    narrow, wide = (run(case, dtype, backend, recompute) for dtype in (torch.bfloat16, torch.float32))
    for name, value in wide.items():
        assert torch.equal(narrow[name], value.to(torch.bfloat16).double()), name


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
def test_autocast_error_is_at_most_twice_eager(backend: str) -> None:
    case = Case(lead=(4, 31), dim=64, hidden=128, adapter=16, scaled=True)
    exact = run(case, torch.float64, None)
    explicit = run(case, torch.float32, "eager", autocast=torch.bfloat16)
    assert_at_most_twice_eager(run(case, torch.float32, backend, autocast=torch.bfloat16), explicit, exact)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_run_and_stay(dtype: torch.dtype, backend: str) -> None:
    case = Case()
    y = cast_kernels.ffn(case.x(dtype), case.parameters(dtype), eps=1e-5, backend=backend)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), run(case, torch.float64, None)["y"], atol=0.1, rtol=0.1)


# --- recompute, subsets, bits ----------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_recompute_changes_memory_and_not_one_bit(backend: str, case: Case) -> None:
    results, sizes = [], []
    for recompute in RECOMPUTE:
        seen: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=seen: s.append(t.numel()) or t, lambda t: t):
            results.append(run(case, torch.float32, backend, recompute))
        sizes.append(seen[-1])
    rows = math.prod(case.lead)
    assert sizes == [rows * (case.hidden + case.adapter + 2), rows * 2, rows * 2]
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


SUBSETS: dict[str, tuple[str, ...]] = {
    "x": ("x",),
    "norm": ("norm_weight", "norm_bias"),
    "norm_bias": ("norm_bias",),
    "frozen FFN": ("x", "norm_weight", "norm_bias", "down_weight", "down_bias", "up_weight", "up_bias"),
    "adapter": ("down_weight", "down_bias", "up_weight", "up_bias"),
    "FFN": ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
} | {name: (name,) for name in FFNParameters._fields[2:]}


@kernels
@pytest.mark.parametrize("recompute", ["nothing", "cheap"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_wanted_gradients_do_not_depend_on_the_others(backend: str, recompute: str, subset: str) -> None:
    case = Case(lead=(2, 1001), scaled=True)  # two groups of rows
    full = run(case, torch.float32, backend, recompute)
    got = run(case, torch.float32, backend, recompute, wanted=SUBSETS[subset])
    assert set(got) == {"y", *(f"grad.{name}" for name in SUBSETS[subset])}
    for name, value in got.items():
        assert torch.equal(value, full[name]), name


@kernels
@recomputes
def test_bits_do_not_depend_on_threads_or_runs(backend: str, recompute: str) -> None:
    case, threads = Case(lead=(333,), dim=64, hidden=400, adapter=20, scaled=True), torch.get_num_threads()
    try:
        results = []
        for count in (1, 1, 2, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(case, torch.float32, backend, recompute))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@kernels
def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    case = Case(lead=(97,), scaled=True)
    x, parameters, scale = case.x(), case.parameters(), case.row_scale()
    assert scale is not None
    together = cast_kernels.ffn(x, parameters, eps=1e-5, row_scale=scale, backend=backend)
    for i in (0, 5, 50, 96):
        alone = cast_kernels.ffn(x[i], parameters, eps=1e-5, row_scale=scale[i], backend=backend)
        assert torch.equal(alone, together[i])


@kernels
def test_nothing_is_kept_for_backward_without_grad(backend: str) -> None:
    case = Case()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t), torch.no_grad():
        cast_kernels.ffn(case.x(grad=True), case.parameters(grad=True), eps=1e-5, backend=backend)
    assert kept == []


@kernels
def test_bfloat16_keeps_the_originals(backend: str) -> None:
    """No float32 copy of the stream or of a weight waits for backward."""
    case, kept = Case(), []
    x, parameters = case.x(torch.bfloat16, grad=True), case.parameters(torch.bfloat16, grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cast_kernels.ffn(x, parameters, eps=1e-5, backend=backend, recompute="cheap")
    assert [t.dtype for t in kept] == [torch.bfloat16] * 11 + [torch.float32]
    assert kept[-1].shape == (7, 2)


@kernels
def test_gradients_reach_through_strides_views_and_unused_rows(backend: str) -> None:
    case = Case(lead=(4, 6))
    wide = torch.randn(6, 4, 66, requires_grad=True)
    results = []
    for name in (backend, "eager"):
        x = wide.transpose(0, 1)[:, :, ::2]
        y = cast_kernels.ffn(x, case.parameters(), eps=1e-5, backend=name)
        results.append((y, *torch.autograd.grad(y[1:, ::2].square().sum(), wide)))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (4, 1), (1, 6), (4, 6)])
def test_row_scale_broadcasts(backend: str, shape: tuple[int, ...]) -> None:
    case, scale = Case(lead=(4, 6)), torch.rand(shape)
    x, parameters = case.x(), case.parameters()
    got = cast_kernels.ffn(x, parameters, eps=1e-5, row_scale=scale, adapter_scale=0.7, backend=backend)
    want = cast_kernels.reference.ffn(x, parameters, eps=1e-5, row_scale=scale, adapter_scale=0.7)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
@pytest.mark.parametrize("lead", [(0,), (3, 0)])
def test_no_rows_give_no_output_and_zero_gradients(backend: str, lead: tuple[int, ...]) -> None:
    results = run(Case(lead=lead, scaled=True), torch.float32, backend)
    assert results["y"].shape == (*lead, 33)
    assert len(results) == 12
    assert not any(value.any() for value in results.values())


@kernels
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("activation", cast_kernels.ACTIVATIONS)
def test_not_a_number_stays_in_its_row(backend: str, value: float, activation: str) -> None:
    case = Case(lead=(13,), activation=activation)
    x, parameters = case.x(), case.parameters()
    x[5, 3] = value
    y = cast_kernels.ffn(x, parameters, activation=activation, eps=1e-5, backend=backend)
    assert y[5].isnan().all()
    assert not y[torch.arange(13) != 5].isnan().any()


@kernels
@pytest.mark.parametrize("activation", cast_kernels.ACTIVATIONS)
def test_extreme_hidden_values(backend: str, activation: str) -> None:
    """Far tails of both activations and of their slopes, where exponentials overflow or vanish."""
    values = torch.tensor([-1e15, -1e4, -200.0, -90.0, -51.0, -10.0, -1e-20, 0.0, 1e-20, 10.0, 60.0, 200.0, 1e4])
    n = len(values)
    tensors = [torch.zeros(2), torch.ones(2), torch.zeros(n, 2), values, torch.eye(2, n), torch.zeros(2)]
    results = []
    for name in (backend, "reference"):
        dtype = torch.float64 if name == "reference" else torch.float32
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        leaves[4] = torch.stack([torch.ones(n), torch.zeros(n)]).to(dtype)
        x, p = torch.zeros(1, 2, dtype=dtype), FFNParameters(*leaves)
        arguments = {"activation": activation, "eps": 1e-5}
        call = cast_kernels.reference.ffn if name == "reference" else cast_kernels.ffn
        y = call(x, p, **arguments, **({} if name == "reference" else {"backend": name}))
        results.append(torch.autograd.grad(y[0, 0], leaves[3])[0].double())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-20)  # below that, only that it vanishes


# --- the contract with PyTorch ---------------------------------------------------------------------------------------


def operator_arguments(case: Case, backend: str, grad: bool, recompute: str, dtype: torch.dtype) -> tuple[object, ...]:
    x = case.x(dtype, grad)
    flat = [torch.empty(0, dtype=dtype) if p is None else p for p in case.parameters(dtype, grad)]
    kept = cpu_ffn.saved_words(pose(x, case.parameters(dtype), case.activation, recompute)) if grad else 0
    return (
        x,
        flat,
        case.row_scale(dtype),
        case.activation,
        1e-5,
        0.5,
        recompute,
        dtype,
        kept,
        backend,
    )


@kernels
@pytest.mark.parametrize("case", [Case(), Case(scaled=True, activation="quick_gelu"), Case(adapter=0)], ids=str)
@pytest.mark.parametrize(("grad", "recompute"), [(False, "cheap"), (True, "cheap"), (True, "nothing")])
def test_opcheck(backend: str, case: Case, grad: bool, recompute: str) -> None:
    arguments = operator_arguments(case, backend, grad, recompute, torch.float32)
    torch.library.opcheck(torch.ops.cast_kernels.ffn, arguments, atol=1e-5, rtol=1e-4)


@kernels
def test_opcheck_bfloat16(backend: str) -> None:
    arguments = operator_arguments(Case(scaled=True), backend, True, "cheap", torch.bfloat16)
    torch.library.opcheck(torch.ops.cast_kernels.ffn, arguments, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("backend", ["auto", "eager", *KERNELS])
def test_compile_fullgraph_with_dynamic_rows(backend: str) -> None:
    torch._dynamo.reset()
    parameters = Case().parameters(grad=True)

    def call(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return cast_kernels.ffn(x, parameters, eps=1e-5, row_scale=scale, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        case = Case(lead=(batch, 7))
        scale = torch.rand(batch, 1)
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            got = compiled(case.x(grad=True), scale)
        want = call(case.x(grad=True), scale)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        grads = [torch.autograd.grad(y.square().sum(), list(parameters)) for y in (got, want)]
        for ours, eager in zip(*grads, strict=True):
            torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-3)


@kernels
@pytest.mark.parametrize("case", [Case(), Case(adapter=0)], ids=str)
def test_flop_formulas_equal_what_pytorch_counts(backend: str, case: Case) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for wanted in [*SUBSETS.values(), None]:
        if case.adapter == 0 and wanted is not None and not set(wanted) & set(FFNParameters._fields[:6]):
            continue
        counts = []
        for name in (backend, "eager"):
            with FlopCounterMode(display=False) as counter:
                run(case, torch.float32, name, wanted=wanted)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0, wanted


# --- selection and bad input -----------------------------------------------------------------------------------------


def test_explain_names_every_backend_and_the_choice() -> None:
    text = backends.explain("auto", pose(Case().x(), Case().parameters()))
    assert "FFNProblem" in text
    assert all(name in text for name in backends.BACKENDS)
    assert f"runs: {'cpu' if _native.CORE is not None else 'eager'}" in text
    assert "runs: eager" in backends.explain("auto", pose(Case().x(torch.float64), Case().parameters(torch.float64)))


@kernels
def test_a_backend_that_cannot_run_says_why(backend: str) -> None:
    case = Case()
    with pytest.raises(cast_kernels.BackendError, match=r"float64.*float32 and torch\.bfloat16"):
        cast_kernels.ffn(case.x(torch.float64), case.parameters(torch.float64), eps=1e-5, backend=backend)


def spoiled(**changes: object) -> dict[str, object]:
    """Arguments of a good call, with changes; names of parameters change a parameter."""
    case = Case()
    arguments: dict[str, object] = {"x": case.x(), "parameters": case.parameters(), "eps": 1e-5}
    fields = {name: changes.pop(name) for name in list(changes) if name in FFNParameters._fields}
    arguments["parameters"] = case.parameters()._replace(**fields)
    return arguments | changes


BAD_CALLS = {
    "scalar": (lambda: spoiled(x=torch.tensor(1.0)), ValueError, r"x has shape \(\); it must be \[..., D\]"),
    "dim": (lambda: spoiled(x=torch.ones(2, 32)), ValueError, r"fc1_weight has shape \(35, 33\).*\(35, 32\)"),
    "fc1": (lambda: spoiled(fc1_weight=torch.ones(35)), ValueError, r"fc1_weight is of shape \(35,\); it must be"),
    "fc2": (lambda: spoiled(fc2_weight=torch.ones(35, 33)), ValueError, r"fc2_weight has shape.*must be \(33, 35\)"),
    "half adapter": (lambda: spoiled(up_bias=None, up_weight=None), ValueError, "up_weight and up_bias missing"),
    "no norm": (lambda: spoiled(norm_weight=None), ValueError, r"norm_weight is missing.*\(33,\)"),
    "mixed dtypes": (lambda: spoiled(x=Case().x(torch.bfloat16)), TypeError, "dtypes are mixed: x torch.bfloat16"),
    "integers": (lambda: spoiled(x=Case().x().int()), TypeError, "must be floating point"),
    "devices": (lambda: spoiled(x=Case().x().to("meta")), ValueError, "tensors lie on cpu and meta"),
    "array": (lambda: spoiled(x=Case().x().numpy()), TypeError, "x is a numpy.ndarray; .*torch.from_numpy makes one"),
    "weight array": (
        lambda: spoiled(fc1_weight=torch.ones(35, 33).numpy()),
        TypeError,
        "fc1_weight is a numpy.ndarray",
    ),
    "weight list": (lambda: spoiled(norm_bias=[0.0] * 33), TypeError, "norm_bias is a list; it must be a torch.Tensor"),
    "scale number": (lambda: spoiled(row_scale=0.5), TypeError, "row_scale is a float; it must be a torch.Tensor"),
    "activation": (lambda: spoiled(activation="relu"), ValueError, "'relu'; allowed: 'gelu', 'quick_gelu'"),
    "recompute": (lambda: spoiled(recompute="some"), ValueError, "'some'; allowed: 'auto', 'nothing', 'cheap', 'all'"),
    "backend": (lambda: spoiled(backend="gpu"), ValueError, "allowed: 'auto', 'triton', 'cuda', 'cpu', 'eager'"),
    "scale shape": (lambda: spoiled(row_scale=torch.ones(3)), ValueError, r"row_scale has shape \(3,\).*\(7,\)"),
    "scale rank": (lambda: spoiled(row_scale=torch.ones(7, 1)), ValueError, r"row_scale has shape \(7, 1\)"),
    "scale dtype": (lambda: spoiled(row_scale=torch.ones(7).int()), TypeError, "row_scale is torch.int32"),
    "scale device": (lambda: spoiled(row_scale=torch.ones(7, device="meta")), ValueError, "row_scale lies on meta"),
    "scale grad": (lambda: spoiled(row_scale=torch.ones(7, requires_grad=True)), ValueError, "factors are constants"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_came_and_what_is_allowed(name: str) -> None:
    make, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        cast_kernels.ffn(**make())
