"""The op `self_attention`: mathematics, every backend against fp64, and the contract with PyTorch."""

from __future__ import annotations

import pytest
import torch
from bcast_cases import assert_at_most_twice_eager
from self_attention_cases import CASES, PAPER, Case, run

import cast_kernels
from cast_kernels import SelfAttentionParameters, _native
from cast_kernels.cpu import self_attention as cpu

KERNELS = ["cpu"]
RECOMPUTE = [r.value for r in cast_kernels.Recompute]
kernels = pytest.mark.parametrize("backend", KERNELS)


# --- mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_equals_reference_in_fp64(case: Case) -> None:
    ours, exact = run(case, torch.float64, "eager"), run(case, torch.float64, None)
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        torch.testing.assert_close(ours[name], truth, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("adapter", [0, 3])
def test_reference_gradcheck(adapter: int) -> None:
    case = Case(batch=2, tokens=3, dim=6, heads=2, adapter=adapter)
    flat = [p.requires_grad_() for p in case.parameters(torch.float64) if p is not None]

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return cast_kernels.reference.self_attention(x, SelfAttentionParameters(*parameters), num_heads=2, eps=1e-5)

    assert torch.autograd.gradcheck(call, (case.x(torch.float64, grad=True), *flat), fast_mode=True)


def test_reference_is_what_pytorchs_modules_make_of_it() -> None:
    case = Case()
    attention = torch.nn.MultiheadAttention(40, 5, batch_first=True)
    p = case.parameters()
    attention.load_state_dict(
        {"in_proj_weight": p.qkv_weight, "in_proj_bias": p.qkv_bias, "out_proj.weight": p.proj_weight,
         "out_proj.bias": p.proj_bias}
    )  # fmt: skip
    x = case.x()
    normed = torch.nn.functional.layer_norm(x, (40,), p.norm_weight, p.norm_bias, 1e-5)
    attended = attention(normed, normed, normed, need_weights=False)[0]
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(attended, p.down_weight, p.down_bias))
    want = x + attended + torch.nn.functional.linear(hidden, p.up_weight, p.up_bias)
    torch.testing.assert_close(cast_kernels.reference.self_attention(x, p, num_heads=5, eps=1e-5), want)


@kernels
@pytest.mark.parametrize("case", [*CASES, PAPER], ids=str)
def test_error_against_fp64_is_at_most_twice_eager(backend: str, case: Case) -> None:
    ours, eager, exact = (
        run(case, torch.float32, backend),
        run(case, torch.float32, "eager"),
        run(case, torch.float64, None),
    )
    if case.tokens == 1:  # a softmax over one key passes no gradient to queries and keys
        for name in ("grad.qkv_weight", "grad.qkv_bias"):
            assert not ours[name][: 2 * case.dim].any(), name
    assert_at_most_twice_eager(ours, eager, exact)


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
@pytest.mark.parametrize("case", [Case(seed=40), Case(batch=2, tokens=197, dim=64, heads=1, seed=41)], ids=str)
def test_bfloat16_error_is_at_most_twice_eager(backend: str, case: Case) -> None:
    exact = run(case, torch.float64, None)
    ours, eager = run(case, torch.bfloat16, backend), run(case, torch.bfloat16, "eager")
    assert_at_most_twice_eager(ours, eager, exact)


@pytest.mark.skipif(_native.ISA == "avx512_bf16", reason="dense products take bfloat16 operands on this processor")
@kernels
def test_bfloat16_is_computed_in_float32_and_rounded_once(backend: str) -> None:
    case = Case()
    ours, full = run(case, torch.bfloat16, backend), run(case, torch.float32, backend)
    for name, value in full.items():
        assert torch.equal(ours[name], value.to(torch.bfloat16).double()), name


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
def test_autocast_error_is_at_most_twice_eager(backend: str) -> None:
    case = Case(dim=64, heads=2)
    exact = run(case, torch.float64, None)
    explicit, ours = (
        run(case, torch.float32, None, autocast=torch.bfloat16),
        run(case, torch.float32, backend, autocast=torch.bfloat16),
    )
    assert_at_most_twice_eager(ours, explicit, exact)
    if backend != "eager" and _native.ISA != "avx512_bf16":  # there dense products take bfloat16 operands
        assert all(torch.equal(x, ours[name]) for name, x in run(case, torch.float32, backend).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_run_and_stay(dtype: torch.dtype) -> None:
    case = Case()
    y = cast_kernels.self_attention(case.x(dtype), case.parameters(dtype), num_heads=5, eps=1e-5)
    assert y.dtype == dtype
    exact = cast_kernels.reference.self_attention(
        case.x(torch.float64), case.parameters(torch.float64), num_heads=5, eps=1e-5
    )
    torch.testing.assert_close(y.double(), exact, atol=0.15, rtol=0.1)


@kernels
def test_entries_attend_to_themselves_only(backend: str) -> None:
    case = Case(batch=3)
    x = case.x()
    other = x.clone()
    other[1] += 1.0
    y, z = (
        cast_kernels.self_attention(t, case.parameters(), num_heads=5, eps=1e-5, backend=backend) for t in (x, other)
    )
    assert torch.equal(y[0], z[0])
    assert torch.equal(y[2], z[2])
    assert not torch.equal(y[1], z[1])


# --- determinism -----------------------------------------------------------------------------------------------------

BITS = [CASES[0], CASES[5], CASES[8], CASES[9], Case(batch=1, tokens=700, dim=32, heads=2, seed=60)]


@kernels
@pytest.mark.parametrize("case", BITS, ids=str)
def test_thread_count_and_recompute_do_not_change_a_bit(backend: str, case: Case) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count, recompute in ((1, "nothing"), (1, "cheap"), (1, "all"), (2, "cheap"), (3, "all"), (7, "nothing")):
            torch.set_num_threads(count)
            results.append(run(case, torch.float32, backend, recompute))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@kernels
def test_twenty_runs_give_the_same_bits(backend: str) -> None:
    case = Case(batch=4, tokens=150, dim=64, heads=4)
    first = run(case, torch.float32, backend)
    for _ in range(19):
        again = run(case, torch.float32, backend)
        assert all(torch.equal(again[name], value) for name, value in first.items())


WANTED = [
    ("x",), ("norm_weight",), ("norm_bias",), ("qkv_weight",), ("qkv_bias",), ("proj_weight",), ("proj_bias",),
    ("down_weight",), ("down_bias",), ("up_weight",), ("up_bias",), ("x", "down_weight", "up_bias"),
    ("down_weight", "down_bias", "up_weight", "up_bias"),
]  # fmt: skip


@kernels
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
def test_subsets_get_the_same_gradients(backend: str, recompute: str, wanted: tuple[str, ...]) -> None:
    for case in (Case(seed=70), Case(adapter=0, qkv_bias=True, seed=71)):
        names = [n for n in wanted if n == "x" or getattr(case.parameters(), n) is not None]
        if not names:
            continue
        full = run(case, torch.float32, backend)
        got = run(case, torch.float32, backend, recompute, wanted=tuple(names))
        assert set(got) == {"y", *(f"grad.{n}" for n in names)}
        for name, value in got.items():
            assert torch.equal(value, full[name]), name


# --- the contract with PyTorch ---------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("case", [Case(), Case(adapter=0, qkv_bias=False)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_opcheck(backend: str, case: Case, grad: bool, recompute: str) -> None:
    flat = [torch.empty(0) if p is None else p.requires_grad_(grad) for p in case.parameters()]
    kept = cpu.saved_words(case.problem(recompute)) if grad else 0
    arguments = (case.x(grad=grad), flat, case.heads, 1e-5, recompute, torch.float32, kept, backend)
    torch.library.opcheck(torch.ops.cast_kernels.self_attention, arguments, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
def test_compile_fullgraph_with_dynamic_batch(backend: str) -> None:
    torch._dynamo.reset()
    case = Case()
    parameters = case.parameters()

    def call(x: torch.Tensor) -> torch.Tensor:
        return cast_kernels.self_attention(x, parameters, num_heads=5, eps=1e-5, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        inputs, same = (Case(batch=batch).x(grad=True) for _ in range(2))
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            got = compiled(inputs)
        want = call(same)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        got.backward(got)
        want.backward(want)
        torch.testing.assert_close(inputs.grad, same.grad, atol=1e-4, rtol=1e-3)


@kernels
def test_non_contiguous_and_expanded_inputs(backend: str) -> None:
    case = Case()

    def call(x: torch.Tensor) -> torch.Tensor:
        return cast_kernels.self_attention(x, case.parameters(), num_heads=5, eps=1e-5, backend=backend)

    x = case.x()
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert torch.equal(call(strided), call(x))
    one = x[:1].expand(3, -1, -1).detach().requires_grad_()
    y = call(one)
    y.sum().backward()  # hands autograd an expanded gradient with stride 0
    assert torch.equal(y[0], y[2])
    assert torch.equal(one.grad[0], one.grad[2])
    assert float(one.grad.abs().max()) > 0


@pytest.mark.parametrize("backend", ["eager", *KERNELS])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_zero_size_batch(backend: str, recompute: str) -> None:
    got = run(Case(batch=0), torch.float32, backend, recompute)
    assert got["y"].shape == (0, 19, 40)
    assert all(float(g.abs().sum()) == 0 for g in got.values())
    assert len(got) == 12


@kernels
def test_nothing_is_kept_for_backward_without_grad(backend: str) -> None:
    kept: list[torch.Size] = []
    case = Case()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                cast_kernels.self_attention(
                    case.x(grad=True), case.parameters(), num_heads=5, eps=1e-5, backend=backend
                )
            assert bool(kept) == grad


@kernels
def test_flop_formula_equals_what_pytorch_counts(backend: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for case in CASES:
        counts = []
        for name in (backend, "eager"):
            x, parameters = (
                case.x().to("meta"),
                SelfAttentionParameters(*(p if p is None else p.to("meta") for p in case.parameters())),
            )
            with FlopCounterMode(display=False) as counter:
                cast_kernels.self_attention(x, parameters, num_heads=case.heads, eps=1e-5, backend=name)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0, case


# --- bad input -------------------------------------------------------------------------------------------------------


def changed(**fields: torch.Tensor | None) -> SelfAttentionParameters:
    return Case().parameters()._replace(**fields)  # type: ignore[arg-type]


BAD_CALLS = {
    "rank": (lambda: (torch.ones(2, 3, 4, 40), changed()), {}, ValueError, r"\(2, 3, 4, 40\).*\[batch, tokens, D\]"),
    "rank beside dims": (
        lambda: (torch.ones(2, 3, 40), changed()),
        {"dims": (2, 1)},
        ValueError,
        r"\(2, 3, 40\).*dims=\(2, 1\) of 4 dimensions: 2 for batch, 1 for tokens",
    ),
    "no tokens in dims": (
        lambda: (torch.ones(2, 3, 40), changed()),
        {"dims": (2, 0)},
        ValueError,
        r"dims is \(2, 0\); it must be two numbers from 1 on",
    ),
    "no tokens": (lambda: (torch.ones(2, 0, 40), changed()), {}, ValueError, "at least one token"),
    "heads": (lambda: (Case().x(), changed()), {"num_heads": 7}, ValueError, "num_heads is 7; it must divide.*40"),
    "recompute": (lambda: (Case().x(), changed()), {"recompute": "some"}, ValueError, "'nothing', 'cheap', 'all'"),
    "backend": (
        lambda: (Case().x(), changed()),
        {"backend": "gpu"},
        ValueError,
        "allowed: 'auto', 'triton', 'cuda', 'cpu', 'eager'",
    ),
    "qkv shape": (
        lambda: (Case().x(), changed(qkv_weight=torch.ones(40, 40))),
        {},
        ValueError,
        r"qkv_weight has shape \(40, 40\).*\(120, 40\)",
    ),
    "qkv bias": (lambda: (Case().x(), changed(qkv_bias=torch.ones(40))), {}, ValueError, r"qkv_bias.*\(120,\)"),
    "half an adapter": (lambda: (Case().x(), changed(up_bias=None)), {}, ValueError, "up_bias missing; give all four"),
    "adapter shape": (
        lambda: (Case().x(), changed(up_weight=torch.ones(40, 5))),
        {},
        ValueError,
        r"up_weight has shape \(40, 5\).*\(40, 27\)",
    ),
    "mixed dtypes": (lambda: (Case().x(torch.float64), changed()), {}, TypeError, "dtypes are mixed: x torch.float64"),
    "integers": (lambda: (torch.ones(2, 3, 40).int(), changed()), {}, TypeError, "must be floating point"),
    "array": (lambda: (Case().x().numpy(), changed()), {}, TypeError, "x is a numpy.ndarray; .*torch.from_numpy"),
    "weight array": (
        lambda: (Case().x(), changed(qkv_bias=torch.ones(120).numpy())),
        {},
        TypeError,
        "qkv_bias is a numpy.ndarray; it must be a torch.Tensor",
    ),
    "weights in a dictionary": (
        lambda: (Case().x(), changed()._asdict()),
        {},
        TypeError,
        "parameters is a dict; it must be a cast_kernels.SelfAttentionParameters",
    ),
    "devices": (lambda: (Case().x().to("meta"), changed()), {}, ValueError, "tensors lie on cpu and meta"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_came_and_what_is_allowed(name: str) -> None:
    make, options, error, message = BAD_CALLS[name]
    x, parameters = make()
    with pytest.raises(error, match=message):
        cast_kernels.self_attention(x, parameters, **({"num_heads": 5, "eps": 1e-5} | options))


@kernels
def test_a_backend_that_cannot_run_says_why(backend: str) -> None:
    case = Case()
    with pytest.raises(cast_kernels.BackendError, match="float64"):
        cast_kernels.self_attention(
            case.x(torch.float64), case.parameters(torch.float64), num_heads=5, eps=1e-5, backend=backend
        )
