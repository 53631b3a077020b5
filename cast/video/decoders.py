"""The decoders that training can use. Each gives the exact frames that a player would show, by index.

A directory in the place of a file is a folder of frames, see `cast.video.folders`, whatever the decoder.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Protocol

import av
import numpy as np

from cast.optional import MissingExtraError, require
from cast.video import reader
from cast.video.files import PathLike, check_file, video_error
from cast.video.folders import Folders

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


class TorchCodec:
    """torchcodec in its exact mode. The last file stays open, so that counting and reading scan it once.

    Raises:
        MissingExtraError: torchcodec is not installed, or does not find FFmpeg's libraries.
    """

    def __init__(self) -> None:
        _torchcodec()

    def frame_count(self, path: PathLike, threads: int = 0) -> int:
        """Number of frames that the file presents."""
        return len(_opened(path, threads))

    def read(self, path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0) -> np.ndarray:
        """The frames `indices` as uint8 RGB `[T, H, W, 3]`."""
        wanted = [int(i) for i in indices]
        video = _opened(path, threads)
        bad = [i for i in wanted if not 0 <= i < len(video)]
        if bad or not wanted:
            asked = f"frame {bad[0]} was asked for" if bad else "no frame was asked for"
            raise video_error(path, f"has frames 0 to {len(video) - 1}, but {asked}")
        try:
            return video.get_frames_at(indices=wanted).data.numpy()
        except (RuntimeError, ValueError, IndexError) as error:
            raise video_error(path, f"torchcodec can't decode it ({_first_line(error)})") from error


class _FilesAndFolders:
    """A decoder of files, and beside it the reader of folders."""

    def __init__(self, files: Decoder) -> None:
        self.files, self.folders = files, Folders()

    def frame_count(self, path: PathLike, threads: int = 0) -> int:
        """Number of frames that the file presents, or of pictures in the folder."""
        return self._of(path).frame_count(path, threads)

    def read(self, path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0) -> np.ndarray:
        """The frames `indices` as uint8 RGB `[T, H, W, 3]`."""
        return self._of(path).read(path, indices, threads)

    def _of(self, path: PathLike) -> Decoder:
        return self.folders if os.path.isdir(path) else self.files


# Of this thread: a decoder has a position in its file.
_last = threading.local()


def _opened(path: PathLike, threads: int) -> Any:
    check_file(path)
    status = os.stat(path)
    key = (os.path.abspath(path), status.st_mtime_ns, status.st_size, threads, os.getpid())
    if getattr(_last, "key", None) != key:
        try:
            video = _torchcodec().VideoDecoder(
                os.fspath(path), dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact"
            )
            length = len(video)
        except (RuntimeError, ValueError, TypeError) as error:
            raise video_error(path, f"torchcodec can't read it as a video ({_first_line(error)})") from error
        if not length:
            raise video_error(path, "holds a video stream without a single frame")
        _last.key, _last.video = key, video
    return _last.video


@cache
def _torchcodec() -> Any:
    try:
        module = require("torchcodec.decoders", "torchcodec")
        # Without FFmpeg's libraries some versions fail at the import, others at the first file, which would look like
        # a data set of damaged videos.
        len(module.VideoDecoder(_one_frame()))
        return module
    except (RuntimeError, OSError) as error:
        raise MissingExtraError(
            "torchcodec is installed, but can't load FFmpeg's libraries: install FFmpeg 4 to 8 with shared libraries "
            f"(apt-get install ffmpeg), or use decoder pyav ({_first_line(error)})",
            name="torchcodec",
        ) from error


def _one_frame() -> bytes:
    """The smallest video: one black picture in MPEG-4, which PyAV's FFmpeg always encodes."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def decoder(name: Name) -> Decoder:
    """The decoder of that name, which reads folders of frames too.

    Raises:
        ValueError: no such decoder.
        MissingExtraError: torchcodec is not installed, or does not find FFmpeg's libraries.
    """
    if name == "pyav":
        return _FilesAndFolders(PyAV())
    if name == "torchcodec":
        return _FilesAndFolders(TorchCodec())
    raise ValueError(f"decoder is {name!r}; it must be 'pyav' or 'torchcodec'")
