"""Streams, folders and batches: the same answers as one video at a time, and bad files that stop nobody."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from cast_models import randomise
from published_views import views_of
from video_files import numbers, picture, write_audio, write_video

import cast
from cast.cli import main
from cast.model.labels import LABELS
from cast.predict import Failure, Prediction, Predictor
from cast.predict.window import Window
from cast.video.files import VideoError
from cast.video.stream import frames, is_live
from cast.video.views import Protocol

NAMES = {"verb": ["open", "close", "cut"], "noun": ["door", "tap", "onion", "drawer"]}


@pytest.fixture(scope="module")
def model() -> cast.CAST:
    torch.manual_seed(0)
    found = randomise(cast.CAST("tiny", heads={"verb": 3, "noun": 4}, depth=1))
    found.labels = NAMES
    return found


@pytest.fixture(scope="module")
def checkpoint(model: cast.CAST, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    (root / "inner").mkdir()
    for name, count in (("a.mp4", 30), ("c.mp4", 45), ("inner/d.mp4", 20)):
        write_video(root / name, count=count)
    (root / "b.mp4").write_bytes(b"nothing")
    write_audio(root / "song.mp4")
    (root / "notes.txt").write_text("no video")
    return root


def guesses(answer: Prediction) -> dict[tuple, float]:
    return {(head, g.index): g.probability for head, own in answer.guesses.items() for g in own}


def test_many_are_each_as_if_alone(model: cast.CAST, folder: Path) -> None:
    alone, together = Predictor(model, batch=1), Predictor(model, batch=7)
    answers = list(together.folder(folder))
    assert [Path(answer.video).name for answer in answers] == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "song.mp4"]
    assert [type(answer) for answer in answers] == [Prediction, Failure, Prediction, Prediction, Failure]
    assert "is not a video that FFmpeg can read" in answers[1].error
    for answer in (answers[0], answers[2], answers[3]):
        single = alone(answer.video)
        assert (single.frames, single.views) == (answer.frames, answer.views)
        assert guesses(single) == pytest.approx(guesses(answer), abs=1e-5)
    assert guesses(answers[0]) != pytest.approx(guesses(answers[2]), abs=1e-3)  # or this would compare nothing


def test_a_folder_is_lines_and_bad_files_are_counted(
    checkpoint: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(folder), "--checkpoint", str(checkpoint), "--top", "2"]) == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [Path(line["video"]).name for line in lines] == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "song.mp4"]
    assert ["error" in line for line in lines] == [False, True, False, False, True]
    assert lines[0]["guesses"]["verb"][0]["label"] in NAMES["verb"]
    errors = captured.err.splitlines()
    assert "does not say how its training's frames were sampled" in errors[0]
    assert errors[1] == (
        f"cast predict: {folder}: left out below it: 1 whose names don't end like a video's (notes.txt)"
    )
    assert errors[2].startswith(f"cast predict: {folder / 'b.mp4'}: ")
    assert errors[-1] == "cast predict: error: 2 of 5 videos could not be read; the others are predicted"


def test_a_folder_without_videos_is_an_error(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(tmp_path), "--checkpoint", str(checkpoint)]) == 1
    assert "no file below it has a name that ends in one of .264, " in capsys.readouterr().err


def shown(clip: torch.Tensor) -> list[int]:
    """The numbers in a clip's pictures."""
    return numbers(clip.permute(1, 2, 3, 0).numpy())


@pytest.mark.parametrize(
    ("count", "every", "window", "spans"),
    [
        (10, 3, 4, [(0, 3), (3, 6), (6, 9)]),
        (11, 3, 4, [(0, 3), (3, 6), (6, 9), (7, 10)]),  # what came after the last guess is seen too
        (3, 5, 8, [(0, 2)]),  # a short stream is one guess
        (8, 8, 8, [(0, 7)]),
        (4, 1, 1, [(0, 0), (1, 1), (2, 2), (3, 3)]),
    ],
)
def test_the_window_slides(count: int, every: int, window: int, spans: list[tuple[int, int]]) -> None:
    protocol = Protocol(size=48, frames=4)
    clips = list(Window(protocol, every, window).clips(picture(n, 48, 48) for n in range(count)))
    assert [(first, last) for _, first, last in clips] == spans
    for clip, first, last in clips:
        seen = shown(clip)
        assert clip.shape == (3, 4, 48, 48)
        assert all(first <= number <= last for number in seen)
        assert seen == sorted(seen)


def test_a_stream_of_a_whole_video_is_its_centre_view(model: cast.CAST, tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", count=32)
    moments = list(Predictor(model, top=9).stream(frames(video), every=32, window=32))
    assert [(m.first, m.last) for m in moments] == [(0, 31)]
    with torch.no_grad():
        logits = model(next(views_of(video, 48, views=1, crops=1))[None])
    got = {guess.index: guess.probability for guess in moments[0].guesses["verb"]}
    assert got == pytest.approx(dict(enumerate(logits["verb"][0].softmax(-1).tolist())), abs=1e-5)


def test_frames_of_a_file_are_those_of_the_exact_reader(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", count=20)
    assert numbers(np.stack(list(frames(video)))) == list(range(20))
    turned = write_video(tmp_path / "t.mp4", count=2, rotation=90)
    assert next(frames(turned)).shape == (64, 48, 3)


def test_a_pipe_is_a_stream(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(tmp_path / "v.mkv", count=30)

    class Piped:
        buffer = io.BytesIO(video.read_bytes())

    monkeypatch.setattr(sys, "stdin", Piped)
    options = ["--checkpoint", str(checkpoint), "--every", "10", "--window", "20"]
    assert main(["predict", "-", *options]) == 0
    piped = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["first"], line["last"]) for line in piped] == [(0, 19), (10, 29)]
    assert main(["predict", str(video), *options]) == 0  # a file as a stream
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == piped


def test_what_is_a_stream() -> None:
    assert all(map(is_live, ["-", "/dev/video0", "rtsp://camera/1", "http://host/a.mp4"]))
    assert not any(map(is_live, ["a.mp4", "./-", "/data/dev/a.mp4"]))


def test_streams_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VideoError, match="no such file"):
        next(frames(tmp_path / "none.mp4"))
    with pytest.raises(VideoError, match="holds no video"):
        next(frames(write_audio(tmp_path / "song.m4a")))
    with pytest.raises(VideoError, match=r"the pipe: can't be read as a stream"):
        next(frames(io.BytesIO(b"nothing")))
    with pytest.raises(VideoError, match=r"/dev/video99: can't be read as a stream"):
        next(frames("/dev/video99"))


def test_bad_frames_and_options_are_refused(model: cast.CAST) -> None:
    predictor = Predictor(model)
    good = picture(1, 48, 48)
    for bad, error, message in (
        ([good, good[..., 0]], ValueError, r"frame 1 has shape \[48, 48\]; give RGB pictures"),
        ([good.astype(np.float32)], TypeError, "frame 0 is float32; give uint8"),
        ([good.tolist()], TypeError, "frame 0 came as list"),
        ([], ValueError, "the stream ended before its first frame"),
    ):
        with pytest.raises(error, match=message):
            list(predictor.stream(bad))
    for options in ({"every": 0}, {"window": 0}):
        with pytest.raises(ValueError, match="is 0; it must be at least 1 frame"):
            list(predictor.stream([good], **options))
    with pytest.raises(ValueError, match="batch is 0; it must be at least 1"):
        Predictor(model, batch=0)
    with pytest.raises(ValueError, match="list of 3 names for 'verb'"):
        Predictor(model, labels=NAMES | {"verb": ["a"]})


def test_names_come_with_the_model(checkpoint: Path, folder: Path) -> None:
    assert (checkpoint / LABELS).is_file()
    assert Predictor(checkpoint).labels == NAMES
    assert Predictor(checkpoint)(folder / "a.mp4").guesses["noun"][0].label in NAMES["noun"]


def test_a_damaged_packet_does_not_end_a_stream(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", count=40)
    with av.open(str(path)) as container:
        place = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][20]
    data = bytearray(path.read_bytes())
    data[place[0] : sum(place)] = bytes(place[1])
    path.write_bytes(data)
    assert 20 <= sum(1 for _ in frames(path)) < 40
