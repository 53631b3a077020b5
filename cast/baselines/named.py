"""The paper's models by name, and the reader of their directories."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from cast.baselines.saved import read_saved
from cast.baselines.single import SingleExpert
from cast.baselines.two_stream import Design, TwoStream
from cast.model.config import CASTConfig

_TUNED: dict[str, Any] = {"adapters": "none", "trained": "all"}

#: Name -> design. Omitted fields are CAST's.
DESIGNS: Mapping[str, Design] = {
    "cast": Design(),
    "independent": Design(exchange="none", **_TUNED),  # Table 1(a), without adapters
    # Table 1(a) with adapters = Table 1(c) Identity = Table 1(g) independent: AIM's three adapters in CLIP.
    "independent-adapters": Design(exchange="none", adapters="aim"),
    "late-add": Design(exchange="none", fusion="add", **_TUNED),  # Table 1(b), Fig. 7
    "late-concat": Design(exchange="none", fusion="concat", **_TUNED),
    "lateral": Design(exchange="lateral", **_TUNED),
    "without-adapter": Design(exchange="attention"),  # Table 1(c), Fig. 8
    "attention-adapter": Design(exchange="attention-adapter"),
    "clip-clip": Design(temporal="clip"),  # Table 1(h): spatial-temporal
    "videomae-clip": Design(spatial="videomae", temporal="clip"),
    "videomae-videomae": Design(spatial="videomae"),
    "in21k-independent": Design(spatial="timm:vit_base_patch16_224.augreg_in21k", exchange="none"),  # Table 5
    "in21k-videomae": Design(spatial="timm:vit_base_patch16_224.augreg_in21k"),
    "clip-mvd": Design(temporal="mvd"),  # Table 7
    "eva-videomae": Design(spatial="timm:eva02_base_patch16_clip_224"),
    "eva-mvd": Design(spatial="timm:eva02_base_patch16_clip_224", temporal="mvd"),
}
#: Name -> (expert, its adapters), for one expert with heads for verb and noun: the members of Table 1(a)'s ensemble.
SINGLES: Mapping[str, tuple[str, Literal["none", "cast", "aim"]]] = {
    "single-spatial": ("clip", "aim"),
    "single-temporal": ("videomae", "cast"),
}


def build(name: str, config: CASTConfig | str = "base", fused: bool = True, **overrides: Any) -> TwoStream:
    """The two-stream model with this name in the paper's tables, with random weights.

    Args:
        name: a key of `DESIGNS`.
        config: a name in `cast.VARIANTS`, or a CASTConfig.
        fused: whether ops may run in compiled kernels.
        overrides: fields of CASTConfig, for example `heads`.

    Raises:
        ValueError: an unknown name, or sizes that are impossible for the experts.
    """
    if name not in DESIGNS:
        raise ValueError(f"unknown baseline {name!r}; there are {', '.join(DESIGNS)}")
    return TwoStream(DESIGNS[name], config, fused, **overrides)


def read_baseline(directory: str | os.PathLike[str], fused: bool = True) -> TwoStream | SingleExpert:
    """The baseline of either kind that `save_pretrained` wrote, in evaluation mode.

    Raises:
        FileNotFoundError: no `config.json` or `model.safetensors`.
        ValueError: a `config.json` of another kind of model, or other tensors.
    """
    single = is_baseline(directory) and "expert" in read_saved(directory, "config")
    return SingleExpert.from_pretrained(directory, fused) if single else TwoStream.from_pretrained(directory, fused)


def is_baseline(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory has a baseline's configuration, not CAST's or none."""
    try:
        about = read_saved(directory, "config")
    except (OSError, ValueError):
        return False
    return "design" in about or "expert" in about
