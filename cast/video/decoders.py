"""The decoders for training. Each returns exactly the frames that a player would show, by index.

If a path is a directory, it is a folder of frames for every decoder, see `cast.video.frame_folders`.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import av
import numpy as np

from cast.ground.files import printable
from cast.ground.optional import MissingExtraError, require
from cast.video import reader
from cast.video.files import PathLike, check_file, open_video, video_error
from cast.video.frame_folders import Folders
from cast.video.orientation import Matrix, display_matrix, upright
from cast.video.shrink import shrink

Name = Literal["pyav", "torchcodec"]


class Decoder(Protocol):
    """A reader of videos; errors are `cast.video.reader.VideoError`. Instances can be sent to other processes."""

    def frame_count(self, path: PathLike, threads: int = 0) -> int:
        """Number of frames that a player would show."""
        ...

    def read(self, path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0) -> np.ndarray:
        """The frames `indices` as uint8 RGB `[T, H, W, 3]`, upright, shrunk to the decoder's short side."""
        ...


class PyAV:
    """The exact reader of `cast.video.reader`; it needs only PyAV.

    Args:
        short_side: see `cast.video.reader.read`.
    """

    def __init__(self, short_side: int | None = None) -> None:
        self.short_side = short_side

    def frame_count(self, path: PathLike, threads: int = 0) -> int:
        """Number of frames that a player would show."""
        return reader.frame_count(path, threads)

    def read(self, path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0) -> np.ndarray:
        """The frames `indices` as uint8 RGB `[T, H, W, 3]`."""
        return reader.read(path, indices, threads, self.short_side)


class TorchCodec:
    """torchcodec in its exact mode. The last file stays open, so that counting and reading scan it once.

    Args:
        short_side: see `cast.video.reader.read`.

    Raises:
        MissingExtraError: torchcodec is not installed, or does not find FFmpeg's libraries.
    """

    def __init__(self, short_side: int | None = None) -> None:
        self.short_side = short_side
        _torchcodec()

    def frame_count(self, path: PathLike, threads: int = 0) -> int:
        """Number of frames that a player would show."""
        return len(_opened(path, threads).video)

    def read(self, path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0) -> np.ndarray:
        """The frames `indices` as uint8 RGB `[T, H, W, 3]`."""
        wanted = [int(i) for i in indices]
        opened = _opened(path, threads)
        video = opened.video
        bad = [i for i in wanted if not 0 <= i < len(video)]
        if bad or not wanted:
            asked = f"frame {bad[0]} was asked for" if bad else "no frame was asked for"
            raise video_error(path, f"has frames 0 to {len(video) - 1}, but {asked}")
        try:
            if not opened.mirrored and (self.short_side is None or min(_sides(video)) <= self.short_side):
                return video.get_frames_at(indices=wanted).data.numpy()
            # One picture at a time, so that the memory never has a whole clip of large pictures.
            pictures = {
                number: shrink(opened.upright(path, video.get_frame_at(number).data.numpy()), self.short_side)
                for number in sorted(set(wanted))
            }
        except (RuntimeError, ValueError, IndexError) as error:
            raise video_error(path, f"torchcodec can't decode it ({_first_line(error)})") from error
        return np.stack([pictures[number] for number in wanted])


@dataclass(frozen=True)
class _Opened:
    """torchcodec's decoder of a file, and the file's display matrix or None."""

    video: Any
    matrix: Matrix | None

    @property
    def mirrored(self) -> bool:
        """Whether to mirror torchcodec's pictures: torchcodec uses only the matrix's angle."""
        return self.matrix is not None and self.matrix[0] * self.matrix[3] < self.matrix[1] * self.matrix[2]

    def upright(self, path: PathLike, picture: np.ndarray) -> np.ndarray:
        """One of torchcodec's pictures `[H, W, 3]` in its right orientation, contiguous."""
        if self.mirrored:
            stored = np.rot90(picture, -round(self.video.metadata.rotation / 90))
            picture = upright(path, stored, self.matrix)
        return np.ascontiguousarray(picture)


def _sides(video: Any) -> tuple[int, int]:
    return video.metadata.height, video.metadata.width


class _FilesAndFolders:
    """A decoder of files and a reader of folders."""

    def __init__(self, files: Decoder, short_side: int | None) -> None:
        self.files, self.folders = files, Folders(short_side)

    def frame_count(self, path: PathLike, threads: int = 0) -> int:
        """Number of frames that a player would show, or of pictures in the folder."""
        return self._of(path).frame_count(path, threads)

    def read(self, path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0) -> np.ndarray:
        """The frames `indices` as uint8 RGB `[T, H, W, 3]`."""
        return self._of(path).read(path, indices, threads)

    def _of(self, path: PathLike) -> Decoder:
        return self.folders if os.path.isdir(path) else self.files


# One for each thread: a decoder has a position in its file.
_last = threading.local()


def _opened(path: PathLike, threads: int) -> _Opened:
    check_file(path)
    status = os.stat(path)
    key = (os.path.abspath(path), status.st_mtime_ns, status.st_size, threads, os.getpid())
    if getattr(_last, "key", None) != key:
        try:
            # torchcodec takes names in UTF-8 only.
            name = os.fspath(path)
            source = name if printable(name) == name else io.FileIO(name)
            video = _torchcodec().VideoDecoder(
                source, dimension_order="NHWC", num_ffmpeg_threads=threads, seek_mode="exact"
            )
            length = len(video)
        except (RuntimeError, ValueError, TypeError) as error:
            raise video_error(path, f"torchcodec can't read it as a video ({_first_line(error)})") from error
        if not length:
            raise video_error(path, "holds a video stream without a single frame")
        matrix = None if video.metadata.rotation is None else _matrix(path)
        _last.key, _last.opened = key, _Opened(video, matrix)
    opened: _Opened = _last.opened
    return opened


def _matrix(path: PathLike) -> Matrix | None:
    """The display matrix of a file's first picture; raises VideoError if it is no quarter turn or mirroring."""
    with open_video(path, threads=1) as (container, stream):
        matrix = display_matrix(path, next(container.decode(stream)))
    upright(path, np.empty((1, 1, 3), np.uint8), matrix)
    return matrix


@cache
def _torchcodec() -> Any:
    try:
        module = require("torchcodec.decoders", "torchcodec")
        # Without FFmpeg's libraries some versions fail at the import, others at the first file. The latter would look
        # like a data set of damaged videos.
        len(module.VideoDecoder(_one_frame()))
        return module
    except (RuntimeError, OSError) as error:
        raise MissingExtraError(
            "torchcodec is installed, but can't load FFmpeg's libraries: install FFmpeg 4 to 8 with shared libraries "
            f"(apt-get install ffmpeg), or use decoder pyav ({_first_line(error)})",
            name="torchcodec",
        ) from error


def _one_frame() -> bytes:
    """The smallest video: one black picture in MPEG-4; PyAV's FFmpeg can always encode it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def decoder(name: Name, short_side: int | None = None) -> Decoder:
    """The decoder of that name, extended to folders of frames.

    Args:
        name: "pyav" or "torchcodec".
        short_side: frames with a longer shorter side are shrunk, see `cast.video.shrink`; None leaves them.

    Raises:
        ValueError: no such decoder.
        MissingExtraError: torchcodec is not installed, or does not find FFmpeg's libraries.
    """
    if name == "pyav":
        return _FilesAndFolders(PyAV(short_side), short_side)
    if name == "torchcodec":
        return _FilesAndFolders(TorchCodec(short_side), short_side)
    raise ValueError(f"decoder is {name!r}; it must be 'pyav' or 'torchcodec'")
