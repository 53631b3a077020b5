"""Modules that are made without memory, and get it later: every value that no checkpoint holds must be right."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cast_models import randomise
from torch import nn

import cast_kernels
from cast import CAST
from cast.baselines import SingleExpert, TwoStream
from cast.model.config import make_config
from cast.model.experts import TemporalExpert
from cast.model.layers import sincos_table
from cast.pretrain.model import VideoMAE

CONFIG = make_config("tiny", depth=1, num_frames=4, image_size=16)
MODULES: dict[str, Callable[[], nn.Module]] = {
    "CAST": lambda: CAST(CONFIG),
    "TemporalExpert": lambda: TemporalExpert(CONFIG),
    "VideoMAE": lambda: VideoMAE(CONFIG),
    "TwoStream": lambda: TwoStream(config=CONFIG),
    "SingleExpert": lambda: SingleExpert("videomae", config=CONFIG),
    "BCAST": lambda: cast_kernels.BCAST(16, 8, 2, 2, 3),
}
modules = pytest.mark.parametrize("name", MODULES)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def emptied(module: nn.Module) -> nn.Module:
    """`to_empty`, with the worst that unused memory can hold."""
    return module.to_empty(device="cpu").apply(
        lambda m: [x.data.fill_(torch.nan) for x in m._parameters.values() if x is not None] and None
    )


def assert_same(got: nn.Module, want: nn.Module) -> None:
    for found, expected in (
        (got.named_parameters(), want.named_parameters()),
        (got.named_buffers(), want.named_buffers()),
    ):
        for (name, x), (other, y) in zip(found, expected, strict=True):
            assert name == other
            assert torch.equal(x, y), name


@pytest.fixture
def _garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds ones, so that zeros by luck don't pass."""
    true = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: true(*a, **k).fill_(1))


@pytest.mark.usefixtures("_garbage")
@modules
def test_from_meta_by_to_empty_and_a_strict_load(name: str) -> None:
    want = randomise(MODULES[name]())
    got = on_meta(MODULES[name]).to_empty(device="cpu")
    got.load_state_dict(want.state_dict())
    assert_same(got, want)


@modules
def test_from_meta_by_an_assigning_load(name: str) -> None:
    want = randomise(MODULES[name]()).to(torch.bfloat16)
    got = on_meta(MODULES[name])
    got.load_state_dict(want.state_dict(), assign=True)
    assert_same(got, want)


@pytest.mark.usefixtures("_garbage")
@modules
def test_buffers_survive_to_empty(name: str) -> None:
    want, got = MODULES[name](), MODULES[name]().to_empty(device="cpu")
    for (key, x), (_, y) in zip(got.named_buffers(), want.named_buffers(), strict=True):
        assert torch.equal(x, y), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_table_of_ones_own_goes_where_the_module_goes(dtype: torch.dtype) -> None:
    module = TemporalExpert(CONFIG)
    module.pos_embed = torch.randn_like(module.pos_embed)
    mine = module.pos_embed.clone()
    assert torch.equal(module.to(dtype).pos_embed, mine.to(dtype))
    shared = TemporalExpert(CONFIG).share_memory()
    assert shared.pos_embed.is_shared()
    assert torch.equal(shared.pos_embed, sincos_table(shared.pos_embed.shape[1], CONFIG.embed_dim))


def test_a_load_that_makes_nothing_real_leaves_meta() -> None:
    module = on_meta(MODULES["CAST"])
    module.load_state_dict({}, strict=False)
    assert module.get_buffer("pos_embed").is_meta
    assert module.to(torch.bfloat16).get_buffer("pos_embed").dtype == torch.bfloat16


def test_a_reset_of_the_exchange_leaves_nothing_as_it_was() -> None:
    for module in (cast_kernels.BCAST(16, 8, 2, 2, 3), cast_kernels.BCAST(16, 8, 2, 2, 3, ("space-time", "time"))):
        fresh = copy.deepcopy(module)
        for one in (emptied(module), fresh):
            torch.manual_seed(0)
            one.reset_bcast_parameters()
        assert_same(module, fresh)  # a value that was left would be NaN


def test_a_reset_of_a_blocks_exchange_leaves_its_experts() -> None:
    block = randomise(CAST(CONFIG)).blocks[0]
    before = {name: p.clone() for name, p in block.named_parameters()}
    block.reset_bcast_parameters()
    for name, p in block.named_parameters():
        own = name.startswith(("cross_", "ln_s_cross", "ln_t_cross", "t2s_cross", "s2t_cross"))
        assert torch.equal(p, before[name]) != own, name
