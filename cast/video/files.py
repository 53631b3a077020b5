"""Open video files; a clear one-sentence error for every other file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from cast.ground.files import printable

PathLike = str | os.PathLike[str]

_ENDINGS = (
    ".mp4 .m4v .mov .qt .3gp .3g2 .3gpp .mj2 .f4v .webm .mkv .mk3d .avi .divx .wmv .asf .flv .gif "
    ".mpg .mpeg .mpe .mpv .m1v .m2v .m2p .vob .ts .mts .m2ts .m2t .tp .trp .mod .tod .evo .vro .wtv .dvr-ms "
    ".ogv .ogm .rm .rmvb .dv .mxf .nut .ivf .obu .y4m .amv .insv .lrv .360 "
    ".h264 .264 .avc .h265 .265 .hevc .h266 .266 .vvc .mjpg .mjpeg"
)
#: Endings of video files, in small letters.
VIDEO_ENDINGS = frozenset(_ENDINGS.split())

#: FFmpeg also reads these formats: text drawn as on a terminal, and lists of other files.
_NOT_VIDEO = {
    "tty": "a text file",
    "hls": "a playlist",
    "concat": "a playlist",
    "dash": "a playlist",
    "sdp": "a playlist",
}
#: First bytes of common containers, (offset, bytes). They distinguish a damaged video from another kind of file.
_SIGNATURES = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (0, b"\x1a\x45\xdf\xa3"), (0, b"RIFF"), (0, b"\0\0\1\xba"))


class VideoError(ValueError):
    """A file that can't be read as a video; the message is one line that begins with the path."""


def video_error(path: PathLike, reason: str) -> VideoError:
    """The error with the reason why `path` can't be read."""
    return VideoError(f"{printable(path)}: {reason}")


@contextmanager
def open_video(path: PathLike, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first real video stream. FFmpeg's errors inside become `VideoError`."""
    check_file(path)
    try:
        # With "file:" FFmpeg does not read a name with a colon as a protocol, and refuses playlists that point to the
        # network.
        with av.open(f"file:{os.fspath(path)}") as container:
            stream = _video_stream(path, container)
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream
    except av.FFmpegError as error:
        raise video_error(path, _explain(path, error.strerror or str(error))) from error


def check_file(path: PathLike) -> None:
    """Raise `VideoError` unless `path` is a readable file that is not empty."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise video_error(path, "no such file") from None
    except (OSError, ValueError) as error:  # a directory without permission; a name too long, or with a zero byte
        raise video_error(path, f"can't be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(status.st_mode):
        raise video_error(path, "is a directory, not a video file")
    if not stat.S_ISREG(status.st_mode):
        raise video_error(path, "is not a regular file")
    if not os.access(path, os.R_OK):
        raise video_error(path, "can't be read: Permission denied")
    if status.st_size == 0:
        raise video_error(path, "is empty (0 bytes)")


def _video_stream(path: PathLike, container: InputContainer) -> VideoStream:
    name = container.format.name
    if name in _NOT_VIDEO:
        raise video_error(path, f"is {_NOT_VIDEO[name]}, not a video")
    if name == "image2" or name.endswith("_pipe"):
        raise video_error(path, "is a still image, not a video")
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:  # skip the cover of a song
            return stream
    kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
    raise video_error(path, f"holds no video, only {' and '.join(kinds) or 'headers'}")


def _explain(path: PathLike, error: str) -> str:
    with open(path, "rb") as file:
        head = file.read(16)
    if any(head[offset:].startswith(magic) for offset, magic in _SIGNATURES):
        return f"is truncated or damaged (FFmpeg: {error})"
    return f"is not a video that FFmpeg can read ({error})"
