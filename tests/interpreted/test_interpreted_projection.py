"""What backend `triton` has before attention, interpreted: PyTorch's transforms, compilers, edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ffn_cases
import pytest
import torch
from derivative_cases import CALLS
from self_attention_cases import Case, run
from torch import Tensor
from torch.func import grad, jvp, vmap

import cast_kernels
from cast_kernels import SelfAttentionParameters

CASE = Case(batch=2, tokens=19, dim=64, heads=4, adapter=32)
OPTIONS = {"num_heads": 4, "eps": 1e-5, "backend": "triton"}


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_gradients_in_func_and_per_sample() -> None:
    """The registered operator has one packed gradient, eager autograd's node three: the same but for rounding."""
    f, tensors = CALLS["self_attention"].loss("triton"), CALLS["self_attention"].tensors(torch.float32)
    xs = [x.clone().requires_grad_() for x in tensors]
    want = torch.autograd.grad(f(*xs), xs)
    for ours, theirs in zip(grad(f, tuple(range(len(xs))))(*tensors), want, strict=True):
        near(ours, theirs)
    rows = vmap(grad(lambda x: f(x, *tensors[1:])))(torch.stack((tensors[0], tensors[0] * 0.5)))
    near(rows[0], want[0])
    assert not torch.equal(rows[1], want[0])


@pytest.mark.parametrize("i", [0, 1, 3, -1], ids=["x", "norm_weight", "qkv_weight", "up_bias"])
def test_what_has_no_kernel_is_refused(i: int) -> None:
    f, tensors = CALLS["self_attention"].loss("triton"), CALLS["self_attention"].tensors(torch.float32)
    xs = [x.clone().requires_grad_() for x in tensors]
    first = torch.autograd.grad(f(*xs), xs, create_graph=True)[i]
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated twice(.|\n)*attention='math'"):
        first.square().sum().backward()
    for leaves in (xs, tensors):  # through eager's node, and through the operator
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative(.|\n)*attention='math'"):
            jvp(lambda x, leaves=leaves: f(x, *leaves[1:]), (leaves[0],), (leaves[0],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        f(torch.autograd.forward_ad.make_dual(xs[0], xs[0]), *xs[1:])


def test_compile_fullgraph_with_dynamic_batch() -> None:
    torch._dynamo.reset()
    parameters = SelfAttentionParameters(*(p.requires_grad_() for p in CASE.parameters() if p is not None))

    def call(x: Tensor) -> Tensor:
        return cast_kernels.self_attention(x, parameters, **OPTIONS)  # type: ignore[arg-type]

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        xs = [replace(CASE, batch=batch).x(grad=True) for _ in range(2)]
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            got = compiled(xs[0])
        want = call(xs[1])
        assert torch.equal(got, want)
        grads = [
            torch.autograd.grad(y, (x, *parameters), torch.ones_like(y)) for x, y in zip(xs, (got, want), strict=True)
        ]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(residual: bool) -> None:
    x, p = CASE.x().reshape(-1, 64), CASE.parameters()[:4]
    torch.library.opcheck(torch.ops.cast_kernels.projection, (x.clone().requires_grad_(), *p, 1e-5, torch.float32))
    grads = [torch.randn(x.shape[0], 64) for _ in range(3)]
    for wanted in ([True, False, True, True, False], [False, False, False, False, True]):
        arguments = (x, *p, grads, x.flip(0) if residual else None, 1e-5, wanted)
        torch.library.opcheck(torch.ops.cast_kernels.projection_backward, arguments)


def test_flop_formulas_equal_what_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for wanted in (("x",), ("x", "qkv_weight"), ("qkv_weight",), ("up_weight",)):
        counts = []
        for name in ("triton", "eager"):
            with FlopCounterMode(display=False) as counter:
                run(CASE, torch.float32, name, wanted=wanted)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0, wanted


def test_no_rows_strides_and_odd_offsets() -> None:
    ours, eager = (run(replace(CASE, batch=0), torch.float32, name) for name in ("triton", "eager"))
    assert all(torch.equal(ours[name], value) for name, value in eager.items())
    parameters = CASE.parameters()
    whole = torch.randn(3 * 19 * 2 * 64 + 1, requires_grad=True)
    x = whole[1:].view(19, 3, 128).transpose(0, 1)[:, :, ::2]  # no channel beside its neighbour, no line aligned
    results = []
    for name in ("triton", "eager"):
        y = cast_kernels.self_attention(x, parameters, num_heads=4, eps=1e-5, backend=name)
        results.append((y, *torch.autograd.grad(y[1:, ::2].square().sum(), whole)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_kept(value: float) -> None:
    """A token that overflowed spoils what attends to it, forward and backward, and no other entry of the batch."""
    x = CASE.x()
    x[0, 3, 5] = value
    x.requires_grad_()
    y = cast_kernels.self_attention(x, CASE.parameters(), **OPTIONS)  # type: ignore[arg-type]
    y.square().sum().backward()
    assert x.grad is not None
    assert y[0].isnan().all()
    assert x.grad[0].isnan().all()
    assert y[1].isfinite().all()
    assert x.grad[1].isfinite().all()


@pytest.mark.parametrize(
    ("run_op", "case"), [(run, CASE), (ffn_cases.run, ffn_cases.Case(lead=(9,), dim=48, hidden=64, adapter=16))]
)
def test_an_overflow_in_fp16_reaches_the_gradients(run_op: Any, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So GradScaler sees it and skips the step: a gradient above 65504, as a large loss scale makes it."""
    true = type(case).grad_y

    def grad_y(self: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        grad = true(self, dtype)
        grad.view(-1)[7] = 1e6
        return grad

    monkeypatch.setattr(type(case), "grad_y", grad_y)
    for name in ("eager", "triton"):
        found = run_op(case, torch.float32, name, autocast=torch.float16)
        assert not found["grad.up_weight"].isfinite().all(), name
        assert not found["grad.down_weight"].isfinite().all(), name
        assert not found["grad.x"].isfinite().all(), name
