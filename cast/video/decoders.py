"""The decoders that training can use. Each gives the exact frames that a player would show, by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from cast.video import reader
from cast.video.files import PathLike, check_file, video_error

Name = Literal["pyav", "torchcodec"]


class Decoder(Protocol):
    """What reads videos; errors are `cast.video.reader.VideoError`. Instances can be sent to other processes."""

    def frame_count(self, path: PathLike, threads: int = 0) -> int:
        """Number of frames that the file presents."""
        ...

    def read(self, path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0) -> np.ndarray:
        """The frames `indices` as uint8 RGB `[T, H, W, 3]`."""
        ...


class PyAV:
    """The exact reader of `cast.video.reader`, which needs nothing but PyAV."""

    def frame_count(self, path: PathLike, threads: int = 0) -> int:
        """Number of frames that the file presents."""
        return reader.frame_count(path, threads)

    def read(self, path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0) -> np.ndarray:
        """The frames `indices` as uint8 RGB `[T, H, W, 3]`."""
        return reader.read(path, indices, threads)


def decoder(name: Name) -> Decoder:
    """The decoder of that name.

    Raises:
        ValueError: no such decoder.
        MissingExtraError: torchcodec is not installed, or does not find FFmpeg's libraries.
    """
    if name == "pyav":
        return PyAV()
    raise ValueError(f"decoder is {name!r}; it must be 'pyav' or 'torchcodec'")
