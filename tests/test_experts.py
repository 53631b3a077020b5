"""Each expert against the libraries that its weights come from: random weights, every layout, fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cast_models import SMALL, open_clip_model, randomise
from torch import Tensor, nn

import cast

CLIP_SOURCES = ["open_clip visual", "open_clip", "timm", "transformers", "transformers CLIPModel", "SpatialExpert"]
HEADS = SMALL["num_heads"]
WIDTH, DEPTH, SIZE, PATCH = SMALL["embed_dim"], SMALL["depth"], SMALL["image_size"], SMALL["patch_size"]


def timm_model() -> nn.Module:
    timm = pytest.importorskip("timm")
    size = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return randomise(timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=6, **size)).eval()


def hugging_face_clip(whole: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    size = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH}
    vision = transformers.CLIPVisionConfig(
        **size, num_attention_heads=HEADS, intermediate_size=4 * WIDTH, hidden_act="quick_gelu"
    )
    if not whole:
        return randomise(transformers.CLIPVisionModel(vision)).eval()
    text = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=6)
    return randomise(transformers.CLIPModel(config)).eval()


def clip_source(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A module to load from, its output for frames, and what turns our pooled features into that output."""
    if name.startswith("open_clip"):
        clip = open_clip_model().double()
        return (clip.visual if "visual" in name else clip), clip.visual, lambda features: features @ clip.visual.proj
    if name == "timm":
        model = timm_model().double()
        return model, model, model.head
    if name == "SpatialExpert":
        expert = randomise(cast.SpatialExpert(heads={"noun": 3}, **SMALL)).double()
        return expert, expert.features, nn.Identity()
    model = hugging_face_clip("CLIPModel" in name).double()
    vision = model.vision_model if "CLIPModel" in name else model
    return model, lambda frames: vision(frames).pooler_output, nn.Identity()


@pytest.mark.parametrize("name", CLIP_SOURCES)
def test_spatial_expert_is_clip(name: str) -> None:
    source, theirs, projection = clip_source(name)
    frames = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    expert = cast.SpatialExpert(**SMALL).double().load(source)
    torch.testing.assert_close(projection(expert.features(frames)), theirs(frames), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CLIP_SOURCES)
def test_cast_holds_clip(name: str) -> None:
    """The tensors that CAST took compute the same inside it."""
    source, _, _ = clip_source(name)
    expert = cast.SpatialExpert(**SMALL).double().load(source)
    model = cast.CAST(**SMALL).double().load_experts(clip=source)
    video = torch.randn(2, 3, 6, SIZE, SIZE, dtype=torch.float64)
    spatial, _ = model.tokens(video)
    frames = video[:, :, 1::2].transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(spatial.flatten(0, 1), expert.tokens(frames), rtol=1e-12, atol=1e-12)
    pooled = expert.ln_post(spatial[:, :, 0].mean(1))
    torch.testing.assert_close(model.features(video)[0], pooled, rtol=1e-12, atol=1e-12)


def hugging_face_videomae(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=SIZE,
        patch_size=PATCH,
        num_frames=SMALL["num_frames"],
        tubelet_size=2,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        layer_norm_eps=1e-6,  # their default of 1e-12 is not what the official code trained with
        num_labels=5,
        decoder_hidden_size=8,
        decoder_num_attention_heads=2,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=16,
    )
    return randomise(getattr(transformers, kind)(config)).double().eval()


def old_bias_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers 4 and the files on its hub have them."""
    return {k.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): v for k, v in state.items()}


def official(state: dict[str, Tensor], prefix: str = "", extra: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """transformers' VideoMAEModel in the official layout, written out once more and independently."""
    out = {f"patch_embed.proj.{p}": state[f"embeddings.patch_embeddings.projection.{p}"] for p in ("weight", "bias")}
    for i in range(DEPTH):
        theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
        attention = f"{theirs}attention.attention."
        out[f"{ours}attn.qkv.weight"] = torch.cat([state[f"{attention}{n}.weight"] for n in ("query", "key", "value")])
        out[f"{ours}attn.q_bias"] = state[f"{attention}query.bias"]
        out[f"{ours}attn.v_bias"] = state[f"{attention}value.bias"]
        for a, b in (
            ("norm1", "layernorm_before"),
            ("attn.proj", "attention.output.dense"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            for p in ("weight", "bias"):
                out[f"{ours}{a}.{p}"] = state[f"{theirs}{b}.{p}"]
    return {prefix + key: value for key, value in out.items()} | (extra or {})


def videomae_source(name: str) -> tuple[Any, nn.Module]:
    """Something to load from, and transformers' encoder with the same weights."""
    if name == "transformers VideoMAEModel":
        model = hugging_face_videomae("VideoMAEModel")
        return model, model
    if name.startswith("transformers"):
        whole = hugging_face_videomae(name.split()[1])
        state = whole.state_dict()
        return (old_bias_names(state) if "v4" in name else state), whole.videomae
    model = hugging_face_videomae("VideoMAEModel")
    state, zeros = model.state_dict(), torch.zeros(WIDTH)
    if name == "official pre-trained":
        decoder = {"decoder.blocks.0.norm1.weight": zeros, "mask_token": zeros, "encoder_to_decoder.weight": zeros}
        return {"model": official(state, "encoder.", {"encoder.norm.weight": zeros} | decoder), "epoch": 799}, model
    if name == "official fine-tuned":
        return {"module": official(state, "backbone.", {"head.weight": zeros, "head.bias": zeros})}, model
    return randomise(cast.TemporalExpert(**SMALL)).double().load(official(state)), model


VIDEOMAE_SOURCES = [
    "transformers VideoMAEModel",
    "transformers VideoMAEForPreTraining",
    "transformers VideoMAEForVideoClassification",
    "transformers VideoMAEForVideoClassification v4",
    "official pre-trained",
    "official fine-tuned",
    "TemporalExpert",
]


@pytest.mark.parametrize("name", VIDEOMAE_SOURCES)
def test_temporal_expert_is_videomae(name: str) -> None:
    source, encoder = videomae_source(name)
    if encoder.layernorm is not None:  # after pre-training: a norm that CAST has no use for
        encoder.layernorm = nn.Identity()
    video = torch.randn(2, 3, 6, SIZE, SIZE, dtype=torch.float64)
    expected = encoder(video.transpose(1, 2)).last_hidden_state
    expert = cast.TemporalExpert(**SMALL).double().load(source)
    torch.testing.assert_close(expert.tokens(video), expected, rtol=1e-6, atol=1e-6)  # tables are fp32 in both
    model = cast.CAST(**SMALL).double().load_experts(videomae=source)
    torch.testing.assert_close(model.tokens(video)[1].flatten(1, 2), expert.tokens(video), rtol=1e-12, atol=1e-12)


def test_query_and_value_biases_are_kept() -> None:
    source = hugging_face_videomae("VideoMAEModel")
    for state in (source.state_dict(), old_bias_names(source.state_dict())):
        model = cast.CAST(**SMALL).double().load_experts(videomae=state)
        attention = source.encoder.layer[1].attention.attention
        assert model.blocks[1].attn.q_bias.abs().max() > 0.1
        assert torch.equal(model.blocks[1].attn.q_bias, attention.query.bias)
        assert torch.equal(model.blocks[1].attn.v_bias, attention.value.bias)


def test_fine_tuned_norm_goes_to_the_expert_and_not_to_cast() -> None:
    source = hugging_face_videomae("VideoMAEForVideoClassification")
    expert = cast.TemporalExpert(**SMALL).double().load(source)
    assert torch.equal(expert.fc_norm.weight, source.fc_norm.weight)
    video = torch.randn(2, 3, 6, SIZE, SIZE, dtype=torch.float64)
    logits = source.classifier(expert.features(video))
    torch.testing.assert_close(logits, source(video.transpose(1, 2)).logits, rtol=1e-6, atol=1e-6)
    model = cast.CAST(**SMALL).double().load_experts(videomae=source)
    assert (model.vmae_fc_norm.weight == 1).all()


def test_heads_and_features() -> None:
    spatial, temporal = cast.SpatialExpert("tiny", {"noun": 10}), cast.TemporalExpert("tiny", {"verb": 12})
    assert spatial(torch.randn(2, 3, 48, 48))["noun"].shape == (2, 10)
    assert temporal(torch.randn(2, 3, 16, 48, 48))["verb"].shape == (2, 12)
    assert cast.SpatialExpert("tiny")(torch.randn(2, 3, 48, 48))["features"].shape == (2, 64)
    assert all(p.requires_grad for p in (*spatial.parameters(), *temporal.parameters()))


def test_bad_shape() -> None:
    with pytest.raises(ValueError, match=r"frames have shape \[2, 3, 16, 48, 48\]; this model takes \[B, 3, 48, 48\]"):
        cast.SpatialExpert("tiny")(torch.zeros(2, 3, 16, 48, 48))
    with pytest.raises(ValueError, match=r"clips have shape .* takes \[B, 3, 16, 48, 48\] \(batch, channels, frames"):
        cast.TemporalExpert("tiny")(torch.zeros(2, 3, 48, 48))
