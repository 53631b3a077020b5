"""`cast data check` on a data set with one of every fault, and what training makes of its skip list."""

from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path

import av
import pytest
from deadly_probe import DeadlyProbe
from video_files import write_video

import cast
from cast.cli import main
from cast.video.check import find_faults
from cast.video.datasets import open_dataset
from cast.video.probe import probe_all
from cast.video.sizes import about_sizes, command, scale
from cast.video.skips import how_to_skip, read_rows, read_skips, write_skips


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Ten videos: 1 is missing, 3 empty, 5 too short, 7 cut off, 8 text, the others good; val has the good 0."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(10):
        write_video(videos / f"v{number}.mp4", count=12 if number == 5 else 30, size=(96, 128))
    (videos / "v1.mp4").unlink()
    (videos / "v3.mp4").write_bytes(b"x" * 1000)
    (videos / "v7.mp4").write_bytes((videos / "v7.mp4").read_bytes()[:2000])
    (videos / "v8.mp4").write_text("no video, but long enough\n" * 100)
    lines = [f"v{number}.mp4 {number % 3}" for number in range(10)]
    (tmp_path / "train.csv").write_text("\n" + "\n".join(lines) + "\n")  # the first annotation is in line 2
    (tmp_path / "val.csv").write_text("v0.mp4 0\n")
    return tmp_path


FAULTS = {"v1": "missing", "v3": "empty", "v5": "short", "v7": "undecodable", "v8": "undecodable"}


def test_the_command_lists_every_fault_with_its_line(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(faulty), "--workers", "1"]) == 1
    captured = capsys.readouterr()
    for name, fault in FAULTS.items():
        assert f"{faulty / 'train.csv'}:{int(name[1:]) + 2}: {fault}: videos/{name}.mp4 (" in captured.out
    assert f"{faulty / 'val.csv'}:1: videos/v0.mp4 is in {faulty / 'train.csv'}:2 already" in captured.out
    assert captured.out.count("train.csv:") == 5 + 2
    assert "(12 frames, a clip has 16)" in captured.out
    assert "5 videos can't be used (1 empty, 1 missing, 1 short, 2 undecodable)" in captured.err
    assert "tests still use the short ones" in captured.err
    rows = list(csv.DictReader((faulty / "skip.csv").read_text().splitlines()))
    assert {Path(row["path"]).stem: row["fault"] for row in rows} == FAULTS


def test_training_skips_what_was_found_and_says_how_many(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(faulty), "--workers", "1"]) == 1
    dataset = open_dataset(faulty)
    assert [sample.path.stem for sample in dataset.samples("train")] == ["v0", "v2", "v4", "v6", "v9"]
    assert "5 of 10 videos are skipped (1 empty, 1 missing, 1 short, 2 undecodable)" in dataset.skipped("train")
    assert "none of 1 videos is skipped" in dataset.skipped("val")

    for name in ("v1", "v3", "v5", "v7", "v8"):
        write_video(faulty / "videos" / f"{name}.mp4", count=30, size=(96, 128))
    capsys.readouterr()
    assert main(["data", "check", str(faulty), "--workers", "1"]) == 0  # a mended data set has an empty list
    assert "every video can be used" in capsys.readouterr().out
    assert len(open_dataset(faulty).samples("train")) == 10


def test_classes_without_a_training_video_are_named(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (faulty / "classes.txt").write_text("\n".join(["zero", "one", "two", *(f"more {n}" for n in range(7))]))
    main(["data", "check", str(faulty), "--workers", "1"])
    line = "no training video shows 7 of 10 classes of action: more 0, more 1, more 2, more 3, more 4, ...\n"
    assert line in capsys.readouterr().out
    (faulty / "classes.txt").write_text("zero\none\ntwo\n")
    main(["data", "check", str(faulty), "--workers", "1"])
    assert "no training video" not in capsys.readouterr().out


def test_videos_that_are_annotated_twice_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", count=30, size=(96, 128))
    for number in range(6):
        write_video(tmp_path / f"{number}.mp4", count=30, size=(96, 128))
    (tmp_path / "train.csv").write_text("a.mp4 0\n" + "".join(f"{number}.mp4 1\n" for number in range(6)))
    (tmp_path / "val.csv").write_text("./a.mp4 0\n" + "".join(f"{number}.mp4 0\n" for number in range(6)))
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert f"{val}:1: a.mp4 is in {train}:1 already, with the same labels" in told
    assert f"{val}:3: 1.mp4 is in {train}:3 already, with other labels" in told
    assert f"... and 2 more in {val}" in told
    assert sum("already" in line for line in told) == 5


@pytest.mark.parametrize("command", ["check", "train", "evaluate"])
@pytest.mark.parametrize("again", ["a.mp4 0", "./a.mp4 1"])
def test_a_list_that_names_a_video_twice_is_refused(
    again: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", count=30, size=(96, 128))
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(f"a.mp4 0\n\nb.mp4 1\n{again}\n{again}\n")
    cast.CAST("tiny", heads={"action": 2}).save_pretrained(tmp_path / "model")
    data = [f"data.root={tmp_path}", "data.layout=single", "data.train=train.csv", "data.videos=."]
    commands = {
        "check": ["data", "check", str(tmp_path), "--workers", "1"],
        "train": ["train", "k400", *data, f"out={tmp_path / 'run'}"],
        "evaluate": ["evaluate", str(tmp_path / "model"), str(tmp_path), "--out", str(tmp_path / "out")],
    }
    assert main(commands[command]) == 1
    error = capsys.readouterr().err
    assert ".csv:4: names a.mp4 again, with " in error
    assert ("the same labels as" if again == "a.mp4 0" else "other labels than") + " line 1, and 1 more" in error


def test_many_segments_of_one_video_are_right_where_each_has_its_file(tmp_path: Path) -> None:
    header = "narration_id,video_id,verb_class,noun_class\n"
    (tmp_path / "train.csv").write_text(header + "P01_01_0,P01_01,0,0\nP01_01_1,P01_01,0,0\n")
    (first, second) = open_dataset(tmp_path).samples("train")
    assert (first.path.name, second.path.name) == ("P01_01_0.mp4", "P01_01_1.mp4")


@pytest.mark.parametrize("setting", ["320", "null"])
def test_large_videos_are_named_with_the_command_that_shrinks_them(
    tmp_path: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size, rotation in (("a", (96, 128), 0), ("b", (490, 600), 90), ("c", (482, 900), 0)):
        write_video(tmp_path / f"{name}.mp4", count=17, size=size, rotation=rotation)
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 0\nc.mp4 0\n")
    (tmp_path / "dataset.yaml").write_text(f"data: {{layout: single, val: null, short_side: {setting}}}\n")
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 0
    told = capsys.readouterr().out.splitlines()
    (line,) = [number for number, text in enumerate(told) if "shorter side" in text]
    assert told[line].startswith("2 of 3 videos have a shorter side of more than 480 pixels, up to 490 x 600 (")
    assert f"{tmp_path / 'b.mp4'}): " in told[line]
    assert ("shrinks their pictures to 320" in told[line]) is (setting == "320")
    assert ("data.short_side is null" in told[line]) is (setting == "null")
    assert told[line + 1] == f"  {command(320)}"
    assert not about_sizes({"a": (480, 900), "b": (640, 480)}, 320)


@pytest.mark.parametrize(("size", "result"), [((108, 192), (40, 72)), ((193, 108), (72, 40)), ((100, 100), (40, 40))])
def test_ffmpeg_s_filter_makes_the_shorter_side(size: tuple[int, int], result: tuple[int, int]) -> None:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=size[1], height=size[0], format="rgb24", time_base=Fraction(1, 25))
    name, _, options = scale(40).partition("=")
    graph.link_nodes(source, graph.add(name, options), graph.add("buffersink")).configure()
    graph.push(av.VideoFrame(size[1], size[0], "rgb24"))
    frame = graph.pull()
    assert (frame.height, frame.width) == result


def test_processes_find_what_one_finds(faulty: Path) -> None:
    seen: list[tuple[int, int]] = []
    dataset = open_dataset(faulty)
    parallel = find_faults(dataset, 2, lambda done, total: seen.append((done, total)))
    assert parallel == find_faults(dataset, 1)
    assert [Path(fault.path).stem for fault in parallel] == list(FAULTS)
    assert seen == [(done, 10) for done in range(1, 11)]


def test_a_file_that_kills_its_process_is_found_and_the_rest_is_probed() -> None:
    paths = [f"file {number}" for number in range(40)]
    results = list(probe_all(DeadlyProbe(16, "uniform", "pyav"), paths, workers=1))
    assert sorted(result.path for result in results) == sorted(paths)
    assert [(result.path, result.fault[0]) for result in results if result.fault] == [("file 13", "undecodable")]


def test_an_annotation_that_does_not_fit_is_named(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (faulty / "val.csv").write_text("v0.mp4 0\nv1.mp4 one\n")
    assert main(["data", "check", str(faulty)]) == 1
    assert "val.csv:2: action must be a class index, got 'one'" in capsys.readouterr().err
    assert main(["data", "check", str(faulty / "nothing")]) == 1
    assert "no such data set" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main(["data", "chek", str(faulty)])
    assert usage.value.code == 2


def test_a_name_that_no_file_can_have_is_a_fault_of_its_line(faulty: Path) -> None:
    (faulty / "train.csv").write_text(f"{'x' * 300}.mp4 0\nv0.mp4 1\n")
    assert [(skip.fault, skip.detail) for skip in find_faults(open_dataset(faulty))] == [
        ("missing", "File name too long")
    ]


def test_a_list_that_could_not_be_written_is_an_error_before_the_work(
    faulty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cast.video.check.look_at", lambda *_: pytest.fail("probed all the same"))
    assert main(["data", "check", str(faulty), "--out", str(faulty / "no/skip.csv")]) == 1
    assert "choose another file with --out" in capsys.readouterr().err


def damaged_at(path: Path, frame: int) -> None:
    """A video of 120 frames, each on its own, one of which can't be decoded."""
    write_video(path, count=120, size=(96, 128), codec="mpeg4", gop=1, b_frames=0)
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][frame]
        assert packet.pos is not None
        place, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    content[place : place + size] = bytes(size)
    path.write_bytes(content)


def test_damage_between_the_frames_of_validation_is_found_by_decoding_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged_at(tmp_path / "v.mp4", 110)  # validation takes the 64 frames in the middle
    (tmp_path / "train.csv").write_text("v.mp4 0\n")
    (tmp_path / "dataset.yaml").write_text("data: {layout: single, sampling: dense, val: null}\n")
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 0
    assert main(["data", "check", str(tmp_path), "--workers", "1", "--every-frame"]) == 1
    assert "train.csv:1: undecodable: v.mp4 (" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cast.video.probe._MEMORY", 96 * 128 * 3 * 32)  # 120 frames in four parts
        assert [skip.fault for skip in find_faults(open_dataset(tmp_path), every_frame=True)] == ["undecodable"]


def test_lines_that_a_person_added_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b,1"):
        write_video(tmp_path / f"{name}.mp4", count=30, size=(96, 128))
    (tmp_path / "train.csv").write_text("a.mp4 0\nb,1.mp4 1\ngone.mp4 1\n")
    (tmp_path / "skip.csv").write_text('path,fault\n"b,1.mp4",by hand\nold.mp4,undecodable\n')
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 1
    assert read_skips(tmp_path / "skip.csv") == {"gone.mp4": "missing", "b,1.mp4": "by hand"}
    assert "keeps 1 more, listed by hand" in capsys.readouterr().out
    assert [sample.path.stem for sample in open_dataset(tmp_path).samples("train")] == ["a"]


def test_a_faulty_video_that_a_person_listed_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("gone.mp4 0\n")
    (tmp_path / "skip.csv").write_text("path,fault\ngone.mp4,by hand\n")
    assert main(["data", "check", str(tmp_path), "--workers", "1"]) == 0
    assert [(row.path, row.fault) for row in read_rows(tmp_path / "skip.csv")] == [("gone.mp4", "by hand")]


def test_a_fault_is_told_with_the_first_line_that_names_its_video(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("gone.mp4 0\n")
    (tmp_path / "val.csv").write_text("away.mp4 0\ngone.mp4 0\n")
    told = {skip.path: skip.where for skip in find_faults(open_dataset(tmp_path))}
    assert told == {"gone.mp4": f"{tmp_path / 'train.csv'}:1", "away.mp4": f"{tmp_path / 'val.csv'}:1"}


@pytest.mark.parametrize("listed", [True, False])
def test_advice_about_a_bad_video_is_a_line_that_the_list_takes(tmp_path: Path, listed: bool) -> None:
    if listed:
        write_skips(tmp_path / "skip.csv", [])
    advice = how_to_skip(tmp_path / 'a, "b".mp4', tmp_path, "auto")
    assert f"to {tmp_path / 'skip.csv'}" in advice
    line = advice.partition("add the line ")[2].partition(" to ")[0]
    header = "" if listed else "path,fault\n"
    assert ("below the header path,fault" in advice) is not listed
    with (tmp_path / "skip.csv").open("a") as file:
        file.write(f"{header}{line}\n")
    assert read_skips(tmp_path / "skip.csv") == {'a, "b".mp4': "by hand"}
    assert "set data.skip_list=auto" in how_to_skip(tmp_path / "a.mp4", tmp_path, "none")
    assert f"to {tmp_path / 'skip.csv'}" in how_to_skip(tmp_path / "a.mp4", tmp_path, "none")
    assert f"to {tmp_path / 'mine.csv'}" in how_to_skip(tmp_path / "a.mp4", tmp_path, "mine.csv")
