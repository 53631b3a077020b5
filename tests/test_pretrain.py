"""VideoMAE pre-training: masks, the autoencoder against transformers' and our encoder, files, the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cast_models import SMALL, randomise

import cast
from cast.model.config import CASTConfig
from cast.pretrain import DecoderSettings, PretrainSettings, Reconstruction, VideoMAE
from cast.pretrain.command import build
from cast.pretrain.masking import Mask, assemble, pixels, tube_mask, tubelets
from cast.pretrain.picture import reconstruct
from cast.training.groups import parameter_groups
from cast.training.recipes import load_recipe
from cast.video.augment import AugmentSettings
from cast.video.datasets import DataSettings

CONFIG = CASTConfig(**(SMALL | {"image_size": 32}))  # 16 patches, 3 moments
FRAMES, PATCHES = CONFIG.exchange_frames, CONFIG.num_patches


def autoencoder(**options) -> VideoMAE:
    torch.manual_seed(0)
    return randomise(VideoMAE(CONFIG, DecoderSettings(depth=2), mask_ratio=0.75, **options))


def clips(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, CONFIG.num_frames, 32, 32, generator=torch.Generator().manual_seed(1))


def test_tubes_hide_the_same_patches_at_all_times() -> None:
    torch.manual_seed(0)
    mask = tube_mask(5, FRAMES, PATCHES, 0.9)
    assert mask.hidden.shape == (5, FRAMES * 14)  # floor(0.9 * 16)
    assert mask.visible.shape == (5, FRAMES * 2)
    for visible, hidden in zip(*mask, strict=True):
        assert sorted([*visible.tolist(), *hidden.tolist()]) == list(range(FRAMES * PATCHES))
        assert visible.tolist() == sorted(visible.tolist())
        assert {frozenset((row % PATCHES).tolist()) for row in hidden.view(FRAMES, -1)}.__len__() == 1
    assert len({tuple(row.tolist()) for row in mask.visible}) > 1  # each clip has its own


@pytest.mark.parametrize("ratio", [0.01, 1.0])
def test_a_mask_that_hides_nothing_or_everything_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"mask_ratio {ratio} hides .* of a frame's 16 patches"):
        VideoMAE(CONFIG, mask_ratio=ratio)


def test_tubelets_come_back() -> None:
    video = clips()
    assert torch.equal(assemble(tubelets(video, 2, 8), CONFIG.num_frames, 2, 8), video)


def test_the_encoder_is_the_temporal_expert() -> None:
    """Shown every token, it answers what TemporalExpert does with the same weights."""
    model = autoencoder(fused=False)
    expert = cast.TemporalExpert(CONFIG, fused=False).load(model.state_dict())
    everything = torch.arange(FRAMES * PATCHES).expand(2, -1)
    ours = model.encoder(tubelets(clips(), 2, 8), everything)
    assert torch.allclose(ours, model.encoder.norm(expert.tokens(clips())), atol=1e-5)


def test_transformers_answers_the_same() -> None:
    """An independent implementation, given our weights and mask: the same prediction, and the same loss."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = autoencoder(fused=False)
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=6, tubelet_size=2, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, decoder_hidden_size=8, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=1, decoder_intermediate_size=32, norm_pix_loss=True, layer_norm_eps=1e-6,
        use_mean_pooling=False,  # or it leaves out the norm after the encoder, which the official code has
    )  # fmt: skip
    other = transformers.VideoMAEForPreTraining(config).eval()
    theirs = other.state_dict()
    missing, unexpected = other.load_state_dict(in_their_names(model, theirs), strict=False)
    assert (missing, unexpected) == ([], [])
    torch.manual_seed(3)
    mask = model.draw(2)
    hidden = torch.zeros(2, FRAMES * PATCHES, dtype=torch.bool).scatter(1, mask.hidden, True)
    with torch.no_grad():
        answer = other(clips().transpose(1, 2), bool_masked_pos=hidden)
        ours = model(clips(), mask)
    assert torch.allclose(ours.prediction, answer.logits, atol=1e-5)
    assert float(ours.loss()) == pytest.approx(float(answer.loss), rel=1e-5)


def in_their_names(model: VideoMAE, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under transformers' names; its separate query, key and value come out of our packed ones."""
    own = model.state_dict()
    result: dict[str, torch.Tensor] = {}
    for name in theirs:
        key = name.removeprefix("videomae.")
        key = key.replace("embeddings.patch_embeddings.projection", "encoder.patch_embed.proj")
        key = key.replace("encoder.layer.", "encoder.blocks.").replace("decoder.decoder_layers.", "decoder.blocks.")
        key = key.replace("videomae.layernorm", "encoder.norm").replace("attention.output.dense", "attn.proj")
        key = "encoder.norm." + key.removeprefix("layernorm.") if key.startswith("layernorm.") else key
        key = key.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        key = key.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        for number, part in enumerate(("query", "key", "value")):
            if f".attention.attention.{part}." in key:
                block = key.split(".attention.")[0]
                if key.endswith("weight"):
                    result[name] = own[f"{block}.attn.qkv.weight"].chunk(3)[number]
                else:
                    result[name] = own.get(f"{block}.attn.{part[0]}_bias", torch.zeros_like(theirs[name]))
        for part in ("q_bias", "v_bias"):
            if key.endswith(f"attention.attention.{part}"):
                result[name] = own[key.replace("attention.attention", "attn")]
        if name not in result and "position_embeddings" not in name:
            result[name] = own[key]
    return result


@pytest.mark.parametrize("name", ["patch_embed", "patch_embed.proj"])
def test_an_embedding_that_was_wrapped_is_called(name: str) -> None:
    ours, same = autoencoder().double(), autoencoder().double()
    ours.encoder.get_submodule(name).register_forward_hook(lambda _, args, output: 3 * output)
    with torch.no_grad():
        for parameter in same.encoder.patch_embed.proj.parameters():
            parameter.mul_(3)
    mask = ours.draw(2)
    got, want = (model(clips().double(), mask).prediction for model in (ours, same))
    torch.testing.assert_close(got, want)


def test_what_is_hidden_is_not_seen() -> None:
    model, video = autoencoder(), clips()
    mask = model.draw(2)
    tokens = tubelets(video, 2, 8)
    tokens = tokens.scatter(1, mask.hidden[:, :, None, None].expand(-1, -1, *tokens.shape[2:]), 7.0)
    changed = assemble(tokens, CONFIG.num_frames, 2, 8)
    before, after = model(video, mask), model(changed, mask)
    assert torch.equal(before.prediction, after.prediction)
    assert not torch.allclose(before.target, after.target)


def test_targets_are_standardised_pixels() -> None:
    ours = autoencoder()(clips()).target.unflatten(2, (-1, 3))
    assert torch.allclose(ours.mean(2), torch.zeros(()), atol=1e-5)
    assert torch.allclose(ours.var(2), torch.ones(()), atol=1e-4)
    plain = autoencoder(normalised=False)
    mask = plain.draw(2)
    wanted = pixels(tubelets(clips(), 2, 8)).flatten(2)
    assert torch.equal(plain(clips(), mask).target, wanted.gather(1, mask.hidden[..., None].expand(-1, -1, 384)))


def test_fused_is_unfused() -> None:
    fused, eager = autoencoder(), autoencoder(fused=False)
    mask = fused.draw(2)
    losses = [model(clips(), mask).loss() for model in (fused, eager)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(fused.named_parameters(), eager.parameters(), strict=True):
        assert ours.grad is not None, name
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5), name


def test_the_file_loads_like_any_videomae(tmp_path: Path) -> None:
    model = autoencoder()
    model.save(tmp_path / "v.safetensors")
    again = VideoMAE.read(tmp_path / "v.safetensors")
    mask = model.draw(1)
    assert torch.equal(again(clips(1), mask).prediction, model(clips(1), mask).prediction)
    whole = cast.CAST(CONFIG).load_experts(videomae=tmp_path / "v.safetensors")
    assert torch.equal(whole.blocks[1].mlp.fc1.weight, model.encoder.blocks[1].mlp.fc1.weight)
    assert torch.equal(whole.patch_embed.proj.bias, model.encoder.patch_embed.proj.bias)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    with pytest.raises(FileNotFoundError, match="cast pretrain writes one"):
        VideoMAE.read(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not written by cast pretrain, or damaged"):
        VideoMAE.read(path)


def test_a_right_answer_makes_the_original_picture() -> None:
    class Perfect(VideoMAE):
        def forward(self, video: torch.Tensor, mask: Mask | None = None) -> Reconstruction:
            target = super().forward(video, mask).target
            return Reconstruction(target, target)

    model = Perfect(CONFIG, DecoderSettings(depth=1), mask_ratio=0.75)
    video = clips(1) * 0.1
    masked, made, original = reconstruct(model, video, model.draw(1))
    assert torch.allclose(made, original, atol=1e-5)
    assert float((masked == 0.5).float().mean()) == pytest.approx(0.75, abs=0.01)


def test_every_recipe_is_valid() -> None:
    names = [path.stem for path in (Path(__file__).parents[1] / "recipes").glob("videomae*.yaml")]
    assert sorted(names) == ["videomae", "videomae-digits"]
    for name in names:
        assert load_recipe(PretrainSettings, name).optim.accumulate(1) >= 1


def test_the_recipe_is_the_published_one() -> None:
    settings = load_recipe(PretrainSettings, "videomae", "data.root=somewhere")
    assert settings.optim == PretrainSettings(DataSettings("somewhere")).optim  # what the settings have by default
    optim, model = settings.optim, settings.model
    assert (optim.epochs, optim.warmup_epochs, optim.betas, optim.weight_decay) == (800, 40, (0.9, 0.95), 0.05)
    assert optim.peak == pytest.approx(6e-4)
    narrow = settings.decoder.config(model)
    assert (narrow.depth, narrow.embed_dim, narrow.num_heads) == (4, 384, 6)
    with torch.device("meta"):
        whole = VideoMAE(model, settings.decoder, settings.mask_ratio)
    assert whole.encoder.patch_embed.proj.weight.numel() == 768 * 3 * 2 * 16 * 16
    # transformers' VideoMAEForPreTraining of the base size has as many: it calls the same key bias zero.
    assert sum(p.numel() for p in whole.parameters()) == 94_210_944


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0; it must lie between 0 and 1"),
        ({"pictures": -1}, "pictures is -1"),
        ({"stride": 0}, "stride is 0"),
        ({"data": DataSettings("x", augment=AugmentSettings(mixup=0.8))}, "data.augment.mixup is 0.8"),
        ({"data": DataSettings("x", augment=AugmentSettings(smoothing=0.1))}, "data.augment.smoothing is 0.1"),
        ({"model": CASTConfig(image_size=32)}, "model.image_size is 32, data.size 224"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainSettings(**{"data": DataSettings("x"), **overrides})


def test_a_decoder_without_a_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="the decoder of 4 blocks, 7 channels, 2 heads: embed_dim 7"):
        VideoMAE(CONFIG, DecoderSettings(width=7, heads=2))


def test_the_mask_token_does_not_decay() -> None:
    model = autoencoder()
    (group,) = (g for g in parameter_groups(model, 0.05, 1.0) if any(p is model.mask_token for p in g["params"]))
    assert group["weight_decay"] == 0


def test_settings_reach_the_model() -> None:
    settings = PretrainSettings(
        data=DataSettings("x", size=32, frames=6), model=CONFIG, decoder=DecoderSettings(depth=3), mask_ratio=0.5,
        normalised=False,
    )  # fmt: skip
    model = build(settings)
    assert (model.config, model.decoder_settings.depth, model.mask_ratio, model.normalised) == (CONFIG, 3, 0.5, False)


def test_the_loss_is_the_mean_square() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(Reconstruction(a, b).loss(), F.mse_loss(a, b))


def test_graphs_are_refused_as_masks_are_drawn_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"run\.graphs is for cast train: .* set it false"):
        load_recipe(PretrainSettings, "videomae-digits", "run.graphs=true")
