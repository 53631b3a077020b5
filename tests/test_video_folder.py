"""The videos below a folder: every ending, every link, and a word about everything else."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cast_models import randomise
from log_messages import log_messages
from video_files import write_video

import cast
from cast.cli import main
from cast.predict import Prediction, Predictor
from cast.pretrain.videos import unlabelled
from cast.video.datasets import DataSettings
from cast.video.decoders import decoder
from cast.video.files import VideoError
from cast.video.folder import find_videos


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_videos(root).videos]


ENDINGS = (
    "mp4 MP4 m4v mov qt 3gp 3g2 mts MTS m2ts M2TS ts mpg mpeg vob VOB mod tod ogv ogm asf wmv avi divx "
    "flv f4v webm mkv gif dv mxf rm rmvb h264 hevc y4m ivf insv LRV"
)


def test_endings_of_any_case_are_known(tmp_path: Path) -> None:
    endings = ENDINGS.split()
    touch(tmp_path, *(f"{number}.{ending}" for number, ending in enumerate(endings)))
    found = find_videos(tmp_path)
    assert len(found.videos) == len(endings)
    assert found.note == ""


def test_what_is_no_video_is_counted_and_the_first_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", ".hidden.mp4", ".cache/b.mp4", "deep/c.xyz", *(f"n{i}.txt" for i in range(6)), "noend")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "self.mp4").symlink_to(tmp_path / "self.mp4")
    (tmp_path / "lost").symlink_to(tmp_path / "away")
    os.mkfifo(tmp_path / "pipe.mp4")
    found = find_videos(tmp_path)
    assert [path.name for path in found.videos] == ["a.mp4"]
    assert found.note == (
        f"{tmp_path}: left out below it: 2 hidden (.cache, .hidden.mp4); "
        "3 links that can't be followed (gone.mp4, lost, self.mp4); "
        "8 whose names don't end like a video's (deep/c.xyz, n0.txt, n1.txt, n2.txt, n3.txt, ...); "
        "1 that are no regular files (pipe.mp4)"
    )


def test_links_are_followed_and_no_folder_is_searched_twice(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    touch(root, "z/own.mp4", "one.mp4")
    touch(other, "far.mp4", "deep/farther.mp4")
    (root / "a-link-to-z").symlink_to(root / "z")  # sorted first, yet z keeps its name
    (root / "linked.mp4").symlink_to(other / "far.mp4")
    (root / "link").symlink_to(other)
    (root / "again").symlink_to(other)
    (root / "z" / "loop").symlink_to(root)
    (other / "back").symlink_to(root / "z")
    assert names(root) == ["again/deep/farther.mp4", "again/far.mp4", "linked.mp4", "one.mp4", "z/own.mp4"]
    note = find_videos(root).note
    assert "4 links to folders that were searched already (a-link-to-z, again/back, link, z/loop)" in note
    (tmp_path / "door").symlink_to(root)
    assert "z/own.mp4" in names(tmp_path / "door")  # the folder itself may be a link


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.mp4", "closed/b.mp4")
    scan = os.scandir

    def refuse(path: Path) -> Iterator[os.DirEntry[str]]:  # root may read everything
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("cast.video.folder.os.scandir", refuse)
    assert "1 folders that can't be read: Permission denied (closed)" in find_videos(tmp_path).note


LSTAT = {"follow_symlinks": False}


def test_a_folder_that_may_not_be_entered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names may be listed, and then every question about what they name is refused."""
    touch(tmp_path, "a.mp4", "closed/b.mp4", "closed/c/d.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "closed" / "b.mp4")
    stat, access = os.stat, os.access

    def refuse(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if "closed/" in os.fspath(path) or (os.fspath(path).endswith("link.mp4") and options != LSTAT):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr("os.stat", refuse)
    monkeypatch.setattr("os.access", lambda path, mode: os.fspath(path)[-6:] != "closed" and access(path, mode))
    found = find_videos(tmp_path)
    assert [path.name for path in found.videos] == ["a.mp4"]
    assert "1 folders that can't be read: Permission denied (closed)" in found.note
    assert "1 links that can't be followed (link.mp4)" in found.note
    for name in ("closed/b.mp4", "x" * 300 + ".mp4", "nul\0.mp4"):
        with pytest.raises(VideoError, match=r"can't be read: (Permission denied|File name too long|embedded null)"):
            decoder("pyav").frame_count(tmp_path / name)


def test_folders_of_numbered_frames_are_videos(tmp_path: Path) -> None:
    touch(tmp_path, *(f"P01/v{first}/img_{n:05d}.jpg" for first in (0, 1) for n in range(first, 4)))
    touch(tmp_path, "P01/v1/flow_x_00001.jpg", "P01/v1/n_frames", "P01/v1/more/c.mp4", "gap/1.png", "gap/3.png")
    touch(tmp_path, "photos/IMG_0231.jpg", "photos/IMG_0232.jpg", "covers/a.jpg", "covers/b1.jpg", "both/1.jpg")
    touch(tmp_path, "both/c.mp4", ".hidden/1.jpg")
    assert names(tmp_path) == ["P01/v0", "P01/v1", "P01/v1/more/c.mp4", "both/c.mp4", "gap"]
    note = find_videos(tmp_path).note
    left = "P01/v1/n_frames, both/1.jpg, covers/a.jpg, covers/b1.jpg, photos/IMG_0231.jpg, ..."
    assert f"6 whose names don't end like a video's ({left})" in note
    assert names(tmp_path / "gap") == ["."]


def test_nothing_at_all_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in one of .*\.mp4, .*nor is there any other file"):
        find_videos(tmp_path)
    touch(tmp_path, "a.txt")
    with pytest.raises(ValueError, match=r"left out below it: 1 whose names don't end like a video's \(a\.txt\)"):
        find_videos(tmp_path)
    with pytest.raises(ValueError, match=r"can't be read: No such file or directory"):
        find_videos(tmp_path / "none")


@pytest.fixture(scope="module")
def model() -> cast.CAST:
    torch.manual_seed(0)
    return randomise(cast.CAST("tiny", heads={"action": 3}, depth=1))


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder with a good video, one whose name is Latin-1, a broken one and a text file of such names."""
    root = tmp_path / "videos"
    root.mkdir()
    for name in (b"a.mp4", b"caf\xe9.MTS"):
        made = write_video(tmp_path / "made.mp4", count=20)
        os.rename(made, os.path.join(os.fsencode(root), name))
    for name in (b"bad\xff.mp4", b"notes\xff.txt"):
        Path(os.fsdecode(os.path.join(os.fsencode(root), name))).write_bytes(b"nothing")
    return root


def test_a_name_that_is_no_utf8_ends_no_run(
    odd: Path, model: cast.CAST, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    model.save_pretrained(tmp_path / "model")
    assert main(["predict", str(odd), "--checkpoint", str(tmp_path / "model")]) == 1
    told = capfdbinary.readouterr()
    lines = [json.loads(line) for line in told.out.decode("utf-8").splitlines()]
    assert [Path(line["video"]).name for line in lines] == ["a.mp4", r"bad\xff.mp4", r"caf\xe9.MTS"]
    assert ["guesses" in line for line in lines] == [True, False, True]
    assert r"bad\xff.mp4: is not a video" in lines[1]["error"]
    errors = told.err.decode("utf-8")
    assert r"1 whose names don't end like a video's (notes\xff.txt)" in errors
    assert "1 of 3 videos could not be read" in errors
    single = os.fsdecode(os.fsencode(odd) + b"/caf\xe9.MTS")
    for options in ([], ["--json"], ["--every", "10", "--window", "10"]):
        assert main(["predict", single, "--checkpoint", str(tmp_path / "model"), *options]) == 0
    assert rb"caf\xe9.MTS: 20 frames" in capfdbinary.readouterr().out


def test_a_terminal_of_another_encoding_gets_json_all_the_same(
    tmp_path: Path, model: cast.CAST, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "für \U0001f600.mp4", count=20)
    model.save_pretrained(tmp_path / "model")
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii"))
    assert main(["predict", str(tmp_path), "--checkpoint", str(tmp_path / "model")]) == 0
    sys.stdout.flush()
    assert Path(json.loads(held.getvalue().decode("ascii"))["video"]).name == "für \U0001f600.mp4"


def test_the_predictor_warns_of_what_is_left_out(odd: Path, model: cast.CAST) -> None:
    with log_messages("cast.predict.predictor") as told:
        answers = list(Predictor(model).folder(odd))
    assert [isinstance(answer, Prediction) for answer in answers] == [True, False, True]
    assert [r"(notes\xff.txt)" in line for line in told] == [True]


def test_pretraining_takes_and_skips_such_names(odd: Path) -> None:
    settings = DataSettings(str(odd), train=None, val=None)
    samples, note = unlabelled(settings, "train")
    assert len(samples) == 3
    assert r"3 of 3 videos below it are taken" in note
    assert r"(notes\xff.txt)" in note
    (odd / "skip.csv").write_text("path,fault\nbad\\xff.mp4,by hand\n")
    samples, note = unlabelled(settings, "train")
    assert [os.fsencode(sample.path.name) for sample in samples] == [b"a.mp4", b"caf\xe9.MTS"]
    assert "2 of 3 videos below it are taken" in note
