"""Frame indices against the published examples and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from cast.video.sampling import train_indices, view_indices


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_two_uniform_views_are_segment_starts_and_middles() -> None:
    starts = [0, 6, 12, 18, 25, 31, 37, 43, 50, 56, 62, 68, 75, 81, 87, 93]
    middles = [3, 9, 15, 21, 28, 34, 40, 46, 53, 59, 65, 71, 78, 84, 90, 96]
    assert view_indices(100, 0, 2).tolist() == starts
    assert view_indices(100, 1, 2).tolist() == middles


@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 31, 32, 33, 100, 999])
def test_two_uniform_views_split_the_published_32_indices(length: int) -> None:
    tick = length / 16
    union = sorted([int(tick / 2 + tick * i) for i in range(16)] + [int(tick * i) for i in range(16)])
    for view in range(2):
        assert view_indices(length, view, 2).tolist() == union[view::2]


def test_one_uniform_view_takes_the_middles() -> None:
    assert view_indices(100, 0, 1).tolist() == view_indices(100, 1, 2).tolist()


@pytest.mark.parametrize("length", [16, 17, 40, 61, 64, 65, 100, 300])
def test_dense_views_are_windows_over_every_fourth_frame(length: int) -> None:
    strided = list(range(0, length, 4))
    strided += strided[-1:] * (16 - len(strided))
    for view in range(5):
        start = int(view * (len(strided) - 16) / 4)
        assert view_indices(length, view, 5, "dense").tolist() == strided[start : start + 16]


def test_one_dense_view_is_the_middle_window() -> None:
    assert view_indices(300, 0, 1, "dense").tolist() == view_indices(300, 2, 5, "dense").tolist()


def test_uniform_training_draws_once_per_segment() -> None:
    draws = np.array([train_indices(100, rng(seed)) for seed in range(300)])
    segments = np.arange(16) * 6
    assert (draws >= segments).all()
    assert (draws < segments + 6).all()
    assert all(len(np.unique(column)) == 6 for column in draws.T)  # every frame of a segment has its chance
    assert len(np.unique((draws - segments)[0])) > 1  # each segment draws for itself
    assert draws.max() == 95  # the 4 frames after 16 whole segments are never picked


def test_dense_training_steps_are_the_published_ones() -> None:
    offsets = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    starts = set()
    for seed in range(200):
        indices = train_indices(70, rng(seed), "dense")
        starts.add(int(indices[0]))
        assert (indices - indices[0]).tolist() == offsets
    assert starts == set(range(6))  # never the window with the last frame, as published


def test_dense_training_of_a_video_within_the_window_repeats_the_last_frame() -> None:
    assert train_indices(40, rng(), "dense").tolist() == [0, 4, 8, 13, 17, 22, 26, 31, 35, *[39] * 7]


@pytest.mark.parametrize("sampling", ["uniform", "dense"])
@pytest.mark.parametrize("length", [*range(1, 70), 1000])
def test_indices_are_ascending_and_inside(length: int, sampling: str) -> None:
    chosen = [train_indices(length, rng(seed), sampling) for seed in range(5)]
    chosen += [view_indices(length, view, views, sampling) for views in range(1, 6) for view in range(views)]
    for indices in chosen:
        assert indices.shape == (16,)
        assert indices.dtype == np.int64
        assert (np.diff(indices) >= 0).all()
        assert indices[0] >= 0
        assert indices[-1] < length


def test_short_videos_show_all_their_frames_where_sampling_is_uniform() -> None:
    # The published code trains on frame 0 sixteen times.
    assert view_indices(8, 0, 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    seen = np.unique([train_indices(8, rng(seed)) for seed in range(20)])
    assert seen.tolist() == list(range(8))


def test_short_videos_keep_their_pace_where_sampling_is_dense() -> None:
    for view in range(5):
        assert view_indices(10, view, 5, "dense").tolist() == [0, 4, *[8] * 14]
    assert train_indices(10, rng(), "dense").tolist() == [0, *[9] * 15]


@pytest.mark.parametrize("sampling", ["uniform", "dense"])
def test_draws_depend_on_the_generator_alone(sampling: str) -> None:
    np.testing.assert_array_equal(train_indices(500, rng(3), sampling), train_indices(500, rng(3), sampling))
    assert not np.array_equal(train_indices(500, rng(3), sampling), train_indices(500, rng(4), sampling))


def test_other_numbers_of_frames() -> None:
    assert view_indices(24, 0, 2, frames=8).tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    assert train_indices(24, rng(), frames=24).tolist() == list(range(24))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: view_indices(10, 2, 2), "view is 2 of 2"),
        (lambda: view_indices(10, 0, 0), "view is 0 of 0"),
        (lambda: view_indices(0, 0, 1), "length is 0"),
        (lambda: train_indices(0, rng()), "length is 0"),
        (lambda: train_indices(10, rng(), frames=0), "frames is 0"),
        (lambda: train_indices(10, rng(), "sparse"), "must be 'uniform' or 'dense'"),
    ],
)
def test_impossible_requests_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
