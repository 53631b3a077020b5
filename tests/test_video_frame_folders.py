"""Folders of frames: exact frames, every picture upright and RGB, and whatever is missing or broken named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import numbers, picture, write_video

import cast
from cast.cli import main
from cast.video.annotations import Sample
from cast.video.dataset import VideoDataset
from cast.video.datasets import DataSettings, open_dataset
from cast.video.decoders import decoder
from cast.video.files import VideoError
from cast.video.loader import ClipLoader
from cast.video.transforms import view_transform

LONG = "frame_{:010d}.jpg"


def write_folder(path: Path, count: int = 20, name: str = "img_{:05d}.jpg", first: int = 1) -> Path:
    path.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(picture(number)).save(path / name.format(first + number), quality=95)
    return path


@pytest.mark.parametrize(
    ("name", "first"),
    [("img_{:05d}.jpg", 1), (LONG, 1), (LONG, 0), ("{}.png", 1), ("{:03d}.webp", 0), ("v2_{}.JPEG", 0)],
)
def test_frames_come_by_their_place_whatever_the_names(name: str, first: int, tmp_path: Path) -> None:
    folder, reader = write_folder(tmp_path / "v", 120, name, first), decoder("pyav")
    (folder / "flow_x_00001.jpg").write_bytes(b"optical flow")
    (folder / ".thumbs.jpg").touch()
    (folder / "n_frames").write_text("120")
    assert reader.frame_count(folder) == 120
    frames = reader.read(folder, [0, 119, 7, 7, 100])
    assert (frames.dtype, frames.shape) == (np.uint8, (5, 48, 64, 3))
    assert numbers(frames) == [0, 119, 7, 7, 100]
    with pytest.raises(VideoError, match="v: has frames 0 to 119, but frame 120 was asked for"):
        reader.read(folder, [3, 120])
    with pytest.raises(VideoError, match="no frame was asked for"):
        reader.read(folder, [])


def remove(*names: str) -> Any:
    return lambda folder: [(folder / name).unlink() for name in names]


def save(name: str, **arguments: Any) -> Any:
    return lambda folder: Image.new("RGB", (64, 48)).save(folder / name, **arguments)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("img_00007.jpg", "img_00009.jpg"), "lacks img_00007.jpg, 2 of its 20 frames are missing"),
        (remove("img_00001.jpg"), "begins with img_00002.jpg; frames count from 0 or 1"),
        (remove(*(f"img_{n:05d}.jpg" for n in range(1, 21))), "is a directory without frames: no file in it ends in"),
        (save("cover.jpg"), "has cover.jpg among its frames, which has no number"),
        (save("img_00021.png"), "has frames of 2 kinds, img_*.jpg and img_*.png; leave one"),
        (save("depth_00001.jpg"), "has frames of 2 kinds, depth_*.jpg and img_*.jpg"),
        (save("img_000021.jpg"), "has img_000021.jpg, which is not numbered like the other frames"),
        (save("img_0001.jpg"), "img_0"),  # number 1 twice: which one is frame 0?
    ],
)
def test_a_sequence_that_is_none_is_named(spoil: Any, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "v")
    assert decoder("pyav").frame_count(folder) == 20
    spoil(folder)
    os.utime(folder, ns=(0, folder.stat().st_mtime_ns + 10**7))  # some file systems count time in steps
    with pytest.raises(VideoError) as caught:
        decoder("pyav").frame_count(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert message in str(caught.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def one_wrong_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def animated(path: Path) -> None:
    Image.new("RGB", (64, 48)).save(
        path, format="PNG", save_all=True, append_images=[Image.new("RGB", (64, 48), "red")]
    )


@pytest.mark.parametrize(
    ("ending", "spoil", "message"),
    [
        ("jpg", cut, "can't be read as a picture (image file is truncated"),
        ("png", cut, "can't be read as a picture ("),
        ("png", one_wrong_byte, "can't be read as a picture ("),  # which ends the process in torchvision 0.29
        ("jpg", lambda path: path.write_text("no picture"), "can't be read as a picture (cannot identify image file"),
        ("png", lambda path: Image.new("I;16", (64, 48)).save(path), "its pixels are 'I;16'; save it with eight bits"),
        ("png", lambda path: Image.new("RGBA", (64, 48), (1, 2, 3, 9)).save(path), "it is transparent in places"),
        ("png", animated, "it holds 2 pictures"),
        ("jpg", lambda path: Image.new("RGB", (64, 40)).save(path), "v: has pictures of different sizes ("),
    ],
)
def test_a_picture_that_is_none_is_named(ending: str, spoil: Any, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "v", name="{:02d}." + ending)
    spoil(folder / f"03.{ending}")
    reader = decoder("pyav")
    assert numbers(reader.read(folder, [0, 19])) == [0, 19]
    with pytest.raises(VideoError) as caught:
        reader.read(folder, [0, 2])
    assert str(caught.value).startswith(f"{folder}: ")
    assert f"03.{ending}" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "1", "RGBA", "LA"])
def test_pictures_of_other_kinds_become_rgb(mode: str, tmp_path: Path) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    ending = "jpg" if mode == "CMYK" else "png"
    for number in range(2):
        Image.fromarray(picture(number + 5)).convert(mode).save(folder / f"{number}.{ending}")
    frames = decoder("pyav").read(folder, [1, 0])
    assert frames.shape == (2, 48, 64, 3)
    assert np.abs(frames.astype(int) - np.stack([picture(6), picture(5)])).max() < 20


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda upright: upright),
        (2, lambda upright: upright[:, ::-1]),
        (3, lambda upright: np.rot90(upright, 2)),
        (4, lambda upright: upright[::-1]),
        (5, lambda upright: upright.swapaxes(0, 1)),
        (6, lambda upright: np.rot90(upright, 1)),
        (7, lambda upright: np.rot90(upright, 2).swapaxes(0, 1)),
        (8, lambda upright: np.rot90(upright, -1)),
    ],
)
def test_pictures_are_turned_upright(orientation: int, turn: Any, tmp_path: Path) -> None:
    """`turn` makes what a camera stores of an upright picture."""
    upright = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turn(upright))).save(tmp_path / "0.png", exif=exif)
    assert np.array_equal(decoder("pyav").read(tmp_path, [0])[0], upright)


def test_clips_of_a_folder_are_those_of_a_video_with_the_same_frames(tmp_path: Path) -> None:
    """Lossless pictures of what a video decodes to: the same bits in training, validation and test."""
    video = write_video(tmp_path / "v.mp4", count=40)
    frames = decoder("pyav").read(video, range(40))
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"img_{number:05d}.png")
    settings = DataSettings(str(tmp_path), size=16, workers=0)
    for train in (True, False):
        made = [
            next(ClipLoader([Sample(path, {"action": 0})], settings, 1, train).batches(0)).video
            for path in (video, folder)
        ]
        assert torch.equal(*made)
    plain = [VideoDataset([Sample(path, {})], view_transform(16), train=True)[0][0] for path in (video, folder)]
    assert torch.equal(*plain)


def test_every_command_takes_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_folder(tmp_path / "data/frames" / f"v{number}", 20 + number)
    for split in ("train", "val"):
        (tmp_path / f"data/{split}.csv").write_text("v0 20 0\nv1 21 1\nv2 30 1\n")
    (tmp_path / "data/dataset.yaml").write_text("data: {layout: single, videos: frames}\n")
    data = str(tmp_path / "data")
    assert main(["data", "check", data, "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path}/data/val.csv:3: frames/v2 holds 22 pictures, not 30; all of them are used" in told
    assert told.count(" pictures, not ") == 2
    cast.CAST("tiny", heads={"action": 2}).save_pretrained(tmp_path / "model")
    arguments = ["--out", str(tmp_path / "out"), "--workers", "0", "--views", "1", "--crops", "1"]
    assert main(["evaluate", str(tmp_path / "model"), data, *arguments]) == 0
    assert (tmp_path / "out/report.html").is_file()
    capsys.readouterr()
    one = str(tmp_path / "data/frames/v1")
    assert main(["predict", one, "--checkpoint", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 21
    (tmp_path / "data/frames/v1/img_00004.jpg").unlink()
    assert main(["predict", one, "--checkpoint", str(tmp_path / "model")]) == 1
    assert "lacks img_00004.jpg" in capsys.readouterr().err
    assert main(["data", "check", data, "--workers", "1"]) == 1
    assert "train.csv:2: undecodable: frames/v1 (lacks img_00004.jpg" in capsys.readouterr().out
    assert [sample.path.name for sample in open_dataset(data).samples("train")] == ["v0", "v2"]


def test_folders_are_found_where_people_put_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "train/v0")
    (tmp_path / "train.csv").write_text("video,label\nv0,wave\n")
    assert open_dataset(tmp_path).samples("train")[0].path == tmp_path / "train/v0"


@pytest.mark.filterwarnings("error")
def test_frames_are_shrunk_without_a_warning(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "v", 2)
    assert decoder("pyav", 24).read(folder, [0, 1]).shape == (2, 24, 32, 3)
