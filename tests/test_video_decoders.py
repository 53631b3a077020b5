"""One protocol, two decoders: the same frames from the hard files, the same kind of error from the bad ones."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from video_files import ORIENTATIONS, corners, numbers, trim, write_video

from cast.ground.optional import MissingExtraError
from cast.video import decoders
from cast.video.decoders import Decoder, decoder
from cast.video.reader import VideoError, read


def torchcodec(short_side: int | None = None) -> Decoder:
    """torchcodec's decoder, or a skip that says why there is none here."""
    try:
        return decoder("torchcodec", short_side)
    except MissingExtraError as error:
        pytest.skip(str(error))


def uneven(path: Path) -> Path:
    times = np.cumsum(np.random.default_rng(0).integers(20, 90, 60)).tolist()
    return write_video(path, times=[0, *times[:-1]])


HARD: dict[str, Callable[[Path], Path]] = {
    "h264.mp4": write_video,
    "long.mp4": lambda path: write_video(path, count=120, gop=250, options={"x264-params": "scenecut=0"}),
    "mpeg4.mp4": lambda path: write_video(path, codec="mpeg4"),
    "uneven.mp4": uneven,
    "trimmed.mp4": lambda path: trim(write_video(path.with_suffix(".whole.mp4")), path, 0.9, 2.0),
    "vp9.webm": lambda path: write_video(path, codec="libvpx-vp9", b_frames=0, options={"deadline": "realtime"}),
    "rotated.mp4": lambda path: write_video(path, rotation=90),
}


@pytest.mark.parametrize("name", HARD)
def test_torchcodec_shows_the_frames_that_pyav_shows(name: str, tmp_path: Path) -> None:
    ours, theirs = decoder("pyav"), torchcodec()
    path = HARD[name](tmp_path / name)
    count = ours.frame_count(path, threads=1)
    assert theirs.frame_count(path, threads=1) == count
    wanted = [0, count - 1, count // 2, count // 2, 7, 3]
    frames, expected = theirs.read(path, wanted, threads=1), ours.read(path, wanted, threads=1)
    assert frames.dtype == np.uint8
    assert frames.shape == expected.shape
    if name != "rotated.mp4":
        assert numbers(frames) == numbers(expected)
    assert np.abs(frames.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_torchcodec_obeys_the_whole_display_matrix(tmp_path: Path, matrix: tuple[float, float, float, float]) -> None:
    path = write_video(tmp_path / "v.mp4", count=4, draw=corners, matrix=matrix)
    for short_side in (None, 24):
        mine = decoder("pyav", short_side).read(path, [3, 0, 3], threads=1)
        frames = torchcodec(short_side).read(path, [3, 0, 3], threads=1)
        assert frames.shape == mine.shape
        assert np.abs(frames.astype(int) - mine).max() < 24


def test_torchcodec_refuses_a_picture_that_is_turned_otherwise(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", count=4, matrix=(0.707, -0.707, 0.707, 0.707))
    for reader in (decoder("pyav"), torchcodec()):
        with pytest.raises(VideoError, match="display matrix"):
            reader.read(path, [1])


def test_torchcodec_names_a_file_that_it_cannot_read(tmp_path: Path) -> None:
    reader, path = torchcodec(), write_video(tmp_path / "good.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("no video\n" * 200)
    for bad in (text, tmp_path / "gone.mp4"):
        with pytest.raises(VideoError, match=bad.name):
            reader.frame_count(bad)
    with pytest.raises(VideoError, match="has frames 0 to 59, but frame 60 was asked for"):
        reader.read(path, [0, 60])
    with pytest.raises(VideoError, match="no frame was asked for"):
        reader.read(path, [])
    write_video(path, count=30)  # another file under the same name
    assert reader.frame_count(path) == 30


def test_pyav_is_the_exact_reader_and_travels(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    reader = pickle.loads(pickle.dumps(decoder("pyav")))
    assert reader.frame_count(path) == 60
    np.testing.assert_array_equal(reader.read(path, [5, 2]), read(path, [5, 2]))


def test_a_decoder_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="decoder is 'decord'; it must be 'pyav' or 'torchcodec'"):
        decoder("decord")  # type: ignore[arg-type]
    decoders._torchcodec.cache_clear()
    for module in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Hidden()])
    with pytest.raises(MissingExtraError, match=r"pip install 'cast-kernels\[torchcodec\]'"):
        decoder("torchcodec")


@pytest.mark.parametrize("when", ["import", "first file"])
def test_a_torchcodec_without_ffmpeg_is_no_data_set_of_damaged_videos(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def fail(*arguments: object) -> ModuleType:
        raise RuntimeError("Could not load libtorchcodec.\nmany lines more")

    found = fail if when == "import" else lambda module, extra: SimpleNamespace(VideoDecoder=fail)
    monkeypatch.setattr(decoders, "require", found)
    decoders._torchcodec.cache_clear()
    with pytest.raises(MissingExtraError, match=r"install FFmpeg 4 to 8 .* \(Could not load libtorchcodec\.\)$"):
        decoder("torchcodec")


def test_the_video_that_torchcodec_is_tried_with_is_one_frame(tmp_path: Path) -> None:
    (tmp_path / "one.mp4").write_bytes(decoders._one_frame())
    assert decoder("pyav").frame_count(tmp_path / "one.mp4") == 1


class _Hidden:
    """A finder that knows no module."""

    def find_spec(self, *arguments: object) -> None:
        return None
