"""Layers that were replaced or wrapped are called: never a weight read in the place of what a layer computes.

The right answer comes from a plain model whose weights were changed to mean the same.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bcast_cases import AWKWARD, CASES, Case, assert_at_most_twice_eager
from cast_models import SMALL, randomise, set_layer, small_model, small_video
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import cast
import cast_kernels

#: Wrapper -> the linear layers in it; scaling the last one scales the wrapper's output.
WRAPPERS = {
    "clip_attn": ("out_proj",), "attn": ("qkv", "proj"), "clip_mlp": ("c_fc", "c_proj"), "mlp": ("fc1", "fc2"),
    "S_Adapter": ("D_fc1", "D_fc2"), "T_Adapter": ("D_fc1", "D_fc2"),
    "S_MLP_Adapter": ("D_fc1", "D_fc2"), "T_MLP_Adapter": ("D_fc1", "D_fc2"),
    "t2s_cross": ("t2s_q", "t2s_kv", "t2s_proj"), "s2t_cross": ("s2t_q", "s2t_kv", "t2s_proj"),
}  # fmt: skip
SINGLE = [
    "clip_ln_1", "clip_ln_2", "norm1", "norm2", "ln_s_cross", "ln_t_cross",
    "cross_s_down", "cross_t_down", "cross_s_up", "cross_t_up",
]  # fmt: skip
#: Every layer that the ops of a block read.
LAYERS = [*SINGLE, *WRAPPERS, *(f"{name}.{child}" for name, children in WRAPPERS.items() for child in children)]
#: One of each kind, and B-CAST's own in both directions.
SOME = ["attn.qkv", "clip_mlp.c_fc", "S_Adapter.D_fc2", "cross_s_down", "t2s_cross.t2s_q", "s2t_cross.t2s_proj"]


pytestmark = pytest.mark.filterwarnings("ignore:.*by its modules")  # which the tests cause on purpose


class LoRA(nn.Module):
    """A linear layer with a low-rank addition, as adapter libraries put in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        sizes = ((2, base.in_features), (base.out_features, 2))
        a, b = (torch.randn(size, generator=generator, dtype=torch.float64) / 2 for size in sizes)
        like = base.weight
        self.base, self.a, self.b = base, nn.Parameter(a.to(like)), nn.Parameter(b.to(like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class Steps(Tensor):
    """A weight that is kept as whole steps: what a linear layer reads of it is 1/8 of what the memory holds."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            plain_args = [x.as_subclass(Tensor) / 8 if isinstance(x, Steps) else x for x in args]
            return F.linear(*plain_args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def lora(block: nn.Module, name: str) -> Tensor:
    layer = LoRA(block.get_submodule(name))  # type: ignore[arg-type]
    set_layer(block, name, layer)
    return layer.base.weight + layer.b @ layer.a  # type: ignore[operator]


def quantised(block: nn.Module, name: str) -> Tensor:
    layer = block.get_submodule(name)
    steps = (layer.weight.detach() * 8).round()  # type: ignore[operator]
    layer.weight = nn.Parameter(steps.as_subclass(Steps), requires_grad=False)
    return steps / 8


def subclassed(block: nn.Module, name: str) -> Tensor:
    layer: Any = block.get_submodule(name)
    other = Doubled(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
    other.load_state_dict(layer.state_dict())
    set_layer(block, name, other)
    return 2 * layer.weight


def biased(block: nn.Module, name: str) -> Tensor:
    """Linear layers that have no bias get one, which an op would not read; the others lose theirs."""
    layer: Any = block.get_submodule(name)
    had = layer.bias
    layer.bias = nn.Parameter(torch.ones_like(layer.weight[:, 0])) if had is None else None
    return layer.weight


def own_forward(block: nn.Module, name: str) -> Tensor:
    layer: Any = block.get_submodule(name)
    plainly = layer.forward
    layer.forward = lambda x: plainly(3 * x)
    return 3 * layer.weight


def own_call(block: nn.Module, name: str) -> Tensor:
    """What `Module.__call__` calls may be set on the instance, as `forward` may."""
    layer: Any = block.get_submodule(name)
    called = layer._call_impl
    layer._call_impl = lambda x: called(3 * x)
    return 3 * layer.weight


def sparse(block: nn.Module, name: str) -> Tensor:
    layer: Any = block.get_submodule(name)
    weight = layer.weight.detach()
    weight = torch.where(weight.abs() < weight.abs().median(), 0, weight)
    layer.weight = nn.Parameter(weight.to_sparse(), requires_grad=False)
    return weight


def pre_hooked(block: nn.Module, name: str) -> Tensor:
    layer: Any = block.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    return layer.weight / 2


def weight_normed(block: nn.Module, name: str) -> Tensor:
    layer: Any = block.get_submodule(name)
    torch.nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(1.5)  # what `weight` holds is older
    return torch._weight_norm(layer.weight_v, layer.weight_g)


def pruned(block: nn.Module, name: str) -> Tensor:
    layer: Any = block.get_submodule(name)
    prune.custom_from_mask(layer, "weight", (torch.arange(layer.weight.numel()) % 3 > 0).view_as(layer.weight))
    with torch.no_grad():
        layer.weight_orig.mul_(2)  # what `weight` holds is older
    return layer.weight_orig * layer.weight_mask


def compiled(block: nn.Module, name: str) -> Tensor:
    layer: Any = block.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    set_layer(block, name, torch.compile(layer, backend="eager"))  # type: ignore[arg-type]
    return layer.weight / 2


#: How a layer is changed -> what its weight then amounts to.
CHANGES: dict[str, Callable[[nn.Module, str], Tensor]] = {
    change.__name__: change
    for change in (
        lora, quantised, subclassed, biased, own_forward, own_call, sparse, pre_hooked, weight_normed, pruned, compiled,
    )
}  # fmt: skip


def tokens(model: cast.CAST, dtype: torch.dtype) -> dict[str, Tensor]:
    out = model.tokens(small_video(model, dtype=dtype))
    return {name: x.detach().double() for name, x in zip(("spatial", "temporal"), out, strict=True)}


def assert_means_the_same(ours: cast.CAST, same: cast.CAST) -> None:
    """fp32 `ours` is as near to `same` in fp64 as eager PyTorch's fp32 is, fused and unfused."""
    exact, eager = tokens(copy.deepcopy(same).unfuse(), torch.float64), tokens(same.float().unfuse(), torch.float32)
    for backend in ("auto", "eager"):
        assert_at_most_twice_eager(tokens(ours.fuse(backend), torch.float32), eager, exact)


@pytest.mark.parametrize("known", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_hook_on_any_layer_fires_once_and_counts(name: str, known: bool) -> None:
    """Also where calls before it found the layer plain."""
    ours, same = small_model().float(), small_model()
    fired = []
    if known:
        tokens(ours, torch.float32)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        fired.append(name)
        return 1.5 * output

    ours.blocks[0].get_submodule(name).register_forward_hook(hook)
    last = same.blocks[0].get_submodule(f"{name}.{WRAPPERS[name][-1]}" if name in WRAPPERS else name)
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(1.5)
    assert_means_the_same(ours, same)
    assert fired == [name, name]
    (found,) = ours.blocks[0].obstacles().values()  # type: ignore[operator]
    assert found == f"{name} has a forward hook"
    assert ours.blocks[1].obstacles() == {}  # type: ignore[operator]


@pytest.mark.parametrize("known", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_called(change: str, known: bool) -> None:
    ours, same = small_model().float(), small_model()
    if known:
        tokens(ours, torch.float32)
    for name in SOME:
        weight = CHANGES[change](ours.blocks[0], name)
        layer: Any = same.blocks[0].get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if change == "biased" and layer.bias is not None:
                layer.bias.zero_()
            elif change == "biased":
                same.blocks[0].get_submodule("t2s_cross").t2s_q_bias.add_(name == "t2s_cross.t2s_q")
    if change == "biased":
        with torch.no_grad():
            for bias in ("q_bias", "v_bias"):  # a bias of all keys changes no softmax
                getattr(same.blocks[0].attn, bias).add_(1)  # type: ignore[union-attr]
    assert_means_the_same(ours, same)
    assert len(ours.blocks[0].obstacles()) == 4  # type: ignore[operator]  # all but the temporal FFN


def test_low_rank_additions_train() -> None:
    """Their gradients are those of the weight that they add to."""
    ours, same = small_model(), small_model()
    for name in SOME:
        layer: Any = same.blocks[0].get_submodule(name)
        layer.weight = nn.Parameter(lora(ours.blocks[0], name).detach())
    for model in (ours, same):
        sum(x.square().sum() for x in model.tokens(small_video(model))).backward()
    for name in SOME:
        layer, whole = ours.blocks[0].get_submodule(name), same.blocks[0].get_submodule(name).weight.grad
        torch.testing.assert_close(layer.a.grad, layer.b.T @ whole)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(layer.b.grad, whole @ layer.a.T)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_the_exchange_by_its_modules_is_the_op(case: Case) -> None:
    """In every window, direction, with and without positions and drop path, to fp64's rounding; gradients too."""
    found = []
    for hooked in (False, True):
        module, inputs = case.module(torch.float64), case.inputs(torch.float64, grad=True)
        if hooked:
            module.cross_s_down.register_forward_hook(lambda *_: None)
        out = module(*inputs, *case.scales(torch.float64))
        sum(x.sin().sum() for x in out).backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        found.append((*out, *(x.grad for x in inputs), grads))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_drop_path_and_autocast_are_those_of_the_ops(autocast: bool) -> None:
    found = []
    for hooked in (False, True):
        model = small_model(drop_path=0.6).float().train().unfuse()
        if hooked:
            for name in ("clip_attn", "attn", "clip_mlp", "mlp", "cross_s_down"):
                model.blocks[1].get_submodule(name).register_forward_hook(lambda *_: None)
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(model.tokens(small_video(model, dtype=torch.float32)))
    assert [x.dtype for x in found[1]] == [x.dtype for x in found[0]]
    largest = max(float(x.detach().abs().max()) for x in found[0])
    ulp = 2**-7 * largest  # of bfloat16, in which a stream is rounded once more or less
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=ulp if autocast else 1e-5)


def test_a_kernel_asked_for_by_name_refuses_and_auto_warns_once() -> None:
    model, video = small_model().float(), small_video(small_model(), dtype=torch.float32)
    lora(model.blocks[1], "attn.qkv")
    lora(model.blocks[1], "t2s_cross.t2s_q")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(video)
        model(video)
        model.unfuse()(video)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "attn.qkv is a test_plain.LoRA" in texts[0]
    assert "t2s_cross.t2s_q is a test_plain.LoRA" in texts[1]
    for backend in ("cpu", "triton"):
        with pytest.raises(cast_kernels.BackendError, match=r"self-attention.*attn\.qkv is a.*backend='auto'"):
            model.fuse(backend).blocks[1]._attend_temporal(torch.zeros(1, 3, 4, 16))  # type: ignore[operator]
        with pytest.raises(cast_kernels.BackendError, match=r"exchange.*t2s_cross\.t2s_q is a.*merge the adapter"):
            model.blocks[1].exchange(torch.zeros(1, 3, 5, 16), torch.zeros(1, 3, 4, 16))  # type: ignore[operator]


def test_explain_and_repr_name_layer_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model().float()
    assert "none has to be called" in model.explain()
    model.blocks[1].get_submodule("norm1").register_forward_hook(lambda *_: None)
    lora(model.blocks[0], "cross_t_up")
    text = model.explain()
    assert text in capsys.readouterr().out
    assert "blocks.1: self-attention of the temporal expert runs by its modules in PyTorch" in text
    assert "norm1 has a forward hook" in text
    assert "blocks.0: the exchange runs by its modules" in text
    assert "cross_t_up is a test_plain.LoRA" in text
    assert "modules" in model.extra_repr()
    assert "cross_t_up is a test_plain.LoRA" in repr(model.blocks[0])
    assert "cannot run the exchange" in model.fuse("cpu").explain()
    module = AWKWARD.module()
    module.ln_s_cross.register_full_backward_hook(lambda *_: None)
    assert "ln_s_cross has a backward hook" in cast_kernels.explain(module, *AWKWARD.inputs())


def test_a_parametrization_is_read_and_stays_fused() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    ours, same = small_model().float(), small_model()
    for name in SOME:
        parametrize.register_parametrization(ours.blocks[0].get_submodule(name), "weight", Half())
        with torch.no_grad():
            same.blocks[0].get_submodule(name).weight.mul_(0.5)  # type: ignore[union-attr, operator]
    assert ours.blocks[0].obstacles() == {}  # type: ignore[operator]
    assert_means_the_same(ours, same)


def test_hooks_on_a_block_fire_and_change_no_backend() -> None:
    model, fired = small_model().float(), []
    model.blocks[0].register_forward_hook(lambda *_: fired.append(1))
    model(small_video(model, dtype=torch.float32))
    assert fired == [1]
    assert model.blocks[0].obstacles() == {}  # type: ignore[operator]


def test_norms_of_the_exchange_have_their_own_epsilon() -> None:
    """Equal ones reach the op, unequal ones their modules."""
    for s, t in ((1e-2, 1e-2), (1e-2, 1e-1)):
        module = AWKWARD.module(torch.float64)
        module.ln_s_cross.eps, module.ln_t_cross.eps = s, t
        inputs = AWKWARD.inputs(torch.float64)
        got = module(*inputs)
        assert bool(module.obstacle()) == (s != t)
        module.ln_s_cross.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(got, module(*inputs), rtol=1e-10, atol=1e-10)


def test_positions_that_do_not_fit_are_said_by_modules_too() -> None:
    module, (spatial, temporal) = AWKWARD.module(), AWKWARD.inputs()
    module.cross_s_down.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"t2s\.q_pos has shape.*2 frames"):
        module(spatial[:, :2], temporal[:, :2])
    with pytest.raises(ValueError, match="4 dimensions"):
        module(spatial[0], temporal)
    with pytest.raises(ValueError, match="spatial_scale"):
        module(spatial, temporal, torch.ones(7))


@pytest.mark.parametrize("kind", [cast.SpatialExpert, cast.TemporalExpert])
def test_the_experts_alone_call_their_layers(kind: type) -> None:
    names = ["ln_1", "attn", "attn.out_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"]
    if kind is cast.TemporalExpert:
        names = ["norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2"]
    expert: Any = randomise(kind(**SMALL))
    frames = (2, 3, 16, 16) if kind is cast.SpatialExpert else (2, 3, 6, 16, 16)
    x = torch.randn(frames, generator=torch.Generator().manual_seed(0))
    want, fired = expert.tokens(x), []
    blocks = expert.transformer.resblocks if kind is cast.SpatialExpert else expert.blocks
    for name in names:
        blocks[1].get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    torch.testing.assert_close(expert.tokens(x), want)
    assert sorted(fired) == sorted(names)
