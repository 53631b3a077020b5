"""The example with B-CAST between two models of timm that differ in width, depth and patches."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from test_examples import example, refused

SIZE, FRAMES = 32, 4


@pytest.fixture(scope="module")
def two_vits() -> ModuleType:
    return example("exchange_for_any_two_vits")


def build(two_vits: ModuleType, **spatial: Any) -> Any:
    """8 x 8 patches of width 32 in 2 blocks; 4 x 4 of width 48 in 3."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    common: dict[str, Any] = {"img_size": SIZE, "num_classes": 0, "num_heads": 2}
    name = "vit_tiny_patch16_224"
    options = {"patch_size": 4, "depth": 2, "embed_dim": 32, **spatial}
    one = timm.create_model(name, **options, **common)
    other = timm.create_model(name, patch_size=8, depth=3, embed_dim=48, reg_tokens=2, **common)
    return two_vits.TwoViTs(one, other, frames=FRAMES, classes=4, dim=32, heads=2)


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.state_dict().items() if ".model." in name}


def test_two_models_train_through_the_exchange(two_vits: ModuleType) -> None:
    model = build(two_vits)
    assert len(model.exchanges) == 2
    assert {exchange.num_patches for exchange in model.exchanges} == {16}
    before, untrained = frozen(model), [p.clone() for p in model.exchanges.parameters()]
    assert len(before) > 60
    losses = two_vits.train(model, 80, FRAMES, SIZE, lr=3e-3)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen(model).items())
    assert all(not torch.equal(a, b) for a, b in zip(untrained, model.exchanges.parameters(), strict=True))
    video, _ = two_vits.make_clips(4, FRAMES, SIZE, seed=-1)
    assert two_vits.difference(model, video) < 1e-5
    assert runs_on(model) == {"auto"}


def runs_on(model: Any) -> set[str]:
    return {exchange.backend for exchange in model.exchanges}


def test_the_difference_is_of_fused_and_eager_runs(two_vits: ModuleType) -> None:
    model = build(two_vits)
    calls: list[str] = []
    for exchange in model.exchanges:
        exchange.register_forward_hook(lambda module, given, result: calls.append(module.backend))
    video, _ = two_vits.make_clips(2, FRAMES, SIZE, seed=0)
    two_vits.difference(model, video)
    assert calls == ["auto", "auto", "eager", "eager"]


def test_before_the_first_step_both_models_are_what_they_were(two_vits: ModuleType) -> None:
    model = build(two_vits).eval()
    video, _ = two_vits.make_clips(2, FRAMES, SIZE, seed=0)
    frames = video.transpose(1, 2).flatten(0, 1)
    change = (video - video.roll(1, 2)).transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        tokens = [e.model.forward_features(x) for e, x in ((model.spatial, frames), (model.temporal, change))]
        alone = torch.cat([x.mean(1).unflatten(0, (2, FRAMES)).mean(1) for x in tokens], -1)
        torch.testing.assert_close(model(video), model.head(alone))


def test_models_that_do_not_fit_are_refused(two_vits: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the spatial model has no class token"):
        build(two_vits, class_token=False, global_pool="avg")
    with pytest.raises(
        ValueError, match="frames of 32 pixels are no whole number of the spatial model's patches of 12"
    ):
        build(two_vits, patch_size=12)
    refuse = [
        (["--spatial", "vit_nonsense"], "timm has no model 'vit_nonsense'"),
        (["--temporal", "eva02_tiny_patch14_224", "--size", "56"], "the temporal model is a Eva"),
        (["--spatial", "resnet18"], "the spatial model 'resnet18' takes no size of frames; this example calls"),
        (["--temporal", "vit_tiny_patch16_224.nonsense"], "the temporal model can't be made: Invalid pretrained tag"),
        (["--size", "8"], "frames of 8 pixels are no whole number of the spatial model's patches of 16"),
        (["--steps", "0"], "--size, --frames and --steps must be at least 1"),
    ]
    for words, message in refuse:
        assert message in refused(two_vits.main, ["--spatial", "vit_tiny_patch16_224", *words], capsys)


def test_the_command_says_what_it_did(two_vits: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    two_vits.main(["--spatial", "vit_tiny_patch16_224", "--steps", "1", "--size", "32", "--frames", "2"])
    said = capsys.readouterr().out
    assert "12 exchanges" in said
    assert "backend='auto' -> 'cpu'" in said
    assert "fused and eager exchanges: their logits differ by" in said
