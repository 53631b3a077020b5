"""How much of a baseline trains: the paper's counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cast.baselines import TwoStream, build

EK100 = {"verb": 97, "noun": 300}


def on_meta(name: str, **overrides: Any) -> TwoStream:
    with torch.device("meta"):
        return build(name, heads=EK100, **overrides)


def tuned(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


ADAPTER = 768 * 192 * 2 + 192 + 768


HEAD = 97 * 769 + 300 * 769


NORMS = 2 * 2 * 768


EXPERTS = 85_797_888 + 86_225_664


@pytest.mark.parametrize(
    ("name", "count", "printed"),
    [
        ("cast", 44_784_781, 44.8),
        ("independent-adapters", 5 * 12 * ADAPTER + 8 * 768 + HEAD + NORMS, 18.1),
        ("independent", EXPERTS + HEAD + NORMS, None),
        ("late-add", EXPERTS + HEAD + NORMS, None),
        ("late-concat", EXPERTS + HEAD + NORMS + 2 * 768 * 768 + 768, None),
        ("lateral", EXPERTS + HEAD + NORMS + 12 * 2 * (768 * 768 + 768), None),
    ],
)
def test_tuned_parameters(name: str, count: int, printed: float | None) -> None:
    """Table 1(c) prints two of them."""
    assert tuned(on_meta(name)) == count
    assert printed is None or round(count / 1e6, 1) == printed


def test_the_adapter_after_cross_attention_costs_what_the_paper_s_does() -> None:
    """93.0 - 85.9 M in Table 1(c); the two numbers themselves follow from no construction that we found."""
    wide, adapted = tuned(on_meta("without-adapter")), tuned(on_meta("attention-adapter"))
    assert adapted - wide == 2 * 12 * ADAPTER
    assert round((adapted - wide) / 1e6, 1) == 7.1
    assert wide == 75_004_045  # docs/study.md quotes it


def test_window_shapes_have_the_same_capacity() -> None:
    """Table 1(e); only the tables differ in length."""
    counts = {
        sum(p.numel() for n, p in on_meta("cast", windows=windows).named_parameters() if "_pos" not in n)
        for windows in (("space-time", "space-time"), ("space-time", "space"), ("space", "space"), ("time", "space"))
    }
    assert len(counts) == 1


@pytest.mark.parametrize(("variant", "width"), [("small", 384), ("base", 768), ("large", 1024)])
def test_the_sizes_s_b_l(variant: str, width: int) -> None:
    model = on_meta("cast", config=variant)
    assert model.temporal.expert.patch_embed.proj.weight.shape[0] == width
    assert len(model.blocks) == (24 if variant == "large" else 12)
