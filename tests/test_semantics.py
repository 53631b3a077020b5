"""The published code's semantics, one named test each, where code, paper and reports on it disagree.

| point | test |
|---|---|
| the spatial expert sees the 2nd frame of each tubelet | test_spatial_expert_sees_the_last_frame_of_each_tubelet |
| LayerNorm after the down-projection | test_block_is_not[norm before down] |
| scores scaled by head width^-0.5 | test_block_is_not[unscaled scores] |
| output projection, query, key and value biases | test_block_is_not[no output projection, no ... bias] |
| positions after LayerNorm, on queries, keys and values | test_block_is_not[no positions, positions on keys only] |
| tables per layer, direction and expert; any image, any tubelet | test_position_tables |
| CLS never asks nor answers, takes down, norm, GELU, up | test_cls_does_not_ask, test_block_is_not[CLS ...] |
| FFN adapters scaled by 0.5; attention adapters with inner skip | test_block_is_not[whole FFN adapter, no inner skip] |
| QuickGELU in CLIP, GELU in VideoMAE and adapters | test_block_is_not[GELU in CLIP, QuickGELU in ...] |
| LayerNorm epsilons | test_block_is_not[eps ...], test_epsilons_outside_the_blocks |
| pooling first, final norm after | test_norms_follow_pooling |
| heads | test_compositional_heads, test_one_head |
| both directions read the streams before the exchange | test_block_is_not[s2t after t2s] |
| drop path: axis, four draws, none in block 0 | test_drop_path_* |
| 16 frames for VideoMAE, 8 for CLIP, no decoder | test_stream_sizes |

`test_block_is_the_published_one` says that the block equals the published mathematics, `test_block_is_not` that
each deviation would have been seen.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cast_models import SMALL, published_block, small_model, small_video
from torch import Tensor

import cast
import cast.model.block

DEVIATIONS = [
    "norm before down",
    "unscaled scores",
    "no output projection",
    "no query bias",
    "no key and value bias",
    "no positions",
    "positions on keys only",
    "CLS answers",
    "CLS passes by",
    "whole FFN adapter",
    "no inner skip",
    "GELU in CLIP",
    "QuickGELU in VideoMAE",
    "quickgelu in adapters",
    "eps 1e-6 in CLIP",
    "eps 1e-5 in VideoMAE",
    "eps 1e-5 in the exchange",
    "s2t after t2s",
]


def streams(model: cast.CAST, batch: int = 2) -> tuple[Tensor, Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(7)
    frames, patches, dim = config.exchange_frames, config.num_patches, config.embed_dim
    sizes = ((batch, frames, 1 + patches, dim), (batch, frames, patches, dim))
    spatial, temporal = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return spatial, temporal


def by_hand(
    block: cast.model.block.CASTBlock, spatial: Tensor, temporal: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """The published block on our layouts."""
    batch, frames = temporal.shape[:2]
    s, t = published_block(
        block.state_dict(), spatial.flatten(0, 1).transpose(0, 1), temporal.flatten(1, 2), block.num_heads, **options
    )
    return s.transpose(0, 1).unflatten(0, (batch, frames)), t.unflatten(1, (frames, -1))


def error(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def test_block_is_the_published_one() -> None:
    model = small_model()
    for block in model.blocks:
        assert error(block(*streams(model)), by_hand(block, *streams(model))) < 1e-12


@pytest.mark.parametrize("wrong", DEVIATIONS)
def test_block_is_not(wrong: str) -> None:
    model = small_model()
    block = model.blocks[1]
    assert error(block(*streams(model)), by_hand(block, *streams(model), wrong=wrong)) > 1e-8


def test_cls_does_not_ask() -> None:
    """What the temporal stream says reaches the patches in this block, CLS only in the next."""
    model = small_model()
    spatial, temporal = streams(model)
    before, _ = model.blocks[0](spatial, temporal)
    after, _ = model.blocks[0](spatial, temporal + torch.randn_like(temporal))
    assert torch.equal(before[:, :, 0], after[:, :, 0])
    assert not torch.isclose(before[:, :, 1:], after[:, :, 1:]).any(-1).all()


def test_spatial_expert_sees_the_last_frame_of_each_tubelet() -> None:
    model = small_model()
    video = small_video(model)
    spatial, temporal = model.embed(video)
    other = video.clone()
    other[:, :, 0::2] = 0
    assert torch.equal(model.embed(other)[0], spatial)
    assert not torch.isclose(model.embed(other)[1], temporal).all(-1).any()
    for t in range(model.config.exchange_frames):
        other = video.clone()
        other[:, :, 2 * t + 1] = 0
        changed = (model.embed(other)[0] != spatial).flatten(2).any(-1)
        assert changed[:, t].all()
        assert changed.sum() == len(video)


def test_stream_sizes() -> None:
    with torch.device("meta"):
        spatial, temporal = cast.CAST(depth=1).tokens(torch.empty(2, 3, 16, 224, 224))
    assert spatial.shape == (2, 8, 197, 768)
    assert temporal.shape == (2, 8, 196, 768)
    assert spatial.is_contiguous()
    assert temporal.is_contiguous()


def test_temporal_positions_are_the_fixed_sine_table() -> None:
    model = small_model()
    video = small_video(model)
    length, dim = model.config.exchange_frames * model.config.num_patches, model.config.embed_dim
    bare = F.conv3d(video, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=(2, 8, 8))
    table = (model.embed(video)[1].flatten(1, 2) - bare.flatten(2).transpose(1, 2))[0]
    for position in (0, 1, length - 1):
        for channel in (0, 1, 6, dim - 1):
            angle = torch.tensor(position / 10000 ** (2 * (channel // 2) / dim), dtype=torch.float64)
            expected = angle.sin() if channel % 2 == 0 else angle.cos()
            # The table is rounded to fp32, as published.
            assert abs(table[position, channel] - expected) < 1e-7
    assert not [key for key in model.state_dict() if "pos_embed" in key]


def test_position_tables() -> None:
    """One per layer, direction and expert, as long as the window, whatever image and tubelet."""
    model = cast.CAST(**(SMALL | {"image_size": 40, "tubelet_size": 3, "num_frames": 12}))
    tables = {key: tuple(value.shape) for key, value in model.state_dict().items() if key.endswith("_pos")}
    assert tables == {
        f"blocks.{i}.{direction}_cross.{expert}_{axis}_pos": (length, 8)
        for i in range(2)
        for direction, axis, length in (("t2s", "time", 4), ("s2t", "space", 25))
        for expert in ("clip", "vmae")
    }
    video = torch.randn(1, 3, 12, 40, 40)
    spatial, _ = model.embed(video)
    video[:, :, [i for i in range(12) if i not in (2, 5, 8, 11)]] = 0
    assert torch.equal(model.embed(video)[0], spatial)


def test_position_tables_start_with_the_published_deviation() -> None:
    torch.manual_seed(0)
    block = cast.CAST(depth=1).blocks[0]
    for direction, axis in (("t2s", "time"), ("s2t", "space")):
        for expert in ("clip", "vmae"):
            table = block.get_parameter(f"{direction}_cross.{expert}_{axis}_pos")
            assert table.std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_epsilons_outside_the_blocks() -> None:
    model = small_model()
    assert model.clip_ln_pre.eps == model.clip_ln_post.eps == 1e-5
    assert model.vmae_fc_norm.eps == 1e-6


def test_norms_follow_pooling() -> None:
    model = small_model()
    spatial, temporal = model.tokens(small_video(model))
    fs, ft = model.features(small_video(model))

    def norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)

    torch.testing.assert_close(fs, norm(model.clip_ln_post, spatial[:, :, 0].mean(1)))
    torch.testing.assert_close(ft, norm(model.vmae_fc_norm, temporal.mean((1, 2))))
    assert not torch.allclose(fs, norm(model.clip_ln_post, spatial[:, :, 0]).mean(1))
    assert not torch.allclose(ft, norm(model.vmae_fc_norm, temporal).mean((1, 2)))


def test_compositional_heads() -> None:
    """Noun from the spatial expert alone, verb from the temporal one alone, no adapters before."""
    model = small_model(heads={"verb": 5, "noun": 3})
    video = small_video(model)
    fs, ft = model.features(video)
    logits = model(video)
    assert logits.keys() == {"verb", "noun"}
    torch.testing.assert_close(logits["noun"], F.linear(fs, model.head_noun.weight, model.head_noun.bias))
    torch.testing.assert_close(logits["verb"], F.linear(ft, model.head_verb.weight, model.head_verb.bias))


def test_one_head() -> None:
    """Head(A_noun(spatial) + A_verb(temporal)), adapters without skip."""
    model = small_model(heads={"action": 5})
    video = small_video(model)

    def adapter(name: str, x: Tensor) -> Tensor:
        layer = model.get_submodule(name)
        hidden = F.gelu(F.linear(x, layer.D_fc1.weight, layer.D_fc1.bias))
        return F.linear(hidden, layer.D_fc2.weight, layer.D_fc2.bias)

    fs, ft = model.features(video)
    joined = adapter("noun_last_Adapter", fs) + adapter("verb_last_Adapter", ft)
    torch.testing.assert_close(model(video)["action"], F.linear(joined, model.head.weight, model.head.bias))


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every drop-path draw made while the test runs, in order."""
    made: list[Tensor] = []
    real = cast.model.block.drop_factor

    def recorded(*arguments: object) -> Tensor:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(cast.model.block, "drop_factor", recorded)
    return made


# Kernels may exist for fp32 alone; eager PyTorch runs in fp64.
FUSED = pytest.mark.parametrize(
    ("fused", "dtype", "tolerance"),
    [(True, torch.float32, 1e-5), (False, torch.float64, 1e-12)],
    ids=["fused", "eager"],
)


@FUSED
def test_drop_path_official_drops_token_positions_and_clips(
    draws: list[Tensor], fused: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = small_model(drop_path=0.5, fused=fused).to(dtype).train()
    block, (spatial, temporal) = model.blocks[1], (x.to(dtype) for x in streams(model))
    for seed in range(8):
        torch.manual_seed(seed)
        draws.clear()
        ours = block(spatial, temporal)
        s1, t1, s2, t2 = draws
        assert s1.shape == s2.shape == (1 + model.config.num_patches,)
        assert t1.shape == t2.shape == (2,)
        factors = (s1[:, None, None], t1[:, None, None], s2[:, None, None], t2[:, None, None])
        assert error(ours, by_hand(block, spatial, temporal, drops=factors)) < tolerance


@FUSED
def test_drop_path_sample_drops_clips_of_both_streams(
    draws: list[Tensor], fused: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = small_model(drop_path=0.5, drop_path_mode="sample", fused=fused).to(dtype).train()
    block, (spatial, temporal) = model.blocks[1], (x.to(dtype) for x in streams(model))
    frames = model.config.exchange_frames
    for seed in range(8):
        torch.manual_seed(seed)
        draws.clear()
        ours = block(spatial, temporal)
        s1, t1, s2, t2 = draws
        assert all(draw.shape == (2,) for draw in draws)
        s1, s2 = (draw.repeat_interleave(frames)[None, :] for draw in (s1, s2))
        factors = (s1[..., None], t1[:, None, None], s2[..., None], t2[:, None, None])
        assert error(ours, by_hand(block, spatial, temporal, drops=factors)) < tolerance


def test_drop_path_rate_grows_linearly_from_nothing_in_block_0(draws: list[Tensor]) -> None:
    model = small_model(depth=5, drop_path=0.2).train()
    assert [block.drop_rate for block in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    model.blocks[0](*streams(model))
    assert not draws
    model(small_video(model))
    assert len(draws) == 4 * 4
    model.eval()(small_video(model))
    assert len(draws) == 4 * 4


def test_drop_path_keeps_the_mean() -> None:
    torch.manual_seed(0)
    factor = cast.model.block.drop_factor((100_000,), 0.2, torch.empty(0))
    assert factor.unique().tolist() == [0, 1.25]
    assert factor.mean().item() == pytest.approx(1, abs=0.01)
