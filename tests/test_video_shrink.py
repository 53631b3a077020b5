"""Large pictures made smaller: the documented mean, no larger than asked, no work where none is needed."""

from __future__ import annotations

import numpy as np
import pytest

from cast.video.shrink import shrink


def weights(length: int, target: int) -> np.ndarray:
    """float64 [target, length]: a triangle around each pixel of the result that reaches one of its pixels each way."""
    step = length / target
    middles = (np.arange(target) + 0.5) * step
    places = np.arange(length) + 0.5
    triangle = np.clip(1 - np.abs(places - middles[:, None]) / step, 0, None)
    return triangle / triangle.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("size", "short_side", "target"),
    [((108, 192), 32, (32, 57)), ((192, 108), 32, (57, 32)), ((61, 60), 59, (60, 59)), ((100, 100), 7, (7, 7))],
)
def test_each_pixel_is_the_documented_mean(size: tuple[int, int], short_side: int, target: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    small = shrink(picture, short_side)
    assert small.shape == (*target, 3)
    assert small.dtype == np.uint8
    assert small.flags.c_contiguous
    down, across = weights(size[0], target[0]), weights(size[1], target[1])
    exact = np.einsum("hy,wx,yxc->hwc", down, across, picture.astype(np.float64))
    assert np.abs(small - exact).max() <= 1.01


@pytest.mark.parametrize("short_side", [None, 40, 41, 1000])
def test_a_picture_that_is_small_enough_is_left_alone(short_side: int | None) -> None:
    picture = np.zeros((40, 90, 3), np.uint8)
    assert shrink(picture, short_side) is picture


def test_fine_stripes_become_grey() -> None:
    """Without antialiasing every fourth column would be taken, all of them white."""
    stripes = np.zeros((64, 256, 3), np.uint8)
    stripes[:, ::4] = 255
    assert np.abs(shrink(stripes, 16)[:, 2:-2].astype(int) - 64).max() <= 1
