"""Mixup and CutMix beside timm's, which knows pictures and one label; and what two heads and many frames add."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data import mixup as timm_mixup

from cast.video.augment import AugmentSettings
from cast.video.mixing import Mixing

CLASSES = {"verb": 7, "noun": 11}


def batch(count: int = 4, frames: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(count, 3, frames, 20, 24, generator=generator)
    return video, {head: torch.randint(number, (count,), generator=generator) for head, number in CLASSES.items()}


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_is_mixed_as_timm_mixes_pictures(kind: str, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    video, labels = batch()
    mixing = Mixing(**{f"{kind}_alpha": 0.8}, smoothing=smoothing)
    mixed, targets = mixing(video, labels, CLASSES, 5)
    (drawn,) = mixing._draw(np.random.default_rng(5), 1, 20, 24)

    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=0.8, label_smoothing=smoothing, num_classes=CLASSES["noun"])
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (drawn.share, kind == "cutmix"))
    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", lambda *a, **k: (drawn.box, drawn.share))
    # timm cuts the third and fourth dimension, so frames must stand among the channels.
    expected, target = theirs(video.clone().flatten(1, 2), labels["noun"])
    torch.testing.assert_close(mixed, expected.view_as(video))
    torch.testing.assert_close(targets["noun"], target)
    assert 0 < drawn.share < 1


def test_a_recipes_settings_reach_the_mixing() -> None:
    settings = AugmentSettings(
        mixup=0.8, cutmix=0.6, mix_probability=0.9, mix_switch=0.3, mix_mode="elem", smoothing=0.2
    )
    assert Mixing.of(settings) == Mixing(0.8, 0.6, 0.9, 0.3, 0.2, "elem")


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_all_heads_and_frames_share_what_was_drawn(kind: str, mode: str) -> None:
    count = 6
    video = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(count, 3, 4, 20, 24).clone()
    labels = {"verb": torch.arange(count), "noun": torch.arange(count) + 4}
    mixed, targets = Mixing(**{f"{kind}_alpha": 0.8}, mode=mode)(video, labels, CLASSES, (1, 2))
    assert (mixed == mixed[:, :1, :1]).all()  # each channel and frame alike
    shares = [targets[head][torch.arange(count), labels[head]] for head in CLASSES]
    torch.testing.assert_close(shares[0], shares[1])
    own = torch.arange(count, dtype=torch.float32)
    mean = own * shares[0] + own.flip(0) * (1 - shares[0])  # the labels' share is the pixels' share
    torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), mean, rtol=0, atol=1e-5)
    assert (len(set(shares[0].tolist())) == 1) == (mode == "batch")


def test_without_mixing_labels_are_smoothed_and_pixels_stay() -> None:
    video, labels = batch(3)
    mixed, targets = Mixing(mixup_alpha=0.8, probability=0.0, smoothing=0.1)(video, labels, CLASSES, 0)
    assert torch.equal(mixed, video)
    for head, number in CLASSES.items():
        expected = torch.full((3, number), 0.1 / number)
        expected[torch.arange(3), labels[head]] += 0.9
        torch.testing.assert_close(targets[head], expected)
        torch.testing.assert_close(targets[head].sum(1), torch.ones(3))


def test_smoothed_targets_give_pytorchs_smoothed_loss() -> None:
    video, labels = batch(5)
    _, targets = Mixing(smoothing=0.1)(video, labels, CLASSES, 0)
    logits = torch.randn(5, CLASSES["noun"], generator=torch.Generator().manual_seed(1))
    ours = torch.nn.functional.cross_entropy(logits, targets["noun"])
    theirs = torch.nn.functional.cross_entropy(logits, labels["noun"], label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)


def test_lambda_probability_and_switch_follow_their_distributions() -> None:
    mixing = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.9, switch_probability=0.25)
    drawn = mixing._draw(np.random.default_rng(0), 8000, 64, 64)
    mixed = [mix for mix in drawn if mix.share < 1]
    cut = [mix for mix in mixed if mix.box]
    shares = np.array([mix.share for mix in mixed if not mix.box])
    assert len(mixed) / 8000 == pytest.approx(0.9, abs=0.03)  # a box may be empty
    assert len(cut) / len(mixed) == pytest.approx(0.25, abs=0.03)
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.005)  # of Beta(0.8, 0.8)


def test_the_same_seed_mixes_the_same_way_and_arguments_stay() -> None:
    video, labels = batch()
    before = video.clone()
    mixing = Mixing(mixup_alpha=0.8, cutmix_alpha=0.8)
    first, again, other = (mixing(video, labels, CLASSES, seed)[0] for seed in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(video, before)


def test_labels_that_do_not_fit_are_refused() -> None:
    video, labels = batch()
    with pytest.raises(ValueError, match=r"labels for 'noun', but classes are given for \['verb'\]"):
        Mixing()(video, labels, {"verb": 7}, 0)
    with pytest.raises(ValueError, match=r"labels of 'noun' are .* classes are 2"):
        Mixing()(video, labels, {"verb": 7, "noun": 2}, 0)
