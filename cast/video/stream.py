"""Pictures from a camera, a network address, a pipe, or a file read once from its start.

A separate thread opens and decodes. FFmpeg may wait forever for a camera. Neither a signal interrupts it nor, for a
device or during the look-up of a name, its own time limit. So the caller waits for the thread, as long as it wants.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from typing import Any, BinaryIO

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from cast.video.files import PathLike, VideoError, check_file, video_error
from cast.video.reader import upright_rgb

#: Cameras are opened through Video4Linux.
_DEVICES = "/dev/"
#: Time limit in seconds to open a stream, and for each picture.
TIMEOUT = 30.0
#: Most pictures that are decoded ahead.
_AHEAD = 2
#: Seconds that FFmpeg's limit exceeds the caller's, so that the caller's message appears first.
_LONGER = 1.0
#: Interval in seconds at which the thread checks whether its pictures are still wanted.
_LOOK = 0.2
#: The thread's messages before the first and after the last picture.
_OPEN, _END = "open", "end"


def is_live(source: str) -> bool:
    """Whether a name is a stream: a device, a network address, or "-" for standard input."""
    return source == "-" or source.startswith(_DEVICES) or "://" in source


def frames(
    source: PathLike | BinaryIO,
    format: str | None = None,
    timeout: float | tuple[float, float] = TIMEOUT,
    **options: str,
) -> Iterator[np.ndarray]:
    """Pictures of a stream, uint8 RGB [H, W, 3]; at most two are decoded ahead.

    Damaged pictures are omitted, because a stream must go on; use the exact `cast.video.reader` for files. Waiting can
    be interrupted (Ctrl-C). A thread that still waits in FFmpeg then ends with the process.

    Args:
        source: a device such as /dev/video0, an address such as rtsp://..., a file, or an open binary file.
        format: FFmpeg's name of the container or device, if it can't be guessed.
        timeout: seconds until the stream must be open, and until each next picture must arrive; two numbers if they
            differ. 0 waits forever. Files on the disk have no such limit.
        options: FFmpeg's options, such as `framerate="30"`, `video_size="640x480"`, `rtsp_transport="tcp"`.

    Raises:
        VideoError: it can't be opened, has no video, breaks off with an error, or nothing arrives in time.
        ValueError: a timeout below 0.
    """
    limits = timeout if isinstance(timeout, tuple) else (timeout, timeout)
    if not all(limit >= 0 for limit in limits):
        raise ValueError(f"timeout is {timeout}; it must be seconds, or 0 to wait without an end")
    name, opened = "the pipe", source
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        opened = name
        if name.startswith(_DEVICES):
            format = format or "v4l2"
        elif "://" not in name:
            check_file(name)
            opened, limits = f"file:{name}", (0.0, 0.0)
    longer = tuple(limit + _LONGER if limit else None for limit in limits)
    thread = _Thread(lambda: _decoded(name, opened, format, longer, options))
    try:
        if thread.next(limits[0], lambda: _silent(name, "did not answer within", limits[0])) is _OPEN:
            while (
                picture := thread.next(limits[1], lambda: _silent(name, "gave no picture for", limits[1]))
            ) is not _END:
                yield picture
    finally:
        thread.stop()


def _silent(name: str, what: str, seconds: float) -> VideoError:
    return video_error(
        name,
        f"{what} {seconds:g} seconds; is it switched on and reachable? A greater --timeout (timeout=) waits longer",
    )


class _Thread:
    """Runs a generator in its own thread, a few items ahead.

    Args:
        make: makes the generator, in the thread. The caller gets its items and then `_END`, or its error.
    """

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._made: Queue[Any] = Queue(_AHEAD)
        self._unwanted = threading.Event()
        # A daemon: an interrupted program must end even if FFmpeg still waits.
        threading.Thread(target=self._run, args=(make,), daemon=True).start()

    def next(self, seconds: float, late: Callable[[], Exception]) -> Any:
        """The next item; raises `late()` if none arrives in `seconds`, unless that is 0."""
        try:
            item = self._made.get(timeout=seconds or None)
        except Empty:
            raise late() from None
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """Let the thread end at its next check."""
        self._unwanted.set()

    def _run(self, make: Callable[[], Iterator[Any]]) -> None:
        try:
            for item in make():
                if not self._give(item):
                    return
            self._give(_END)
        except Exception as error:  # every error goes to the caller
            self._give(error)

    def _give(self, item: Any) -> bool:
        while not self._unwanted.is_set():
            try:
                self._made.put(item, timeout=_LOOK)
                return True
            except Full:
                continue
        return False


def _decoded(
    name: str, opened: Any, format: str | None, limits: tuple[float | None, ...], options: dict[str, str]
) -> Iterator[Any]:
    """`_OPEN`, then the pictures."""
    try:
        with av.open(opened, format=format, options=options, timeout=limits) as container:
            if not container.streams.video:
                raise video_error(name, "holds no video")
            yield _OPEN
            stream = container.streams.video[0]
            stream.thread_type, reformatter = "AUTO", VideoReformatter()
            for packet in container.demux(stream):
                for frame in _whole(packet):
                    yield upright_rgb(name, frame, reformatter)
    except (av.FFmpegError, OSError) as error:
        raise video_error(name, f"can't be read as a stream ({error.strerror or error})") from error


def _whole(packet: Packet) -> list[VideoFrame]:
    """The undamaged pictures of a packet; none if the decoder refuses it."""
    try:
        return [frame for frame in packet.decode() if not frame.is_corrupt]
    except av.InvalidDataError:
        return []
