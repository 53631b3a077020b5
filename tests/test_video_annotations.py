"""Annotation files in the published layouts, and errors that name file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cast.video.annotations import Sample, read_compositional, read_single


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "train.csv"
    path.write_bytes(text.encode())
    return path


def test_compositional(tmp_path: Path) -> None:
    path = write(tmp_path, "P01_01_0,3,10\nP01_01_1, 0 ,2\n\n")
    assert read_compositional(path, "videos", {"verb": 97, "noun": 300}) == [
        Sample(Path("videos/P01_01_0.mp4"), {"verb": 3, "noun": 10}),
        Sample(Path("videos/P01_01_1.mp4"), {"verb": 0, "noun": 2}),
    ]


def test_single(tmp_path: Path) -> None:
    # Two spaces and a name with a space are both seen in the wild, and so are a byte order mark and CRLF.
    path = write(tmp_path, "\ufeffabc.mp4 7\r\nmy clip.mp4  11\r\n")
    assert read_single(path, Path("videos")) == [
        Sample(Path("videos/abc.mp4"), {"action": 7}),
        Sample(Path("videos/my clip.mp4"), {"action": 11}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,1,2\nb,1\n", r"train.csv:2: expected 'video_id,verb,noun', got 'b,1'"),
        ("video_id,verb,noun\n", r"train.csv:1: verb must be a class index, got 'verb' \(a header"),
        ("a,1,2\n\nb,97,2\n", r"train.csv:3: verb is 97; allowed are 0 to 96"),
        ("a,1,-2\n", r"train.csv:1: noun is -2; allowed are 0 to 299"),
        (",1,2\n", r"train.csv:1: expected 'video_id,verb,noun'"),
        ("a,1,2.5\n", r"train.csv:1: noun must be a class index, got '2.5'"),
        ("a,1,1_0\n", r"train.csv:1: noun must be a class index, got '1_0'"),  # which int() takes for 10
        ("\n", "train.csv: has no annotations"),
    ],
)
def test_a_bad_compositional_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_compositional(write(tmp_path, text), "videos", {"verb": 97, "noun": 300})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 1\nb.mp4\n", r"train.csv:2: expected 'name.mp4 label', got 'b.mp4'"),
        ("a.mp4 x\n", r"train.csv:1: action must be a class index, got 'x'"),
        ("a.mp4 400\n", r"train.csv:1: action is 400; allowed are 0 to 399"),
    ],
)
def test_a_bad_single_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_single(write(tmp_path, text), "videos", {"action": 400})


@pytest.mark.parametrize(
    ("read", "names", "labelled"),
    [(read_compositional, "P01_01_0\nP01_01_1\n", "P01_01_2,3,4"), (read_single, "a.mp4\nmy clip.mp4\n", "c.mp4 3")],
)
def test_all_lines_of_a_test_may_be_without_labels(tmp_path: Path, read: Any, names: str, labelled: str) -> None:
    path = write(tmp_path, names)
    paths = [Path("videos") / (name if name.endswith("mp4") else f"{name}.mp4") for name in names.splitlines()]
    assert read(path, "videos", labelled=False) == [Sample(name, {}) for name in paths]
    with pytest.raises(ValueError, match=r"train\.csv:1: "):
        read(path, "videos")
    assert read(write(tmp_path, labelled), "videos", labelled=False)[0].labels
    with pytest.raises(ValueError, match=rf"train\.csv:3: '{labelled}' has labels, line 1 has none"):
        read(write(tmp_path, names + labelled), "videos", labelled=False)
    with pytest.raises(ValueError, match=r"train\.csv:2: expected"):
        read(write(tmp_path, f"{labelled}\n{names}"), "videos", labelled=False)


def test_labels_of_another_kind_of_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels for 'verb', but classes are given for \\['action'\\]"):
        read_compositional(write(tmp_path, "a,1,2\n"), "videos", {"action": 400})


def test_files_that_are_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        read_single(tmp_path / "none.csv", "videos")
    with pytest.raises(ValueError, match="not a text file"):
        read_single(tmp_path, "videos")
    (tmp_path / "video.mp4").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="not a text file"):
        read_single(tmp_path / "video.mp4", "videos")
