"""Annotation files in the published layouts, and errors that name file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cast.video.annotations import Sample, guess_layout, read_compositional, read_single
from cast.video.tables import read_table


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


#: What str.splitlines and str.split take for separators, and a name may hold.
ODD = "a\u2028b\x85c\x0bd\x1ce\u00a0f"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_alone(end: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"\ufeff{ODD}.mp4\t 1  {end}{end}{ODD}\x85.mp4 2{end}")
    assert [(s.path.name, s.labels["action"], s.line) for s in read_single(path, "")] == [
        (f"{ODD}.mp4", 1, 1),
        (f"{ODD}\x85.mp4", 2, 3),
    ]
    path = write(tmp_path, f"\ufeff{ODD},1,2 {end}{ODD}\u2028 , 3,4{end}")
    assert [s.path.name for s in read_compositional(path, "")] == [f"{ODD}.mp4", f"{ODD}\u2028.mp4"]
    path = write(tmp_path, f"\ufeffvideo,label{end}{ODD}.mp4 ,{ODD}{end}b,x{end}")
    assert read_table(path).rows == ((2, f"{ODD}.mp4", {"action": ODD}), (3, "b", {"action": "x"}))
    assert read_single(write(tmp_path, f"{ODD}.mp4{end}"), "", labelled=False)[0].path.name == f"{ODD}.mp4"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('"my clip.mp4" 7', "my clip.mp4"),
        ("'my clip.mp4'\t7", "my clip.mp4"),
        ('" a ""b"" .mp4"  7', ' a "b" .mp4'),
        ('say "hello".mp4 7', 'say "hello".mp4'),
        ('"clip 163" 7', "clip 163.mp4"),
        ("it's.mp4 7", "it's.mp4"),
    ],
)
def test_names_in_quotes_lose_them(line: str, name: str, tmp_path: Path) -> None:
    assert read_single(write(tmp_path, f"{line}\n"), "") == [Sample(Path(name), {"action": 7})]
    bare = line.removesuffix("7").strip()
    assert read_single(write(tmp_path, f"{bare}\n"), "", labelled=False) == [Sample(Path(name), {})]


def test_names_in_quotes_may_hold_the_separator(tmp_path: Path) -> None:
    path = write(tmp_path, '"a, b",1,2\n c ,3,4\n')
    assert [sample.path.name for sample in read_compositional(path, "")] == ["a, b.mp4", "c.mp4"]
    path = write(tmp_path, '"a, b"\n')
    assert [sample.path.name for sample in read_compositional(path, "", labelled=False)] == ["a, b.mp4"]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_blanks_within_quotes_are_part_of_the_name(mark: str, tmp_path: Path) -> None:
    lines = ['" a "', ' "b "  ', "  c d ", '"e ""f"" "', '"g, h "', 'i "j"']
    names = [" a ", "b ", "c d", 'e "f" ', "g, h ", 'i "j"']
    table = "".join(f'{line}{mark} x {mark}" y "\n' for line in lines)
    rows = read_table(write(tmp_path, f"video{mark} label{mark}note\n{table}")).rows
    assert [(name, labels["action"]) for _, name, labels in rows] == [(name, "x") for name in names]
    path = write(tmp_path, "".join(f"{line},1, 2\n" for line in lines))
    assert [sample.path.name for sample in read_compositional(path, "")] == [f"{name}.mp4" for name in names]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no annotations"),
        ("\n \n", "has no annotations"),
        ("video,label,label\na,x,y\n", "its header has 'label' twice"),
        ("video,video,label\na,b,x\n", "its header has 'video' twice"),
        ("video,label\na,3\nb,-1\n", r"train\.csv:3: action is -1; class indices count from 0"),
        ("{" * 200_000, r"train\.csv:\d: no CSV from here on"),
    ],
)
def test_what_is_no_table_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert guess_layout(text) == "csv"
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_lines_of_any_length_end_in_an_error_with_their_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.csv:2: no CSV \(field larger than field limit"):
        read_compositional(write(tmp_path, "a,1,2\n" + "b" * 200_000 + ",1,2\n"), "")


def test_blank_lines_before_a_header_are_skipped(tmp_path: Path) -> None:
    assert read_table(write(tmp_path, "\n \nvideo;label\na;x\n")).rows == ((4, "a", {"action": "x"}),)


NAMES = {"Cook.Cut_p02": "Cook.Cut_p02.mp4", "v1.0": "v1.0.mp4", "a.mp4": "a.mp4", "A.WebM": "A.WebM", "b": "b.mp4"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_without_a_video_s_ending_gets_mp4(name: str, tmp_path: Path) -> None:
    expected = tmp_path / NAMES[name]
    compositional, single = write(tmp_path, f"{name},1,2\n"), tmp_path / "single.csv"
    single.write_text(f"{name} 1\n")
    table = tmp_path / "table.csv"
    table.write_text(f"video,label\n{name},x\n")
    names = {"action": ["x"]}
    readers = (
        lambda: read_compositional(compositional, tmp_path),
        lambda: read_single(single, tmp_path),
        lambda: read_table(table).samples(tmp_path, names),
    )
    assert {read()[0].path for read in readers} == {expected}
    if name != NAMES[name]:
        (tmp_path / name).touch()  # what really lies there under that very name
        assert {read()[0].path for read in readers} == {tmp_path / name}
        expected.touch()
        assert {read()[0].path for read in readers} == {expected}


def test_a_list_of_frame_folders_says_how_many_pictures_there_are(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "my clip").mkdir()
    path = write(tmp_path, 'v1 163 1\n"my clip" 12 0\nmy clip 12 0\nv2.mp4 4\n')
    read = [(s.path.relative_to(tmp_path), s.pictures, s.labels["action"]) for s in read_single(path, tmp_path)]
    mine = (Path("my clip"), 12, 0)
    assert read == [(Path("v1"), 163, 1), mine, mine, (Path("v2.mp4"), None, 4)]
    assert guess_layout(path.read_text()) == "single"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('video,label\na.mp4,"wave\nb.mp4,clap\n', r"train\.csv:3: a cell has several lines; is a quote"),
        ('video,label\n"a.mp4,wave\nb.mp4,clap\n', r"train\.csv:3: has 1 cells, the header 2"),
        ('video,label\n"' + "a.mp4,wave\n" * 20000, r"train\.csv:\d+: no CSV from here on .* is a quote left open"),
    ],
)
def test_a_quote_left_open_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path, text))


@pytest.mark.parametrize("path", ["video_id", "path", "narration_id"])
def test_segments_are_not_taken_for_whole_videos(path: str, tmp_path: Path) -> None:
    file = write(tmp_path, f"{path},start_frame,stop_frame,label\nP01_01,12,90,0\n")
    if path != "video_id":
        assert read_table(file).rows == ((2, "P01_01", {"action": "0"}),)
        return
    with pytest.raises(ValueError, match=r"train\.csv: its lines are segments \(start_frame\) of the videos that"):
        read_table(file)


def test_text_in_another_encoding_is_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes("Töpfe.mp4 1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"not a text file in UTF-8 .*; save it as one"):
        read_single(tmp_path / "train.csv", "")
