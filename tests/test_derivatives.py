"""What PyTorch's transforms make of the ops: right, or refused in words, and the remedy that the words name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cast_models import randomise
from derivative_cases import CALLS, KERNELS
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cast_kernels
from cast import CAST, SpatialExpert, TemporalExpert
from cast.baselines import Design, SingleExpert, TwoStream
from cast.model.config import make_config
from cast.pretrain.model import VideoMAE

kernels = pytest.mark.parametrize(("backend", "op"), KERNELS)
REMEDY = re.compile(r"fused=False, attention='math'.*unfuse\(attention='math'\).*backend='eager'")
TINY = {"variant": "tiny", "depth": 1, "image_size": 16, "num_frames": 4, "embed_dim": 8, "num_heads": 2}


def leaves(op: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in CALLS[op].tensors(dtype)]


def refused(what: str) -> Any:
    return pytest.raises(NotImplementedError, match=f"{what}(.|\n)*{REMEDY.pattern}")


# --- refused ---------------------------------------------------------------------------------------------------------

TWICE: dict[str, Callable[[Callable[..., Tensor], list[Tensor]], object]] = {
    "a gradient penalty": lambda f, xs: torch.autograd.grad(f(*xs), xs, create_graph=True)[0].square().sum().backward(),
    "a weight's gradient": lambda f, xs: torch.autograd.grad(
        torch.autograd.grad(f(*xs), xs[-1], create_graph=True)[0].square().sum(), xs[0]
    ),
    "hessian": lambda f, xs: torch.autograd.functional.hessian(lambda x: f(x, *xs[1:]), xs[0]),
    "hvp": lambda f, xs: torch.autograd.functional.hvp(lambda x: f(x, *xs[1:]), xs[0], torch.ones_like(xs[0])),
    "functional.jvp": lambda f, xs: torch.autograd.functional.jvp(
        lambda x: f(x, *xs[1:]), xs[0], torch.ones_like(xs[0])
    ),
    "grad of grad": lambda f, xs: grad(lambda x: grad(f)(x, *xs[1:]).square().sum())(xs[0]),
    "jacrev of grad": lambda f, xs: jacrev(grad(f))(*(x.detach() for x in xs)),
}


@kernels
@pytest.mark.parametrize("way", TWICE)
def test_a_second_derivative_is_refused(backend: str, op: str, way: str) -> None:
    with refused(f"cast_kernels::{op} cannot be differentiated twice"):
        TWICE[way](CALLS[op].loss(backend), leaves(op))


def _dual(f: Callable[..., Tensor], xs: list[Tensor]) -> object:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(xs[0], torch.ones_like(xs[0])), *xs[1:])).tangent


FORWARD: dict[str, Callable[[Callable[..., Tensor], list[Tensor]], object]] = {
    "jvp": lambda f, xs: jvp(lambda x: f(x, *xs[1:]), (xs[0],), (torch.ones_like(xs[0]),)),
    "jvp of a weight": lambda f, xs: jvp(lambda w: f(*xs[:-1], w), (xs[-1],), (torch.ones_like(xs[-1]),)),
    "jacfwd": lambda f, xs: jacfwd(lambda x: f(x, *xs[1:]))(xs[0]),
    "hessian": lambda f, xs: hessian(lambda x: f(x, *xs[1:]))(xs[0]),
    "linearize": lambda f, xs: linearize(lambda x: f(x, *xs[1:]), xs[0]),
    "dual": _dual,
    "dual without grad": lambda f, xs: torch.no_grad()(_dual)(f, xs),
    "dual in a backward": lambda f, xs: _dual(lambda x, *rest: vjp(lambda w: f(x, *rest[:-1], w), rest[-1])[0], xs),
}


@kernels
@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("trains", [False, True], ids=["constants", "leaves"])
def test_forward_mode_is_refused(backend: str, op: str, way: str, trains: bool) -> None:
    with refused(f"cast_kernels::{op} has no forward-mode derivative"):
        FORWARD[way](CALLS[op].loss(backend), leaves(op) if trains else CALLS[op].tensors(torch.float32))


@kernels
def test_a_tangent_of_the_gradient_alone_is_refused(backend: str, op: str) -> None:
    """Forward over reverse where the op itself saw no tangent: the backward operator must not drop it."""
    xs = leaves(op)
    outputs = CALLS[op].function(backend)(*xs)
    with forward_ad.dual_level(), refused(f"cast_kernels::{op} has no forward-mode derivative"):
        torch.autograd.grad(outputs, xs, [forward_ad.make_dual(torch.ones_like(y), y.detach()) for y in outputs])


@kernels
def test_gradients_in_batches_are_refused(backend: str, op: str) -> None:
    xs = leaves(op)
    y = CALLS[op].function(backend)(*xs)[0]
    with pytest.raises(NotImplementedError, match=f"cast_kernels::{op} has no rule.*is_grads_batched.*Use torch.func"):
        torch.autograd.grad(y, xs, torch.ones(2, *y.shape), is_grads_batched=True)


def test_compiled_calls_refuse_too() -> None:
    """A compiler's graph holds the operator: neither zeros nor silence there."""
    f, xs = CALLS["ffn"].loss("cpu"), leaves("ffn")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="has no forward-mode derivative"):
        torch.compile(FORWARD["jvp"])(f, CALLS["ffn"].tensors(torch.float32))
    first = torch.autograd.grad(torch.compile(f)(*xs), xs, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):  # PyTorch's own words
        first.square().sum().backward()


# --- right -----------------------------------------------------------------------------------------------------------


@kernels
def test_a_graph_that_is_not_differentiated_costs_nothing(backend: str, op: str) -> None:
    xs = leaves(op)
    for make in (False, True):
        found = torch.autograd.grad(CALLS[op].loss(backend)(*xs), xs, create_graph=make)
        assert [x.requires_grad for x in found] == [make] * len(xs)
        want = found if not make else want  # noqa: F821
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@kernels
def test_func_gives_autograds_gradients(backend: str, op: str) -> None:
    f, xs = CALLS[op].loss(backend), leaves(op)
    want = torch.autograd.grad(f(*xs), xs)
    everything = tuple(range(len(xs)))
    plain = [x.detach() for x in xs]
    assert all(torch.equal(x, y) for x, y in zip(grad(f, everything)(*plain), want, strict=True))
    with torch.no_grad():
        assert torch.equal(grad(f)(*plain), want[0])
    value, pull = vjp(f, *plain)
    assert all(torch.equal(x, y) for x, y in zip(pull(torch.ones_like(value)), want, strict=True))
    # What the function captures belongs to autograd outside: a value is differentiated there, a gradient refused.
    inner, value = grad_and_value(lambda x: f(x, *xs[1:]))(plain[0])
    assert torch.equal(inner, want[0])
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(value, xs[1:]), want[1:], strict=True))
    inner = grad(lambda x: f(x, *xs[1:]))(plain[0])
    with refused(f"cast_kernels::{op} cannot be differentiated twice"):
        inner.square().sum().backward()


@kernels
def test_jacrev_gives_every_row(backend: str, op: str) -> None:
    call, xs = CALLS[op].function(backend), leaves(op)
    y = call(*xs)[0]
    rows = [torch.autograd.grad(value, xs[-2], retain_graph=True)[0] for value in y.flatten()]
    plain = [x.detach() for x in xs]
    found = jacrev(lambda w: call(*plain[:-2], w, plain[-1])[0])(plain[-2])
    assert torch.equal(found.flatten(0, y.ndim - 1), torch.stack(rows))


@kernels
def test_vmap_is_a_loop(backend: str, op: str) -> None:
    """Over streams, over weights, over both; of values and of gradients; autograd outside sees through it."""
    call, loss, tensors = CALLS[op].function(backend), CALLS[op].loss(backend), CALLS[op].tensors(torch.float32)
    stacked = [torch.stack((x, x.flip(0) * 0.5 + 1), dim=x.ndim).requires_grad_() for x in tensors]
    for mapped in (range(CALLS[op].streams), [len(tensors) - 2], range(len(tensors))):
        xs = [stacked[i] if i in mapped else x for i, x in enumerate(tensors)]
        dims = tuple(-1 if i in mapped else None for i in range(len(xs)))
        each = [[x.select(-1, k) if i in mapped else x for i, x in enumerate(xs)] for k in (0, 1)]
        want = [torch.stack(ys) for ys in zip(*(call(*own) for own in each), strict=True)]
        got = vmap(call, dims)(*xs)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        through = [torch.autograd.grad([y.square().sum() for y in ys], stacked[mapped[0]])[0] for ys in (got, want)]
        torch.testing.assert_close(*through)
        per_sample = vmap(grad(loss, mapped[-1]), dims)(*xs)
        for k, own in enumerate(each):
            assert torch.equal(per_sample[k], grad(loss, mapped[-1])(*own))
        whole = grad(lambda *inner, dims=dims: vmap(loss, dims)(*inner).sum(), mapped[-1])(*xs)
        torch.testing.assert_close(whole, torch.stack(list(per_sample), -1))


def test_vmap_over_nothing_says_so() -> None:
    xs = CALLS["bcast"].tensors(torch.float32)
    with pytest.raises(ValueError, match="vmap over a dimension of size 0"):
        vmap(lambda x: CALLS["bcast"].function("cpu")(x, *xs[1:]))(xs[0].new_empty(0, *xs[0].shape))


@pytest.mark.parametrize("reentrant", [False, True])
@kernels
def test_checkpointing_changes_no_bit(backend: str, op: str, reentrant: bool) -> None:
    f = CALLS[op].loss(backend)
    once, again = leaves(op), leaves(op)
    f(*once).backward()
    checkpoint(f, *again, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(once, again, strict=True))


def test_a_compiled_func_grad_is_right() -> None:
    torch._dynamo.reset()
    f, xs = CALLS["ffn"].loss("cpu"), CALLS["ffn"].tensors(torch.float32)
    torch.testing.assert_close(torch.compile(grad(f))(*xs), grad(f)(*xs))


# --- gradients that nobody gave --------------------------------------------------------------------------------------


class _Made(TorchDispatchMode):
    """Shapes of all tensors that operators without a tensor argument make: `zeros` and its like."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "zeros" in func.__name__ or "empty" in func.__name__:
            self.shapes.append(tuple(out.shape))
        return out


@kernels
def test_backward_makes_no_gradient_for_what_it_keeps(backend: str, op: str) -> None:
    xs, kept = leaves(op), []
    known = {x.data_ptr() for x in xs}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (x.data_ptr() in known or kept.append(tuple(x.shape)), x)[1], lambda x: x
    ):
        outputs = CALLS[op].function(backend)(*xs)
    saved = kept[-1]
    assert saved not in {tuple(x.shape) for x in xs}
    gradients = [torch.ones_like(y) for y in outputs]
    with _Made() as made:
        torch.autograd.backward(outputs, gradients)
    assert saved not in made.shapes


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_nobody_used_has_a_gradient_of_zero(used: int) -> None:
    call, xs = CALLS["bcast"].function("cpu"), leaves("bcast")
    gradients = [torch.autograd.grad(call(*xs)[used].square().sum(), xs)]
    outputs = call(*xs)
    gradients += [torch.autograd.grad([outputs[used].square().sum(), outputs[1 - used].sum() * 0], xs)]
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))
    assert float(gradients[0][0].abs().max()) > 0


@kernels
def test_no_gradient_at_all_gives_none(backend: str, op: str) -> None:
    """A function behind the op may answer None for all of its outputs."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *ys: Tensor) -> Tensor:
            return sum(y.sum() for y in ys)  # type: ignore[return-value]

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
            return (None,) * len(ctx.needs_input_grad)

    xs = leaves(op)
    found = torch.autograd.grad(Nothing.apply(*CALLS[op].function(backend)(*xs)), xs, allow_unused=True)
    assert found == (None,) * len(xs)


# --- the remedy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CALLS)
def test_eager_with_math_has_every_derivative(op: str) -> None:
    """Reverse and forward mode against finite differences, and both over reverse mode."""
    call, xs = CALLS[op].function("eager", "math"), leaves(op, torch.float64)
    assert torch.autograd.gradcheck(call, xs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, xs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("windows", [("space-time", "time"), ("space", "space-time")], ids="+".join)
def test_the_module_takes_the_remedy(windows: tuple[str, str]) -> None:
    module = randomise(cast_kernels.BCAST(8, 4, 2, 2, 3, windows, backend="eager", attention="math").double())
    xs = [torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 3)]
    assert torch.autograd.gradgradcheck(module, xs, check_fwd_over_rev=True, fast_mode=True)
    assert "attention='math'" in repr(module)
    module.attention = "auto"
    with pytest.raises(RuntimeError):
        torch.autograd.gradgradcheck(module, xs, fast_mode=True)


def _video(dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("heads", [{"action": 3}, {"verb": 2, "noun": 3}], ids=len)
def test_the_model_takes_the_remedy(heads: dict[str, int]) -> None:
    model = randomise(CAST(**TINY, heads=heads, fused=False, attention="math").double().requires_grad_(True))
    video = _video(torch.float64).requires_grad_()
    weight = model.blocks[0].get_parameter("attn.qkv.weight")

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        changed = copy.copy(model.blocks[0].attn.qkv)
        changed._parameters = {"weight": w, "bias": None}
        kept, model.blocks[0].attn.qkv = model.blocks[0].attn.qkv, changed
        try:
            return tuple(model(x).values())
        finally:
            model.blocks[0].attn.qkv = kept

    inputs = (video, weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, check_fwd_over_rev=True, fast_mode=True)


BASELINES: dict[str, Callable[..., torch.nn.Module]] = {
    "two streams": lambda **options: TwoStream(Design(), **options),
    "full width": lambda **options: TwoStream(Design(exchange="attention"), **options),
    "AIM": lambda **options: SingleExpert("clip", "aim", **options),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_take_the_remedy(name: str) -> None:
    options = {"config": make_config(**TINY), "fused": False, "attention": "math"}
    model = randomise(BASELINES[name](**options).double().requires_grad_(True))
    run, video = (lambda x: model(x)["action"]), _video(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, video, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, video, fast_mode=True)


@pytest.mark.parametrize("kind", [SpatialExpert, TemporalExpert])
def test_the_experts_alone_take_the_remedy(kind: type) -> None:
    expert = randomise(kind(**TINY, fused=False, attention="math").double())
    video = _video(torch.float64) if kind is TemporalExpert else _video(torch.float64)[:, :, 0]
    assert torch.autograd.gradcheck(expert.features, video.requires_grad_(), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(expert.features, video, fast_mode=True)
    with pytest.raises(ValueError, match="attention is 'maths'; allowed"):
        kind(**TINY, attention="maths")


def test_pretraining_takes_the_remedy() -> None:
    model = randomise(VideoMAE(make_config(**TINY), mask_ratio=0.5, fused=False, attention="math").double())
    mask, video = model.draw(1), _video(torch.float64).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return model(x, mask).prediction

    assert torch.autograd.gradcheck(run, video, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, video, fast_mode=True)


def test_a_live_model_takes_the_remedy_and_gives_it_back() -> None:
    model, video = randomise(CAST(**TINY)), _video(torch.float32)

    def penalty() -> float:
        x = video.clone().requires_grad_()
        model(x)["action"].square().sum()
        first = torch.autograd.grad(model(x)["action"].square().sum(), x, create_graph=True)[0]
        return float(torch.autograd.grad(first.square().sum(), x)[0].abs().max())

    with refused("differentiated twice"):
        penalty()
    assert model.unfuse(attention="math") is model
    assert penalty() > 0
    assert jvp(lambda x: model(x)["action"], (video,), (video,))[1].abs().max() > 0
    assert "exchange runs on: eager" in repr(model)
    assert model.fuse(attention="auto").blocks[0].running.attention == "auto"
    with refused("has no forward-mode derivative"):
        jvp(lambda x: model(x)["action"], (video,), (video,))
    with pytest.raises(ValueError, match="attention is 'maths'; allowed: 'auto', 'sdpa', 'math'"):
        model.unfuse(attention="maths")
    assert model.blocks[0].backend == "auto"  # refused before anything changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maths_error_is_at_most_twice_sdpas(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for autocast in {None, torch.bfloat16 if dtype == torch.float32 else None}:
        operands = [(torch.randn(2, 3, 50, 16, generator=generator) * 3).to(autocast or dtype) for _ in range(3)]
        exact = cast_kernels.attention.mix("sdpa", *(x.double() for x in operands))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            ours, theirs = (cast_kernels.attention.mix(name, *operands) for name in ("math", "sdpa"))
        assert ours.dtype == theirs.dtype
        error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (ours, theirs))
        assert error <= 2 * allowed


def test_no_kernel_takes_math_and_no_exchange_takes_a_package() -> None:
    tensors = CALLS["bcast"].tensors(torch.float32)
    with pytest.raises(cast_kernels.BackendError, match="attention='math' was asked for; the native core attends"):
        CALLS["bcast"].function("cpu", "math")(*tensors)
    auto, eager = (CALLS["bcast"].function(name, "math")(*tensors) for name in ("auto", "eager"))
    assert all(torch.equal(x, y) for x, y in zip(auto, eager, strict=True))
    for name in ("sdpa", "flash-attn", "maths"):
        with pytest.raises(ValueError, match=f"attention is '{name}'; B-CAST takes 'auto', 'math'"):
            CALLS["bcast"].function("auto", name)(*tensors)
        with pytest.raises(ValueError, match=f"attention is '{name}'; B-CAST takes 'auto', 'math'"):
            cast_kernels.BCAST(8, 4, 2, 2, 3, attention=name)
