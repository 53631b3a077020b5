"""Weights as other codes store them: MMAction2's names, another image size, a moving average beside or alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cast_models import SMALL, open_clip_model, randomise, read_golden, under
from log_messages import log_messages
from torch import Tensor

import cast
from cast.model.layers import sincos_table

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return under(read_golden("cast_compositional_tiny")[1], "weight.")


def as_mmaction(weights: Weights) -> Weights:
    """VideoMAE's tensors as MMAction2's VisionTransformer names them in its source, with its position table."""
    names = {"patch_embed.proj.": "patch_embed.projection.", "mlp.fc1.": "mlp.layers.0.0.", "mlp.fc2.": "mlp.layers.1."}
    renamed = {}
    for key, tensor in weights.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        renamed[f"backbone.{key}"] = tensor
    return renamed | {"cls_head.fc_cls.weight": torch.randn(3, 16), "cls_head.fc_cls.bias": torch.randn(3)}


@pytest.mark.parametrize("half", [False, True])
def test_videomae_as_mmaction_stores_it(half: bool, tmp_path: Path) -> None:
    expert = randomise(cast.TemporalExpert(**SMALL).float(), seed=3)
    clip = torch.rand(2, 3, *(expert.config.num_frames, *[expert.config.image_size] * 2))
    for table in (expert.pos_embed, sincos_table(2 * expert.pos_embed.shape[1], expert.config.embed_dim)):
        stored = as_mmaction(expert.state_dict()) | {"backbone.pos_embed": table.half() if half else table}
        torch.save({"meta": {"epoch": 9}, "state_dict": stored}, tmp_path / "mm.pth")
        loaded = cast.TemporalExpert(**SMALL).load(tmp_path / "mm.pth")
        assert torch.equal(loaded.features(clip), expert.features(clip))
        model = cast.CAST(**SMALL).load_experts(videomae=tmp_path / "mm.pth")
        assert torch.equal(model.blocks[1].mlp.fc2.weight, expert.blocks[1].mlp.fc2.weight)
    learned = stored | {"backbone.pos_embed": expert.pos_embed + 0.01 * torch.randn_like(expert.pos_embed)}
    with pytest.raises(ValueError, match="unknown keys: pos_embed"):
        cast.TemporalExpert(**SMALL).load(learned)
    with pytest.raises(ValueError, match=r"unknown keys: blocks\.0\.gamma_1"):
        cast.TemporalExpert(**SMALL).load(stored | {"backbone.blocks.0.gamma_1": torch.ones(16)})


@pytest.mark.parametrize("image_size", [32, 40, 80])
def test_clip_s_positions_are_interpolated_as_open_clip_does(image_size: int) -> None:
    from open_clip.model import resize_pos_embed

    source = open_clip_model().visual
    model = cast.CAST(**(SMALL | {"image_size": image_size}))
    theirs = {"visual.positional_embedding": source.positional_embedding.detach().clone()}
    grid = image_size // model.config.patch_size
    resize_pos_embed(theirs, SimpleNamespace(visual=SimpleNamespace(grid_size=(grid, grid))))
    expected = theirs["visual.positional_embedding"]
    assert expected.shape == (1 + grid**2, 16)
    expert = cast.SpatialExpert(**(SMALL | {"image_size": image_size}))
    model.load_experts(clip=source.state_dict())
    for loaded in (model.clip_positional_embedding, expert.load(source.state_dict()).positional_embedding):
        assert torch.allclose(loaded, expected, rtol=0, atol=1e-6)
    again = cast.SpatialExpert(**(SMALL | {"image_size": image_size})).load(expert)
    assert torch.equal(again.positional_embedding, expert.positional_embedding)


def test_positions_that_are_no_square_do_not_fit() -> None:
    state = cast.SpatialExpert(**SMALL).state_dict()
    for rows in (0, 1, 3, 7):
        with pytest.raises(ValueError, match=rf"other shapes: positional_embedding is \[{rows}, 16\]"):
            cast.CAST(**SMALL).load_experts(clip=state | {"positional_embedding": torch.zeros(rows, 16)})


def test_both_experts_load_at_another_image_size() -> None:
    other = SMALL | {"image_size": 48}
    model = cast.CAST(**other).load_experts(clip=cast.SpatialExpert(**SMALL), videomae=cast.TemporalExpert(**SMALL))
    assert torch.equal(model.pos_embed, sincos_table(model.pos_embed.shape[1], 16).to(model.pos_embed))


AVERAGES = {
    "timm": lambda weights: {"state_dict_ema": weights},
    "videomae": lambda weights: {"model_ema": weights, "epoch": 3},
    "mmengine": lambda weights: {
        "ema_state_dict": {"steps": torch.tensor(7), **{f"module.{key}": value for key, value in weights.items()}}
    },
    "torch": lambda weights: {
        "ema": {"n_averaged": torch.tensor(7), **{f"module.{key}": value for key, value in weights.items()}}
    },
    "nested": lambda weights: {"ema_model": {"state_dict": weights}, "model": {}},
}


@pytest.mark.parametrize("code", AVERAGES)
def test_a_checkpoint_with_the_average_alone_loads(code: str, weights: Weights) -> None:
    with log_messages("cast.model.weights.source") as told:
        state = cast.load_official_checkpoint(AVERAGES[code](weights), num_heads=4).state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    assert not told


@pytest.mark.parametrize("place", ["state_dict", "model", "module"])
def test_of_weights_and_average_the_weights_are_taken_and_it_is_said(place: str, weights: Weights) -> None:
    average = {key: value + 1 for key, value in weights.items()}
    with log_messages("cast.model.weights.source") as told:
        state = cast.load_official_checkpoint({"model_ema": average, place: weights}, num_heads=4).state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    assert len(told) == 1
    assert f"weights under '{place}' and others under 'model_ema': the former are taken" in told[0]
