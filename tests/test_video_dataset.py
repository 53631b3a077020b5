"""Clips from real files: right frames, right labels, and the same ones whatever reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from video_files import numbers, write_video

from cast.video.annotations import Sample
from cast.video.dataset import VideoDataset
from cast.video.reader import VideoError
from cast.video.sampling import view_indices
from cast.video.transforms import train_transform, view_transform
from cast.video.views import Protocol, normalise


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("videos")
    lengths = [100, 40, 10, 64]
    paths = [write_video(folder / f"{length}.mp4", count=length) for length in lengths]
    return [Sample(path, {"verb": index, "noun": 9 - index}) for index, path in enumerate(paths)]


def frame_numbers(clip: torch.Tensor) -> list[int]:
    return numbers(clip.permute(1, 2, 3, 0).numpy())


def validation(samples: list[Sample]) -> VideoDataset:
    return VideoDataset(samples, lambda video: video, train=False)


def training(samples: list[Sample], seed: int = 0) -> VideoDataset:
    return VideoDataset(samples, train_transform(32, flip=True), train=True, seed=seed)


def test_validation_clips_show_the_middles_of_their_video(samples: list[Sample]) -> None:
    dataset = validation(samples)
    assert len(dataset) == 4
    for index, length in enumerate([100, 40, 10, 64]):
        clip, labels = dataset[index]
        assert clip.shape == (3, 16, 48, 64)
        assert frame_numbers(clip) == view_indices(length, 0, 1).tolist()
        assert labels == {"verb": index, "noun": 9 - index}


def test_training_clips_depend_on_seed_epoch_and_index_alone(samples: list[Sample]) -> None:
    dataset = training(samples)
    torch.manual_seed(1)
    first = [dataset[index][0] for index in range(4)]
    torch.manual_seed(2)
    again = [dataset[index][0] for index in reversed(range(4))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    dataset.set_epoch(1)
    other_epoch = [dataset[index][0] for index in range(4)]
    assert not any(torch.equal(a, b) for a, b in zip(first, other_epoch, strict=True))
    other_seed = [training(samples, seed=1)[index][0] for index in range(4)]
    assert not any(torch.equal(a, b) for a, b in zip(first, other_seed, strict=True))
    dataset.set_epoch(0)
    assert torch.equal(dataset[2][0], first[2])


def test_reading_a_clip_leaves_the_global_generator_alone(samples: list[Sample]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _ = training(samples)[0]
    assert torch.equal(torch.rand(3), expected)


WORKERS = {"fork": 2, "spawn": 1}  # a spawned one imports torch anew


@pytest.mark.parametrize("context", WORKERS)
def test_workers_give_the_same_clips_and_follow_the_epoch(samples: list[Sample], context: str) -> None:
    dataset = VideoDataset(
        samples * 2, v2.Compose([view_transform(40), train_transform(32, flip=True, normalise=False)]), train=True
    )
    loader = DataLoader(
        dataset,
        batch_size=3,
        num_workers=WORKERS[context],
        persistent_workers=True,
        multiprocessing_context=context,
        timeout=120,
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        batches = list(loader)
        videos = torch.cat([video for video, _ in batches])
        verbs = torch.cat([labels["verb"] for _, labels in batches])
        assert verbs.tolist() == [0, 1, 2, 3] * 2
        assert torch.equal(videos, torch.stack([dataset[index][0] for index in range(8)]))


def test_a_bad_video_is_named_across_the_process_boundary(samples: list[Sample], tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    dataset = VideoDataset([Sample(empty, {"verb": 0})], view_transform(32), train=True)
    with pytest.raises(VideoError, match=r"empty\.mp4: is empty"):
        next(iter(DataLoader(dataset, num_workers=1)))


def test_missing_videos_are_counted_at_once(samples: list[Sample], tmp_path: Path) -> None:
    missing = Sample(tmp_path / "gone.mp4", {"verb": 0})
    with pytest.raises(ValueError, match=r"1 of 5 videos are missing: .*gone.mp4"):
        VideoDataset([*samples, missing], view_transform(32), train=False)
    with pytest.raises(ValueError, match="0 of 0 videos are missing: there are no samples"):
        VideoDataset([], view_transform(32), train=False)


def test_the_data_set_is_deprecated(samples: list[Sample]) -> None:
    with pytest.warns(DeprecationWarning, match=r"ClipLoader makes batches, and cast\.video\.views\.Protocol"):
        validation(samples)


@pytest.mark.parametrize(("sampling", "views"), [("uniform", 2), ("dense", 5)])
def test_views_of_a_video_are_the_published_ones(samples: list[Sample], sampling: str, views: int) -> None:
    clips = list(normalise(Protocol(sampling, size=32).read(samples[0].path)))
    assert len(clips) == views * 3
    assert all(clip.shape == (3, 16, 32, 32) and clip.dtype == torch.float32 for clip in clips)
    for view in range(views):
        left, middle, right = clips[3 * view : 3 * view + 3]
        expected = view_indices(100, view, views, sampling)
        # A bar is 5.3 pixels wide: digit i is read at its middle, in whichever crop holds it.
        columns = (np.arange(8) + 0.5) * 42 / 8
        bits = [(left[0, :, 16, int(x)] if x < 32 else right[0, :, 16, int(x) - 10]) > 0 for x in columns]
        assert sum(bit.long() << i for i, bit in enumerate(bits)).tolist() == expected.tolist()
        assert torch.equal(middle[..., :26], left[..., 5:31])
