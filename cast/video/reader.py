"""Exact frames of a video file, by index.

`read(path, [0, 7, 7, 30])` returns the frames that a player would show as number 0, 7, 7 and 30, whatever the distance
between key frames, the frame rate, or cuts without re-encoding. Positions come from the timestamps in the file, never
from a frame rate.

Method. A first pass reads the packets without decoding and notes each picture's time; packets that an edit list cuts
away are omitted. Frame `i` has the i-th smallest timestamp. To read, seek to the last key frame at or before the first
wanted picture and decode until the last wanted one; jump over key frames if many lie between two wanted pictures. This
works for the MP4 and Matroska families. In other containers (AVI, MPEG-TS, raw streams, GIF, ...) packets are not
reliable, so those files are decoded from their start: slower, just as exact.

Damage that the container or the decoder notices raises an error: a concealed picture is not returned. But most video
streams have no checksums: changed bytes that still decode give wrong pixels (docs/video.md has counts).
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from cast.video.files import PathLike, VideoError, check_file, open_video, video_error
from cast.video.orientation import display_matrix, upright
from cast.video.shrink import shrink

__all__ = ["VideoError", "frame_count", "read"]

#: Most indices in memory; the least recently used goes first. The index of a 300-frame clip takes about 3 kB.
CACHED_FILES = 4096
#: A jump to a key frame must skip more frames than this, because the decoder works a few frames ahead of its output.
#: For H.264 with three B-frames, values of 4 to 8 take the same time (16 of 300 frames, Zen 3); 1 takes longer.
WORTH_A_JUMP = 4
#: Codecs with one picture in every packet. Others have hidden pictures (VP8's alternate references), so their frame
#: numbers differ from the numbers of packets. Only decoding everything in between shows that.
JUMPS = frozenset({"h264", "hevc", "vp9", "av1"})


@dataclass(frozen=True)
class _Times:
    """When each frame of a file is shown, and where decoding may start; in the stream's time units."""

    pts: np.ndarray  # int64 [count], ascending
    keys: np.ndarray  # int64 [keys, 2]: presentation and decoding time of every key frame, ascending


@dataclass(frozen=True)
class _Index:
    """Number and times of a file's frames. Without `times`, it is decoded from its start and frames are counted."""

    count: int
    times: _Times | None = None


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    is_key: bool
    cut_away: bool  # by an edit list: never shown, but needed to decode others


_indices: OrderedDict[tuple[str, int, int], _Index] = OrderedDict()
_lock = threading.Lock()


def frame_count(path: PathLike, threads: int = 0) -> int:
    """Number of frames that a player would show.

    Args:
        path: a local video file.
        threads: decoding threads, 0 lets FFmpeg choose. Use 1 inside DataLoader workers.

    Raises:
        VideoError: the file is missing, empty, truncated, no video, or without a single frame.
    """
    return _index(path, threads).count


def read(
    path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0, short_side: int | None = None
) -> np.ndarray:
    """The frames `indices` (0-based, any order, repeats allowed) as uint8 RGB `[T, H, W, 3]`.

    The display matrix of the file's metadata is applied, so frames are upright and not mirrored. Non-square pixels
    stay.

    Args:
        path: a local video file.
        indices: T frame numbers, each in `0 .. frame_count(path) - 1`.
        threads: decoding threads, 0 lets FFmpeg choose. Use 1 inside DataLoader workers.
        short_side: frames with a longer shorter side are shrunk one by one, see `cast.video.shrink`; None leaves them.

    Raises:
        VideoError: the file can't be read as a video, has no such frame, is turned by another angle than a multiple of
            90 degrees, or the decoder reports damage before the frame.
    """
    wanted = [int(i) for i in indices]
    if not wanted:
        raise video_error(path, "no frame was asked for: indices is empty")
    frames = _decode(path, wanted, _index(path, threads), threads, short_side)
    if len(frames) < len(set(wanted)):
        # The decoder contradicts the packets: from now on count the decoded frames of this file.
        counted = _remember(path, _count_by_decoding(path, threads))
        frames = _decode(path, wanted, counted, threads, short_side)
    return np.stack([frames[i] for i in wanted])


def _index(path: PathLike, threads: int) -> _Index:
    check_file(path)
    key = _key(path)
    with _lock:
        if key in _indices:
            _indices.move_to_end(key)
            return _indices[key]
    return _remember(path, _index_packets(path) or _count_by_decoding(path, threads))


def _remember(path: PathLike, index: _Index) -> _Index:
    with _lock:
        _indices[_key(path)] = index
        while len(_indices) > CACHED_FILES:
            _indices.popitem(last=False)
    return index


def _key(path: PathLike) -> tuple[str, int, int]:
    status = os.stat(path)
    return os.path.abspath(path), status.st_mtime_ns, status.st_size


def _index_packets(path: PathLike) -> _Index | None:
    """The index from one pass over the packets, or None if they don't determine the frames."""
    with open_video(path, threads=1) as (container, stream):
        if not container.format.name.startswith(("mov", "matroska")):
            return None
        packets, end = _demux(path, container, stream)
        _check_complete(path, container, stream, packets, end)

    shown = [packet.pts for packet in packets if packet.pts is not None and not packet.cut_away]
    untimed = any(packet.pts is None for packet in packets)
    if untimed or not packets[0].is_key or len(set(shown)) < len(shown):
        return None
    keys = sorted((packet.pts, packet.dts) for packet in packets if packet.is_key and packet.dts is not None)
    times = _Times(np.sort(np.array(shown, dtype=np.int64)), np.array(keys, dtype=np.int64).reshape(-1, 2))
    return _Index(len(shown), times)


def _demux(path: PathLike, container: InputContainer, stream: VideoStream) -> tuple[list[_Packet], float]:
    """The stream's packets, and the end of the last packet of any stream, in seconds."""
    packets: list[_Packet] = []
    end = 0.0
    for packet in container.demux():
        if packet.size == 0:  # the demuxer's last packet of a stream is empty
            continue
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * (packet.time_base or 0)))
        if packet.stream.index == stream.index:
            _check_packet(path, packet)
            packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
    return packets, end


def _check_packet(path: PathLike, packet: Packet) -> None:
    if packet.is_corrupt:
        raise video_error(path, "is truncated or damaged (a packet is incomplete)")


def _check_complete(
    path: PathLike, container: InputContainer, stream: VideoStream, packets: list[_Packet], end: float
) -> None:
    """Compare the packets with the promises of the file's header or index."""
    if container.format.name.startswith("mov") and len(packets) < len(stream.index_entries):
        raise video_error(path, f"is truncated: {len(packets)} of {len(stream.index_entries)} frames are there")
    if container.format.name.startswith("matroska") and container.duration is not None:
        times = np.sort(np.array([packet.pts for packet in packets if packet.pts is not None], dtype=np.int64))
        # The header's duration may or may not include the time of the last picture.
        slack = 0.1 + 2 * float(int(np.diff(times).max(initial=0)) * (stream.time_base or 0))
        promised = container.duration / av.time_base
        if end < promised - slack:
            raise video_error(path, f"is truncated: {end:.1f} of {promised:.1f} seconds are there")
    if all(packet.cut_away for packet in packets):
        raise video_error(path, "holds a video stream without a single frame")


def _count_by_decoding(path: PathLike, threads: int) -> _Index:
    with open_video(path, threads) as (container, stream):
        count = sum(1 for _ in _decode_from_start(path, container, stream))
    if count == 0:
        raise video_error(path, "holds a video stream without a single frame")
    return _Index(count)


def _decode(
    path: PathLike, wanted: Sequence[int], index: _Index, threads: int, short_side: int | None
) -> dict[int, np.ndarray]:
    """The wanted frames by number, as far as the decoder outputs them."""
    bad = [i for i in wanted if not 0 <= i < index.count]
    if bad:
        raise video_error(path, f"has frames 0 to {index.count - 1}, but frame {bad[0]} was asked for")
    numbers = sorted(set(wanted))
    found: dict[int, np.ndarray] = {}
    sizes: set[str] = set()
    reformatter = VideoReformatter()
    with open_video(path, threads) as (container, stream):
        parts = [numbers]
        if index.times is not None and stream.codec.canonical_name in JUMPS:
            parts = _parts(index.times, numbers)
        for part in parts:
            for number, frame in _frames(path, container, stream, index, part[0]):
                if frame.is_corrupt:  # later frames depend on it
                    raise video_error(path, f"is damaged: frame {number} can't be decoded whole")
                if number in part:
                    picture = upright_rgb(path, frame, reformatter)
                    sizes.add(f"{picture.shape[1]}x{picture.shape[0]}")
                    found[number] = shrink(picture, short_side)
                if number >= part[-1]:
                    break
    if len(sizes) > 1:
        raise video_error(
            path, f"changes its picture size midway ({', '.join(sorted(sizes))}); re-encode it to one size"
        )
    return found


def _parts(times: _Times, numbers: list[int]) -> list[list[int]]:
    """Ascending frame numbers, split where a jump to a key frame is cheaper than decoding the frames in between."""
    parts = [numbers[:1]]
    for last, number in itertools.pairwise(numbers):
        key = int(np.searchsorted(times.pts, _key_frame(times, number)[0]))
        if key - last > WORTH_A_JUMP:
            parts.append([number])
        else:
            parts[-1].append(number)
    return parts


def _key_frame(times: _Times, number: int) -> tuple[int, int]:
    """Presentation and decoding time of the last key frame that is shown at or before frame `number`."""
    key = int(np.searchsorted(times.keys[:, 0], times.pts[number], side="right")) - 1
    pts, dts = times.keys[key].tolist() if key >= 0 else (times.pts[0], times.pts[0])
    return int(pts), int(dts)


def _frames(
    path: PathLike, container: InputContainer, stream: VideoStream, index: _Index, first: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their numbers, including frame `first` and all later ones, as far as the decoder outputs them."""
    if index.times is None:
        return enumerate(_decode_from_start(path, container, stream))
    return _from_key_frame(container, stream, index.times, first)


def _decode_from_start(path: PathLike, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for packet in container.demux(stream):
        _check_packet(path, packet)
        yield from packet.decode()


def _from_key_frame(
    container: InputContainer, stream: VideoStream, times: _Times, first: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their numbers, from the last key frame that is shown at or before frame `first`.

    Ends at the first frame that the packets did not announce, or that they announced and the decoder skips.
    """
    key_pts, key_dts = _key_frame(times, first)
    expected = int(np.searchsorted(times.pts, key_pts))
    packets = _packets_from(container, stream, times, key_pts, key_dts)
    for frame in itertools.chain.from_iterable(packet.decode() for packet in packets):
        number = None if frame.pts is None else int(np.searchsorted(times.pts, frame.pts))
        if number is None or number > expected or times.pts[number] != frame.pts:
            return
        if number == expected:  # earlier ones depend on pictures before the key frame
            yield number, frame
            expected += 1


def _packets_from(
    container: InputContainer, stream: VideoStream, times: _Times, pts: int, dts: int
) -> Iterator[Packet]:
    """The stream's packets from the key frame with these times on, or from an earlier key frame.

    A seek compares its target with times that depend on the container and on FFmpeg's version: decoding times,
    presentation times, or, in MP4, presentation times plus the decoder's delay at the file's start. A target that is
    too early leads to an earlier key frame, and to twice the work. A target that is too late may skip the wanted key
    frame.
    """
    ahead = int(times.keys[0, 0] - times.keys[0, 1]) if len(times.keys) else 0
    for target in (pts + ahead, pts, dts):
        container.seek(target, stream=stream, backward=True)
        packets = container.demux(stream)
        landed = next(packets)
        if landed.pts is not None and landed.pts <= pts:
            break
    yield landed
    yield from packets


def upright_rgb(path: PathLike, frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """A decoded picture as uint8 RGB [H, W, 3], turned and mirrored as its metadata says.

    Args:
        path: the file or stream, for the error.
        frame: the picture.
        reformatter: one for all pictures of a file. A new one for each picture would prepare the conversion again each
            time. That takes three to four times as long as the conversion (340 x 256 pixels: 0.27 to 0.65 instead of
            0.10 to 0.18 ms, Zen 3).

    Raises:
        VideoError: it is turned by another angle than a multiple of 90 degrees.
    """
    picture = reformatter.reformat(frame, format="rgb24").to_ndarray()
    return np.ascontiguousarray(upright(path, picture, display_matrix(path, frame)))
