"""Small videos whose frames say their own number: eight vertical bars, black or white, are its binary digits."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH, FPS = 48, 64, 25


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [height, width, 3] with `number` (0 to 255) in bars."""
    bits = (number >> np.arange(8)) & 1
    bars = np.repeat(bits, -(-width // 8))[:width]
    return np.broadcast_to((bars * 255).astype(np.uint8)[None, :, None], (height, width, 3)).copy()


def corners(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [height, width, 3] that looks different in each of its eight orientations."""
    grey = np.repeat(np.repeat([[250, 30], [110, 180]], height // 2, 0), width // 2, 1)
    return np.repeat(grey[..., None], 3, 2).astype(np.uint8)


def shown(stored: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """A picture pixel by pixel where a display matrix of whole numbers says that it is."""
    a, b, c, d = matrix
    rows, columns = np.mgrid[: stored.shape[0], : stored.shape[1]]
    x, y = (a * columns + c * rows).astype(int), (b * columns + d * rows).astype(int)
    x, y = x - x.min(), y - y.min()
    result = np.zeros((y.max() + 1, x.max() + 1, 3), np.uint8)
    result[y, x] = stored
    return result


#: a, b, c, d of the eight orientations: turned by none, one, two, three quarters, then the same mirrored.
ORIENTATIONS = [
    *[(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)],
    *[(-1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 0, -1), (0, -1, -1, 0)],
]


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers in frames of shape [T, H, W, 3]."""
    bar = -(-frames.shape[2] // 8)
    middles = np.minimum(np.arange(8) * bar + bar // 2, frames.shape[2] - 1)
    bits = frames[:, frames.shape[1] // 2, :].mean(-1)[:, middles] > 128
    return (bits * (1 << np.arange(8))).sum(1).tolist()


def write_video(
    path: Path,
    count: int = 60,
    *,
    codec: str = "libx264",
    gop: int = 12,
    b_frames: int = 2,
    times: list[int] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    pixels: str = "yuv420p",
    rotation: int = 0,
    matrix: tuple[float, float, float, float] | None = None,
    draw: Callable[[int, int, int], np.ndarray] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode pictures 0 to count - 1; `times` are milliseconds, 25 pictures a second if None.

    `matrix` is the display matrix's a, b, c, d. `draw(number, height, width)` makes the pictures, if given.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=FPS, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            a, b, c, d = (round(65536 * value) for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray((draw or picture)(number, *size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def trim(source: Path, target: Path, start: float, stop: float) -> Path:
    """Copy packets without re-encoding, from the key frame before `start` seconds on; an edit list hides the excess."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        old = reader.streams.video[0]
        new = writer.add_stream_from_template(old)
        first = int(start / old.time_base)
        reader.seek(first, stream=old, backward=True)
        for packet in reader.demux(old):
            if packet.dts is not None and packet.pts < stop / old.time_base:
                packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, new
                writer.mux(packet)
    return target


def write_audio(path: Path, codec: str = "aac", cover: bool = False) -> Path:
    """One second of silence, with `cover` beside a picture of the kind that music players show."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=44100)
        if cover:
            art = container.add_stream("mjpeg")
            art.height, art.width, art.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_ndarray(picture(3), format="rgb24")))
            container.mux(art.encode())
        if not sound.codec_context.is_open:
            sound.codec_context.open()
        for _ in range(40):
            silence = np.zeros((1, sound.codec_context.frame_size), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path
