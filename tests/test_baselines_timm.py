"""timm's image models as experts: the same answers as timm's own forward, weights in its layouts, misfits refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cast_models import SMALL, randomise, small_video
from torch import Tensor, nn

from cast.baselines import Design, TwoStream
from cast.baselines.timm_stream import TimmStream
from cast.model.config import make_config
from cast.model.layers import Adapter, Running, init_linears

timm = pytest.importorskip("timm")

CONFIG = make_config(heads={"verb": 5, "noun": 4}, **SMALL)
TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
#: Model -> options: IN-21K's ViT, CLIP's in timm, with layer scale, EVA-02 (rotary, SwiGLU, norms inside).
MODELS: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": TINY,
    "vit_base_patch16_clip_quickgelu_224": TINY,
    "vit_small_patch14_dinov2": TINY | {"init_values": 0.1},
    "eva02_base_patch16_clip_224": TINY,
    "eva02_tiny_patch14_224": TINY,
}


def stream(name: str, **options: Any) -> TimmStream:
    made = TimmStream(name, CONFIG, Running("eager"), **MODELS[name] | options)
    return randomise(made).double().eval()  # type: ignore[return-value]


@pytest.mark.parametrize("name", MODELS)
def test_without_adapters_it_is_timm_s_model(name: str) -> None:
    expert = stream(name)
    video = torch.randn(2, 3, 6, 16, 16, dtype=torch.float64)
    x = expert.embed(video)
    assert x.shape == (2, 3, 5, 16)
    for index in range(2):
        x = expert.feed(index, expert.attend(index, x, None), None, None)
    frames = video[:, :, 1::2].transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(expert.expert.norm(x.flatten(0, 1)), expert.expert.forward_features(frames))
    torch.testing.assert_close(expert.pool(x), expert.expert.norm(x[:, :, 0].mean(1)))


def test_adapters_stand_where_cast_s_do() -> None:
    expert = stream("vit_base_patch16_224")
    adapter = Adapter(16, 4).double()
    init_linears(adapter)
    randomise(adapter)
    x, block = torch.randn(2, 3, 5, 16, dtype=torch.float64), expert.expert.blocks[0]
    a = block.attn(block.norm1(x.flatten(0, 1))).view_as(x)
    torch.testing.assert_close(expert.attend(0, x, adapter), x + a + adapter(a))
    normal, factor = block.norm2(x), torch.tensor([0.0, 3.0], dtype=torch.float64)
    expected = x + block.mlp(normal) + factor[:, None, None, None] * 0.5 * adapter(normal)
    torch.testing.assert_close(expert.feed(0, x, adapter, factor), expected)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_base_patch16_clip_224"])
def test_two_streams_with_it_train_and_exchange(name: str) -> None:
    design = Design(spatial=f"timm:{name}")
    model = randomise(TwoStream(design, CONFIG, timm_options={"spatial": MODELS[name]})).double()
    video = small_video(model, dtype=torch.float64)
    before = model.eval()(video)
    torch.stack([logits.sum() for logits in before.values()]).sum().backward()
    assert not any(p.grad is not None for k, p in model.spatial.named_parameters() if not k.startswith("expert.norm."))
    assert model.spatial.expert.norm.weight.grad.any()
    assert model.blocks[0].exchange.bcast.t2s_cross.t2s_q.weight.grad.any()
    randomise(model.spatial, 9)
    assert not torch.equal(model(video)["verb"], before["verb"])


def checkpoints(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    own = model.state_dict()
    head = {"head.weight": torch.zeros(9, 16), "head.bias": torch.zeros(9)}
    trunk = {f"visual.trunk.{key}": tensor for key, tensor in own.items()}
    return {
        "timm": own | head,
        "open_clip": trunk | {"text.token_embedding.weight": head["head.weight"], "logit_scale": own["cls_token"]},
    }


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "eva02_base_patch16_clip_224"])
@pytest.mark.parametrize("layout", ["timm", "open_clip"])
def test_weights(name: str, layout: str) -> None:
    source, target = stream(name), stream(name)
    randomise(source, 5)
    target.load(checkpoints(source.expert)[layout])
    for key, tensor in source.expert.state_dict().items():
        assert torch.equal(target.expert.state_dict()[key], tensor), key
    broken = checkpoints(source.expert)["timm"]
    del broken["norm.weight"]
    with pytest.raises(ValueError, match=r"missing keys: norm\.weight"):
        target.load(broken)


def test_patches_of_14_meet_patches_of_16_at_196_pixels() -> None:
    options = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2}
    made = TimmStream(
        "vit_large_patch14_clip_quickgelu_224",
        make_config(**SMALL | {"image_size": 32, "patch_size": 16}),
        Running(),
        **options,
    )
    assert made.embed(torch.randn(2, 3, 6, 32, 32)).shape == (2, 3, 5, 16)
    with torch.device("meta"):
        large = TimmStream("vit_large_patch14_clip_quickgelu_224", make_config("large"), Running(), img_size=196)
    assert large.expert.patch_embed.grid_size == (14, 14)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_base_patch16_224", TINY | {"depth": 3}, "columns) (16, 3, 2, 2), the configuration (16, 2, 2, 2)"),
        ("vit_base_patch16_224", TINY | {"reg_tokens": 4}, "has no CLS, tokens beside CLS and patches"),
        ("resnet18", {}, "resnet18 is not built as a VisionTransformer or Eva"),
        ("vit_bass", {}, "timm has no model 'vit_bass'"),
    ],
)
def test_misfits(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TimmStream(name, CONFIG, Running(), **options)
