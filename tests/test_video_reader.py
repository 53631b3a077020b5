"""The reader against files whose frames carry their own number."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from video_files import ORIENTATIONS, corners, numbers, picture, shown, trim, write_audio, write_video

from cast.video import reader
from cast.video.reader import VideoError, frame_count, read
from cast.video.shrink import shrink
from cast.video.stream import frames


def vfr(count: int) -> list[int]:
    """Milliseconds of a very uneven frame rate."""
    gaps = random.Random(0).choices([17, 33, 40, 41, 80, 333], k=count)
    return np.cumsum([0, *gaps[:-1]]).tolist()


FILES = {
    "short-gop.mp4": {},
    "long-gop.mp4": {"gop": 250, "count": 200},
    "open-gop.mp4": {"b_frames": 4, "count": 120, "options": {"x264-params": "open-gop=1:keyint=20"}},
    "vfr-b-frames.mp4": {"times": vfr(90), "count": 90, "gop": 30, "b_frames": 3},
    "vfr.mkv": {"times": vfr(90), "count": 90, "gop": 30, "b_frames": 3},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "h264.avi": {"b_frames": 3},
    "broadcast.ts": {},
    "raw.h264": {},
    "odd-size.mp4": {"codec": "libx264", "size": (51, 67), "pixels": "yuv444p"},
    "grey.mkv": {"codec": "ffv1", "pixels": "gray", "b_frames": 0},
    "one-frame.mp4": {"count": 1},
    "vp9.webm": {"codec": "libvpx-vp9", "b_frames": 0, "times": vfr(60)},
}


def make(tmp_path: Path, name: str) -> Path:
    settings = dict(FILES[name])
    codec = settings.get("codec", "libx264")
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec} encoder")
    return write_video(tmp_path / name, **settings)


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_the_one_asked_for(tmp_path: Path, name: str, threads: int) -> None:
    path = make(tmp_path, name)
    count = FILES[name].get("count", 60)
    assert frame_count(path, threads) == count

    everything = read(path, range(count), threads)
    height, width = FILES[name].get("size", (48, 64))
    assert everything.shape == (count, height, width, 3)
    assert everything.dtype == np.uint8
    assert numbers(everything) == list(range(count))

    rng = random.Random(name)
    for _ in range(8):
        asked = [rng.randrange(count) for _ in range(rng.choice([1, 2, 16]))]  # any order, with repeats
        np.testing.assert_array_equal(read(path, asked, threads), everything[asked])
    # Right frames by the slow way would be no credit to the index.
    assert (reader._index(path, threads).times is not None) == (path.suffix in {".mp4", ".mkv", ".webm"})


@pytest.mark.parametrize("name", ["open-gop.mp4", "vfr-b-frames.mp4", "vfr.mkv", "short-gop.mp4"])
def test_what_lies_between_two_wanted_frames_is_not_decoded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, count = make(tmp_path, name), FILES[name].get("count", 60)
    times = reader._index(path, 1).times
    assert times is not None
    keys = np.union1d(0, np.searchsorted(times.pts, times.keys[:, 0]))
    decoded: list[int | None] = []
    packets = reader._packets_from

    def counted(*arguments: Any) -> Iterator[av.Packet]:
        for packet in packets(*arguments):
            decoded.append(packet.pos)
            yield packet

    monkeypatch.setattr(reader, "_packets_from", counted)
    for first, last in [(0, count - 1), (2, count // 2 + 1), (count // 2, count - 2)]:
        decoded.clear()
        asked = [first, first + 1, last]
        assert numbers(read(path, asked, threads=1)) == asked
        needed = sum(number - keys[keys <= number].max() + 1 for number in (first + 1, last))
        assert len(decoded) == len(set(decoded))  # nothing twice
        assert len(decoded) <= needed + 2 * 5  # the decoder works up to five frames ahead of what it shows


@pytest.mark.parametrize(("start", "stop"), [(0.52, 2.0), (1.04, 4.6), (3.0, 4.0), (2.32, 2.4)])
def test_frames_before_a_cut_without_reencoding_do_not_exist(tmp_path: Path, start: float, stop: float) -> None:
    source = write_video(tmp_path / "source.mp4", count=120, gop=50)
    path = trim(source, tmp_path / "trimmed.mp4", start, stop)
    with av.open(str(path)) as container:
        stored = sum(packet.size > 0 for packet in container.demux(video=0))
    with av.open(str(path)) as container:
        presented = numbers(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    assert presented[0] == round(start * 25)
    assert stored > len(presented)  # else this file would not test anything
    assert frame_count(path) == len(presented)
    assert numbers(read(path, range(len(presented)))) == presented
    assert numbers(read(path, [len(presented) - 1])) == presented[-1:]


def rewrite(source: Path, target: Path, change: Callable[[int, av.Packet], av.Packet | None]) -> Path:
    """Copy a video packet by packet, each as `change(number, packet)` makes it, or left out."""
    with av.open(str(source)) as original, av.open(str(target), "w") as writer:
        old = original.streams.video[0]
        new = writer.add_stream_from_template(old)
        for number, packet in enumerate(original.demux(old)):
            changed = change(number, packet) if packet.size else None
            if changed is not None:
                changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
                changed.is_keyframe, changed.stream = packet.is_keyframe, new
                writer.mux(changed)
    return target


@pytest.mark.skipif("libvpx" not in av.codecs_available, reason="this FFmpeg has no VP8 encoder")
@pytest.mark.parametrize("gop", [60, 12])  # with 12, key frame 24 stands between the hidden picture and frame 35
def test_a_packet_without_a_picture_is_no_frame(tmp_path: Path, gop: int) -> None:
    def hide(number: int, packet: av.Packet) -> av.Packet:
        data = bytearray(bytes(packet))
        if number == 20:
            data[0] &= 0xEF  # VP8's show_frame bit
        return av.Packet(bytes(data))

    source = write_video(tmp_path / "source.webm", codec="libvpx", gop=gop, b_frames=0)
    path = rewrite(source, tmp_path / "hidden.webm", hide)
    assert frame_count(path) == 60  # as the packets claim
    assert numbers(read(path, [10, 15])) == [10, 15]
    assert numbers(read(path, [10, 35])) == [10, 36]
    assert frame_count(path) == 59  # the decoder knows better
    with pytest.raises(VideoError, match="has frames 0 to 58, but frame 59 was asked for"):
        read(path, [59])


def test_pictures_before_the_first_key_frame_are_no_frames(tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.mkv", b_frames=0)
    with av.open(str(source)) as container:
        second_key = [number for number, packet in enumerate(container.demux(video=0)) if packet.is_keyframe][1]
    path = rewrite(source, tmp_path / "headless.mkv", lambda number, packet: packet if number >= 2 else None)
    assert second_key > 2
    assert frame_count(path) == 60 - second_key
    assert numbers(read(path, range(60 - second_key))) == list(range(second_key, 60))


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotation_in_the_metadata_is_applied(tmp_path: Path, degrees: int, turns: int) -> None:
    path = write_video(tmp_path / "turned.mp4", count=3, rotation=degrees)
    upright = read(write_video(tmp_path / "upright.mp4", count=3), [2])[0]
    np.testing.assert_array_equal(read(path, [2])[0], np.rot90(upright, turns))  # counter-clockwise


@pytest.mark.parametrize("matrix", ORIENTATIONS)
@pytest.mark.parametrize("container", ["mp4", "mov"])
def test_the_whole_display_matrix_is_applied(
    tmp_path: Path, matrix: tuple[float, float, float, float], container: str
) -> None:
    stored = read(write_video(tmp_path / "stored.mp4", count=2, draw=corners), [1])[0]
    path = write_video(tmp_path / f"shown.{container}", count=2, draw=corners, matrix=matrix)
    np.testing.assert_array_equal(read(path, [1])[0], shown(stored, matrix))
    np.testing.assert_array_equal(next(frames(path)), shown(stored, matrix))  # as a stream


@pytest.mark.parametrize(
    ("matrix", "like"),
    [
        ((2, 0, 0, 2), (1, 0, 0, 1)),  # how large it is shown is left to the player
        ((0, -0.5, 0.5, 0), (0, -1, 1, 0)),
        ((-1.5, 0, 0, 1), (-1, 0, 0, 1)),  # as are pixels that are not square
        ((0.99995, -0.01, 0.01, 0.99995), (1, 0, 0, 1)),  # within a degree
        ((0, 0, 0, 0), (1, 0, 0, 1)),  # says nothing
    ],
)
def test_the_size_in_a_display_matrix_plays_no_part(
    tmp_path: Path, matrix: tuple[float, float, float, float], like: tuple[float, float, float, float]
) -> None:
    stored = read(write_video(tmp_path / "stored.mp4", count=2, draw=corners), [1])[0]
    path = write_video(tmp_path / "shown.mp4", count=2, draw=corners, matrix=matrix)
    np.testing.assert_array_equal(read(path, [1])[0], shown(stored, like))


@pytest.mark.parametrize("matrix", [(0.707, -0.707, 0.707, 0.707), (0.999, 0.04, -0.04, 0.999), (1, 0, 0.5, 1)])
def test_a_picture_that_is_turned_otherwise_is_refused(
    tmp_path: Path, matrix: tuple[float, float, float, float]
) -> None:
    path = write_video(tmp_path / "turned.mp4", count=2, matrix=matrix)
    with pytest.raises(VideoError, match=r"display matrix \([-0-9., ]*\); only quarter turns and mirroring .* upright"):
        read(path, [1])
    with pytest.raises(VideoError, match="display matrix"):
        next(frames(path))


def test_a_frame_is_made_smaller_when_it_is_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "turned.mp4", count=3, size=(96, 160), rotation=90)
    large, small = read(path, [2, 0, 2]), read(path, [2, 0, 2], short_side=40)
    assert (large.shape, small.shape) == ((3, 160, 96, 3), (3, 67, 40, 3))
    for whole, shrunk in zip(large, small, strict=True):
        np.testing.assert_array_equal(shrunk, shrink(whole, 40))
    np.testing.assert_array_equal(read(path, [1], short_side=96), read(path, [1]))  # never made larger


def test_colours_are_in_rgb_order(tmp_path: Path) -> None:
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        red = np.full((48, 64, 3), (200, 30, 30), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(red, format="rgb24")))
        container.mux(stream.encode())
    np.testing.assert_allclose(read(path, [0])[0].mean((0, 1)), (200, 30, 30), atol=4)


def test_a_file_written_anew_is_indexed_anew(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", count=20)
    assert frame_count(path) == 20
    write_video(path, count=33)
    assert frame_count(path) == 33


def half(path: Path, share: float = 0.6) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damaged(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(255 - byte for byte in data[middle : middle + 200])
    path.write_bytes(data)
    return path


def still(path: Path) -> Path:
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(3), format="rgb24")))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def text(path: Path) -> Path:
    path.write_text("not a video\n" * 200)
    return path


def without_frames(path: Path) -> Path:
    """A header that announces a video, and not one packet."""
    source = write_video(path.with_name("source.mp4"), count=2)
    with av.open(str(source)) as source_file, av.open(str(path), "w") as writer:
        writer.add_stream_from_template(source_file.streams.video[0])
        writer.start_encoding()
    return path


def all_cut_away(path: Path) -> Path:
    """Packets, and an edit list that shows none of them."""
    return trim(write_video(path.with_name("source.mp4"), gop=250), path, start=1.0, stop=0.9)


BAD = {
    "missing": ("video.mp4", lambda path: path, "no such file"),
    "directory": ("video.mp4", folder, "is a directory, not a video file"),
    "empty": ("video.mp4", lambda path: path.touch() or path, r"is empty \(0 bytes\)"),
    "text": ("video.txt", text, "is a text file, not a video"),
    "text called mp4": ("video.mp4", text, "is not a video that FFmpeg can read"),
    "still image": ("picture.png", still, "is a still image, not a video"),
    "audio only": ("song.m4a", write_audio, "holds no video, only audio"),
    "song with a cover": (
        "song.mp3",
        lambda path: write_audio(path, "libmp3lame", cover=True),
        "holds no video, only audio",
    ),
    "no frames": ("video.mp4", without_frames, "holds no video"),
    "all frames cut away": ("video.mp4", all_cut_away, "holds a video stream without a single frame"),
    "truncated mp4, index lost": ("video.mp4", lambda path: half(write_video(path)), "is truncated or damaged"),
    "truncated mp4, index first": (
        "video.mp4",
        lambda path: half(write_video(path, container_options={"movflags": "+faststart"}), 0.9),
        "is truncated",
    ),
    "truncated mkv": (
        "video.mkv",
        lambda path: half(write_video(path)),
        r"is truncated: \d.\d of 2.4 seconds are there",
    ),
    "truncated avi": ("video.avi", lambda path: half(write_video(path, codec="mpeg4")), "is truncated or damaged"),
    "damaged": ("video.mp4", lambda path: damaged(write_video(path, codec="mpeg4")), "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_whole_video_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, create, message = BAD[case]
    path = create(tmp_path / name)
    with pytest.raises(VideoError, match=message) as caught:
        read(path, range(frame_count(path)))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_cut_between_two_packets_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", container_options={"movflags": "+faststart"})
    with av.open(str(path)) as container:
        places = sorted(packet.pos for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: places[40]])
    with pytest.raises(VideoError, match="is truncated: 40 of 60 frames are there"):
        frame_count(path)


@pytest.mark.parametrize("asked", [30, 31])
def test_a_damaged_frame_and_those_built_on_it_are_refused(tmp_path: Path, asked: int) -> None:
    path = write_video(tmp_path / "video.mp4", codec="mpeg4", b_frames=0)
    with av.open(str(path)) as container:
        place = [packet.pos + packet.size // 2 for packet in container.demux(video=0) if packet.size][30]
    data = bytearray(path.read_bytes())
    data[place : place + 4] = bytes(255 - byte for byte in data[place : place + 4])
    path.write_bytes(data)
    assert numbers(read(path, range(24))) == list(range(24))
    with pytest.raises(VideoError, match="is damaged: frame 30 can't be decoded whole"):
        read(path, [asked])


def test_a_playlist_does_not_reach_for_the_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        calls: list[bool] = []

        def answer() -> None:
            with contextlib.suppress(OSError):  # the server closes when the test ends
                server.accept()[0].close()
                calls.append(True)

        listener = threading.Thread(target=answer, daemon=True)
        listener.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/part.ts"
        playlist = tmp_path / "video.m3u8"
        playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n")
        with pytest.raises(VideoError):
            frame_count(playlist)
        listener.join(0.2)
        assert not calls


def test_a_name_with_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "video.mp4").rename(tmp_path / "take:1 %d.mp4")
    monkeypatch.chdir(tmp_path)
    assert frame_count("take:1 %d.mp4") == 60


@pytest.mark.parametrize("asked", [[-1], [60], [3, 1000]])
def test_a_frame_outside_the_video_is_refused(tmp_path: Path, asked: list[int]) -> None:
    path = write_video(tmp_path / "video.mp4")
    with pytest.raises(VideoError, match=f"has frames 0 to 59, but frame {asked[-1]} was asked for"):
        read(path, asked)


def test_no_frame_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="indices is empty"):
        read(write_video(tmp_path / "video.mp4"), [])
