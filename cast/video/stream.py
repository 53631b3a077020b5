"""Pictures as they come: from a camera, a network address, a pipe, or a file read once from its start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from cast.video.files import PathLike, VideoError, check_file
from cast.video.reader import upright_rgb

#: Cameras are opened through Video4Linux.
_DEVICES = "/dev/"


def is_live(source: str) -> bool:
    """Whether a name stands for a stream: a device, a network address, or "-" for standard input."""
    return source == "-" or source.startswith(_DEVICES) or "://" in source


def frames(source: PathLike | BinaryIO, format: str | None = None, **options: str) -> Iterator[np.ndarray]:
    """Pictures of a stream, uint8 RGB [H, W, 3], decoded when they are asked for.

    A damaged picture is left out, as a stream must go on; `cast.video.reader` is for files, and exact.

    Args:
        source: a device such as /dev/video0, an address such as rtsp://..., a file, or an open binary file.
        format: FFmpeg's name of the container or device, where it can't be guessed.
        options: FFmpeg's options, such as `framerate="30"`, `video_size="640x480"`, `rtsp_transport="tcp"`.

    Raises:
        VideoError: it can't be opened, holds no video, or breaks off with an error.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the pipe"
    opened = source
    if isinstance(source, str | os.PathLike):
        opened = name
        if name.startswith(_DEVICES):
            format = format or "v4l2"
        elif "://" not in name:
            check_file(name)
            opened = f"file:{name}"
    try:
        with av.open(opened, format=format, options=options) as container:
            if not container.streams.video:
                raise VideoError(f"{name}: holds no video")
            stream = container.streams.video[0]
            stream.thread_type, reformatter = "AUTO", VideoReformatter()
            for packet in container.demux(stream):
                for frame in _whole(packet):
                    yield upright_rgb(name, frame, reformatter)
    except (av.FFmpegError, OSError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{name}: can't be read as a stream ({error.strerror or error})") from error


def _whole(packet: Packet) -> list[VideoFrame]:
    """The undamaged pictures of a packet; none if the decoder refuses it."""
    try:
        return [frame for frame in packet.decode() if not frame.is_corrupt]
    except av.InvalidDataError:
        return []
