"""Configurations: variants, overrides, and what cannot be."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

import cast
from cast.model.config import make_config


@pytest.mark.parametrize("variant", cast.VARIANTS)
def test_variants(variant: str) -> None:
    with torch.device("meta"):
        model = cast.CAST(variant=variant, heads={"verb": 12, "noun": 10})
        config = model.config
        video = torch.empty(2, 3, config.num_frames, config.image_size, config.image_size)
    assert model(video)["noun"].shape == (2, 10)


def test_config_is_frozen_hashable_and_serialisable() -> None:
    config = make_config("tiny", {"verb": 2, "noun": 3}, exchange_layers=range(1, 3), windows=["space", "space"])
    assert hash(config) == hash(make_config(config))
    assert cast.CASTConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert make_config(config, {"action": 4}).classes == {"action": 4}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 4  # type: ignore[misc]


def test_unknown_override_names_the_closest() -> None:
    with pytest.raises(TypeError, match=r"'drop_pth'; did you mean 'drop_path'\? Allowed are image_size, "):
        cast.CAST(drop_pth=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "huge"}, "unknown variant 'huge'; there are 'base', 'small', 'large', 'tiny'"),
        ({"heads": {"verb": 3}, "depth": 0}, "depth is 0; it must be an integer of at least 1"),
        ({"heads": {"verb": 3, "object": 3}}, "allowed are one head under any name"),
        ({"heads": {}}, "allowed are one head under any name"),
        ({"heads": {"action": 0}}, "'action' has 0 classes"),
        ({"image_size": 225}, "image_size 225 is not divisible by patch_size 16"),
        ({"num_frames": 15}, "num_frames 15 is not divisible by tubelet_size 2"),
        ({"num_heads": 7}, "embed_dim 768 is not divisible by num_heads 7"),
        ({"down_ratio": 5}, "bottleneck of 153.6 channels"),
        ({"windows": ("time", "spaces")}, r"out of time, space, space-time"),
        ({"windows": None}, "windows is None; it must be a tuple"),
        ({"exchange_layers": 3}, "exchange_layers is 3; it must be a tuple"),
        ({"directions": None}, "directions is None; it must be a tuple"),
        ({"heads": ["verb", "noun"]}, "it must give a number of classes by name"),
        ({"mlp_ratio": "4"}, "mlp_ratio is '4'; it must be a finite number"),
        ({"drop_path": "0.1"}, "drop_path is '0.1'; it must be a finite number"),
        ({"down_ratio": math.nan}, "down_ratio is nan; it must be a finite number"),
        ({"directions": "t2s"}, "any of 't2s', 's2t'"),
        ({"exchange_layers": (12,)}, "blocks count from 0 to 11"),
        ({"drop_path": 1.0}, r"drop_path is 1.0; a rate lies in \[0, 1\)"),
        ({"drop_path_mode": "clip"}, "'official' or 'sample'"),
    ],
)
def test_bad_configuration(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cast.CAST(**arguments)
