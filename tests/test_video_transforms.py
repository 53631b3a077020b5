"""Crops, resizing and normalisation, seen from the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cast.video.transforms import MEAN, STD, to_clip, train_transform, view_transform


def gradient(height: int, width: int, frames: int = 4) -> np.ndarray:
    """Frames whose red is the row, green the column, blue the frame number."""
    frame = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., :2] = frame
    video[..., 2] = np.arange(frames)[:, None, None]
    return video


@pytest.mark.parametrize(("crop", "left"), [(0, 0), (1, 30), (2, 60)])
def test_three_crops_along_the_longer_side(crop: int, left: int) -> None:
    frames = gradient(100, 160)
    clip = to_clip(frames, view_transform(100, crop, 3, normalise=False))
    assert clip.shape == (3, 4, 100, 100)
    assert clip.dtype == torch.uint8
    np.testing.assert_array_equal(clip.permute(1, 2, 3, 0), frames[:, :, left : left + 100])

    tall = np.ascontiguousarray(frames.transpose(0, 2, 1, 3))
    clip = to_clip(tall, view_transform(100, crop, 3, normalise=False))
    np.testing.assert_array_equal(clip.permute(1, 2, 3, 0), tall[:, left : left + 100])


def test_one_crop_is_the_centre() -> None:
    frames = gradient(100, 160)
    clip = to_clip(frames, view_transform(100, normalise=False))
    np.testing.assert_array_equal(clip.permute(1, 2, 3, 0), frames[:, :, 30:130])


def test_resize_is_bilinear_without_antialiasing() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), dtype=np.uint8)
    clip = to_clip(frames, view_transform(20, 0, 3, normalise=False))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).double()
    expected = torch.nn.functional.interpolate(pixels, (20, 30), mode="bilinear", align_corners=False)[..., :20]
    assert (clip.transpose(0, 1).double() - expected).abs().max() <= 1


def test_normalisation_is_imagenets() -> None:
    frames = np.full((2, 32, 32, 3), (255, 0, 128), np.uint8)
    clip = to_clip(frames, view_transform(16))
    expected = (torch.tensor([1, 0, 128 / 255]) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert clip.dtype == torch.float32
    assert type(clip) is torch.Tensor
    assert clip.is_contiguous()
    torch.testing.assert_close(clip, expected[:, None, None, None].expand(3, 2, 16, 16))


def test_training_crops_are_the_same_for_every_frame_and_differ_between_draws() -> None:
    transform = train_transform(24, normalise=False)
    draws = []
    for seed in range(5):
        torch.manual_seed(seed)
        clip = to_clip(gradient(100, 160), transform)
        assert clip.shape == (3, 4, 24, 24)
        assert (clip[:2] == clip[:2, :1]).all()
        assert clip[2, :, 0, 0].tolist() == [0, 1, 2, 3]
        draws.append(clip)
    assert all(not torch.equal(draws[0], other) for other in draws[1:])


def test_scale_and_ratio_bound_the_crop() -> None:
    transform = train_transform(40, scale=(1.0, 1.0), ratio=(1.0, 1.0), normalise=False)
    clip = to_clip(gradient(40, 40), transform)
    np.testing.assert_array_equal(clip.permute(1, 2, 3, 0), gradient(40, 40))


@pytest.mark.parametrize(("flip", "both"), [(False, False), (True, True)])
def test_mirroring_happens_only_if_asked(flip: bool, both: bool) -> None:
    transform = train_transform(40, flip=flip, normalise=False)
    torch.manual_seed(0)
    mirrored = set()
    for _ in range(40):
        clip = to_clip(gradient(100, 100), transform)
        mirrored.add(bool(clip[1, 0, 0, 0] > clip[1, 0, 0, -1]))
    assert (True in mirrored) == both
    assert False in mirrored


def test_any_callable_is_a_transform_if_it_keeps_frames_and_channels() -> None:
    frames = gradient(10, 10)
    assert to_clip(frames, lambda video: video[..., :5, :5]).shape == (3, 4, 5, 5)
    with pytest.raises(ValueError, match=r"made \[3, 3, 10, 10\] of \[4, 3, 10, 10\]"):
        to_clip(frames, lambda video: video[1:])


def test_a_crop_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="crop is 3 of 3"):
        view_transform(16, crop=3, crops=3)
