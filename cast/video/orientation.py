"""Upright pictures: apply the turn or mirroring of a file's display matrix.

A matrix is nine numbers, `a b u c d v x y w`. The pixel in column p and row q (rows count downwards) is shown at column
`a p + c q`, row `b p + d q`, up to a shift. Only `a b c d` turn or mirror a picture. Their size says how large a player
shows it; this module ignores it, and it ignores non-square pixels.
"""

from __future__ import annotations

import struct

import numpy as np
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame

from cast.video.files import PathLike, video_error

#: (a, b, c, d), up to a common scale.
Matrix = tuple[int, int, int, int]
#: Largest tangent between a direction and an axis, one degree: players take such a matrix for an exact quarter turn.
_ALMOST = 0.0175


def display_matrix(path: PathLike, frame: VideoFrame) -> Matrix | None:
    """The display matrix of a decoded picture; None if it has none.

    Args:
        path: the file, for the error.
        frame: the picture.

    Raises:
        VideoError: the metadata can't be read.
    """
    try:
        found = frame.side_data.get("DISPLAYMATRIX")
    except ValueError as error:  # PyAV raises for all metadata of a picture if one kind is unknown to it
        raise video_error(path, f"has metadata that PyAV doesn't know ({error}); a newer PyAV may") from None
    if not isinstance(found, SideData):
        return None
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(found))
    return (a, b, c, d) if any((a, b, c, d)) else None  # careless writers leave only zeros


def upright(path: PathLike, picture: np.ndarray, matrix: Matrix | None) -> np.ndarray:
    """A stored picture in its right orientation, one of eight.

    Args:
        path: the file, for the error.
        picture: `[H, W, C]`.
        matrix: from :func:`display_matrix`.

    Returns:
        A view of the picture, `[H, W, C]` or `[W, H, C]`.

    Raises:
        VideoError: the matrix turns by another angle than a multiple of 90 degrees, or distorts.
    """
    if matrix is None:
        return picture
    a, b, c, d = matrix
    if _along(a, b) and _along(d, c):
        across, down = a, d
    elif _along(b, a) and _along(c, d):
        picture, across, down = picture.swapaxes(0, 1), c, b
    else:
        told = ", ".join(f"{value / 65536:g}" for value in matrix)
        raise video_error(
            path,
            f"is to be shown turned or distorted by the display matrix ({told}); only quarter turns and mirroring can "
            "be undone, so write it anew, upright: ffmpeg -i OLD NEW",
        )
    return picture[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1]


def _along(main: int, other: int) -> bool:
    """Whether a direction runs along the axis of its first component."""
    return abs(other) < abs(main) * _ALMOST
