"""Pictures of the windows: the tokens that attend together, as :func:`cast_kernels.reference.group` groups them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from cast_kernels import WINDOWS, reference
from website.svg import FAINT, Picture

FRAMES, SIDE = 8, 14  # of CAST-B: 16 frames in tubelets of 2, 14 x 14 patches
#: The token of the shown window: frame, row, column.
CHOSEN = (3, 5, 8)
ASKS, ANSWERS, WITH = "#c92a2a", "#1971c2", "#f59f00"
_CELL, _GAP, _LEFT, _CLS = 6, 5, 8, 8
_GRID = SIDE * _CELL
_WIDTH = 2 * _LEFT + FRAMES * (_GRID + _GAP) - _GAP
_SAYS = {
    "time": "the same patch in every frame",
    "space": "every patch of the same frame",
    "space-time": "every patch of every frame",
}


@cache
def together(window: str) -> set[int]:
    """Numbers t N + n of the tokens in the chosen one's window."""
    numbers = torch.arange(FRAMES * SIDE * SIDE).reshape(1, FRAMES, SIDE * SIDE, 1)
    frame, row, column = CHOSEN
    chosen = (frame * SIDE + row) * SIDE + column
    groups = [set(group.flatten().tolist()) for group in reference.group(numbers, window)]
    (found,) = (group for group in groups if chosen in group)
    return found


def draw(window: str) -> str:
    """The picture of one window shape, both directions, as SVG."""
    length = WINDOWS[window](FRAMES, SIDE * SIDE)
    picture = Picture(_WIDTH, 536, f"Window {window}: which tokens attend together")
    lines = "".join(f"M{k} 0v{_GRID}M0 {k}h{_GRID}" for k in range(0, _GRID + 1, _CELL))
    picture.define("grid", lines, "#ffffff", 0.6)
    picture.words(_LEFT, 22, f"{window}: {_SAYS[window]}", size=15, style="font-weight='600'")
    picture.words(
        _LEFT, 40, f"{length:,} of the {FRAMES} x {SIDE} x {SIDE} tokens; frames from left to right", FAINT, 12
    )
    y = 64
    for direction, asking, answering in (("t2s", "spatial", "temporal"), ("s2t", "temporal", "spatial")):
        picture.words(_LEFT, y, f"{direction}: {asking} asks", ASKS, style="font-weight='600'")
        y = _stream(picture, y + 6, window, asking == "spatial", asks=True)
        picture.words(_LEFT + 27, y, f"{answering} answers", ANSWERS, style="font-weight='600'")
        y = _stream(picture, y + 6, window, answering == "spatial", asks=False) + 6
    _legend(picture, y)
    return picture.text()


def _stream(picture: Picture, y: float, window: str, has_cls: bool, asks: bool) -> float:
    """Draw a row of frames; returns the base line below it. CLS is above its frame, outside of every window."""
    members = together(window)
    top = y + _CLS + 3 if has_cls else y
    for frame in range(FRAMES):
        x = _LEFT + frame * (_GRID + _GAP)
        if has_cls:
            picture.box(x + 0.5, y + 0.5, _CLS, _CLS, "none", FAINT)
        picture.box(x, top, _GRID, _GRID, "#dee2e6")
        for row, first, count in _runs([n % (SIDE * SIDE) for n in members if n // (SIDE * SIDE) == frame]):
            place = (x + first * _CELL, top + row * _CELL)
            picture.box(*place, count * _CELL, _CELL, WITH if asks else ANSWERS)
        picture.repeat("grid", x, top)
        if asks and frame == CHOSEN[0]:
            picture.box(x + CHOSEN[2] * _CELL - 1, top + CHOSEN[1] * _CELL - 1, _CELL + 2, _CELL + 2, ASKS)
    return top + _GRID + 17


def _legend(picture: Picture, y: float) -> None:
    x: float = _LEFT
    for fill, line, text, width in (
        (ASKS, "none", "asks", 48), (WITH, "none", "asks as well", 92), (ANSWERS, "none", "answer", 66),
        ("none", FAINT, "CLS: in no window", 0),
    ):  # fmt: skip
        picture.box(x + 0.5, y - 8.5, 8, 8, fill, line)
        picture.words(x + 13, y, text, size=12)
        x += width + 8


def _runs(patches: list[int]) -> Iterator[tuple[int, int, int]]:
    """Row, first column and length of each run of adjacent patches."""
    marked = set(patches)
    for first in sorted(n for n in marked if n % SIDE == 0 or n - 1 not in marked):
        yield (
            first // SIDE,
            first % SIDE,
            next(k for k in range(1, SIDE + 1) if (first + k) % SIDE == 0 or first + k not in marked),
        )
