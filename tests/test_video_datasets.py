"""Data sets as people have them on disk: published layouts, a CSV of one's own, class names, skip lists, YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from log_messages import log_messages

from cast.video.augment import AugmentSettings
from cast.video.classes import read_classes
from cast.video.datasets import DataSettings, open_dataset
from cast.video.skips import Skip, write_skips
from cast.video.tables import read_table


def write(root: Path, **files: str) -> Path:
    """Files in a directory; `train_csv="..."` is train.csv."""
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (root / f"{stem}.{suffix}").write_text(text)
    return root


def labels(root: Path, split: str = "train", **settings: Any) -> list[dict[str, int]]:
    return [dict(sample.labels) for sample in open_dataset(DataSettings(str(root), **settings)).samples(split)]


def test_a_directory_in_the_demos_layout_is_found_whole(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{split}_0.mp4").touch()
        (tmp_path / f"{split}.csv").write_text(f"{split}_0,1,2\n{split}_1,0,0\n")
    write(tmp_path, classes_json='{"verb": ["up", "down"], "noun": ["one", "two", "three"]}')
    dataset = open_dataset(tmp_path)
    assert dataset.splits == ("train", "val")
    assert dataset.settings.layout == "compositional"
    assert dataset.classes == {"verb": ["up", "down"], "noun": ["one", "two", "three"]}
    for split in dataset.splits:
        first, second = dataset.samples(split)
        assert first.path.is_file()
        assert first.labels == {"verb": 1, "noun": 2}
        assert (first.line, second.line) == (1, 2)


@pytest.mark.parametrize("place", ["train", "videos", "videos/train", "."])
def test_videos_are_found_where_people_put_them(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "a b.mp4").touch()
    write(tmp_path, train_csv="gone.mp4 1\na b.mp4 0\n")
    dataset = open_dataset(tmp_path)
    assert dataset.settings.layout == "single"
    assert dataset.samples("train")[1].path == tmp_path / place / "a b.mp4"
    assert dataset.classes == {"action": ["0", "1"]}


def test_a_csv_with_names_takes_its_classes_from_the_training_videos(tmp_path: Path) -> None:
    write(tmp_path, train_csv="video,label\na.mp4,wave\nb,clap hands\n\nc.mp4,wave\n", val_csv="video,label\nd,wave\n")
    dataset = open_dataset(tmp_path)
    assert dataset.settings.layout == "csv"
    assert dataset.classes == {"action": ["clap hands", "wave"]}
    assert [(s.path.name, s.labels["action"], s.line) for s in dataset.samples("train")] == [
        ("a.mp4", 1, 2),
        ("b.mp4", 0, 3),
        ("c.mp4", 1, 5),
    ]
    assert dataset.samples("val")[0].labels == {"action": 1}
    write(tmp_path, val_csv="video,label\nd,wawe\n")
    with pytest.raises(
        ValueError, match=r"val\.csv:2: action 'wawe' is none of the 2 class names; did you mean 'wave'"
    ):
        open_dataset(tmp_path).samples("val")


def test_a_csv_with_indices_and_its_separators(tmp_path: Path) -> None:
    write(tmp_path, train_csv='File;Class\n"a;b.mp4";2\nc.mp4;0\n', val_csv="File;Class\nc.mp4;4\n")
    dataset = open_dataset(tmp_path)
    assert dataset.classes == {"action": ["0", "1", "2", "3", "4"]}
    assert dataset.samples("train")[0].path.name == "a;b.mp4"
    assert labels(tmp_path, val=None, classes={"action": 3}) == [{"action": 2}, {"action": 0}]
    with pytest.raises(ValueError, match=r"train\.csv:2: action is 2; allowed are 0 to 1"):
        labels(tmp_path, classes={"action": 2})


def test_epic_kitchens_own_csv_and_class_lists(tmp_path: Path) -> None:
    header = "narration_id,participant_id,video_id,narration,verb,verb_class,noun,noun_class,all_nouns\n"
    write(tmp_path, train_csv=header + "P01_01_0,P01,P01_01,open door,open,1,door,2,\"['door']\"\n")
    write(
        tmp_path,
        EPIC_100_verb_classes_csv="id,key,instances,category\n0,take,\"['take']\",retrieve\n1,open,[],access\n",
    )
    write(tmp_path, EPIC_100_noun_classes_v2_csv="id,key,category\n2,door,c\n0,tap,c\n1,plate,c\n")
    dataset = open_dataset(tmp_path)
    assert dataset.classes == {"verb": ["take", "open"], "noun": ["tap", "plate", "door"]}
    (sample,) = dataset.samples("train")
    assert sample.path.name == "P01_01_0.mp4"
    assert sample.labels == {"verb": 1, "noun": 2}


def test_a_csv_whose_columns_have_other_names(tmp_path: Path) -> None:
    write(tmp_path, train_csv="Datei,Tätigkeit,video\na.mp4,gehen,7\n")
    columns = {"path": "Datei", "action": "Tätigkeit"}
    assert labels(tmp_path, val=None, columns=columns) == [{"action": 0}]
    assert read_table(tmp_path / "train.csv", columns).rows == ((2, "a.mp4", {"action": "gehen"}),)
    with pytest.raises(ValueError, match="has no column 'Ort' for 'path'"):
        labels(tmp_path, val=None, columns={"path": "Ort"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no annotations"),
        ("video,label\n", "has no annotations"),
        ("video,text\na,b\n", "the header must have a column for the video"),
        ("text,label\na,0\n", "the header must have a column for the video"),
        ("video,label\na.mp4\n", r"train\.csv:2: has 1 cells, the header 2"),
        ("video,label\na.mp4, \n", r"train\.csv:2: column 'label' is empty"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, train_csv=text)
    with pytest.raises(ValueError, match=message):
        labels(tmp_path, val=None)


def test_class_files_of_all_kinds(tmp_path: Path) -> None:
    write(
        tmp_path, a_json='["x", "y"]', b_json='{"action": ["x", "y"]}', c_json='{"y": "1", "x": "0"}', d_txt="x\ny\n\n"
    )
    write(tmp_path, e_csv="id,name\n1,y\n0,x\n")
    for name in ("a.json", "b.json", "c.json", "d.txt", "e.csv"):
        assert read_classes(tmp_path / name, "action") == ["x", "y"]
    write(tmp_path, f_json='{"x": "0", "y": "2"}', g_txt="x\nx\n", h_json='{"verb": ["x"]}', i_csv="number,name\n0,x\n")
    for name, message in {
        "f.json": "none for index 1",
        "g.txt": "'x' twice",
        "h.json": "has no names for 'action'",
        "i.csv": "the header must have 'id'",
        "j.txt": "no such file",
    }.items():
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            read_classes(tmp_path / name, "action")


def test_published_names_label_a_layout_of_indices(tmp_path: Path) -> None:
    write(tmp_path, train_csv="a.mp4 1\n", names_txt="wave\nclap\n")
    assert open_dataset(DataSettings(str(tmp_path), "single", classes="names.txt")).classes == {
        "action": ["wave", "clap"]
    }
    with pytest.raises(ValueError, match=r"classes are given for \['verb'\], the labels are \['action'\]"):
        open_dataset(DataSettings(str(tmp_path), "single", classes={"verb": 2})).samples("train")


def test_a_number_of_classes_takes_the_names_of_the_published_file(tmp_path: Path) -> None:
    """As the recipes have it; else a mirrored "jump left" would train as one."""
    write(tmp_path, train_csv="a.mp4 1\n", kinetics_400_labels_csv="id,name\n0,jump left\n1,jump right\n")
    settings = {"layout": "single", "val": None, "classes": {"action": 2}}
    assert open_dataset(DataSettings(str(tmp_path), **settings)).classes == {"action": ["jump left", "jump right"]}
    with pytest.raises(ValueError, match="a mirrored 'jump left' is no longer one"):
        labels(tmp_path, **settings, augment=AugmentSettings(flip=0.5))
    message = r"classes says 3 for 'action', but .*kinetics_400_labels\.csv names 2: give that number"
    with pytest.raises(ValueError, match=message):
        labels(tmp_path, **(settings | {"classes": {"action": 3}}))


def test_only_training_needs_labels(tmp_path: Path) -> None:
    write(tmp_path, train_csv="video,label\na,wave\nb,clap\n", test_csv="narration_id,start\nP01_1,3\n")
    settings = DataSettings(str(tmp_path), val=None, test="test.csv")
    dataset = open_dataset(settings)
    assert dataset.classes == {"action": ["clap", "wave"]}
    assert [(sample.path.name, sample.labels) for sample in dataset.samples("test")] == [("P01_1.mp4", {})]
    # Where columns are named, those of the labels may be absent together, but not one of them alone.
    columns = {"path": "narration_id", "verb": "V", "noun": "N"}
    assert open_dataset(replace(settings, train=None, columns=columns)).samples("test")[0].labels == {}
    write(tmp_path, test_csv="narration_id,V\nP01_1,3\n")
    with pytest.raises(ValueError, match="has no column 'N' for 'noun'"):
        open_dataset(replace(settings, train=None, columns=columns)).samples("test")
    write(tmp_path, train_csv="narration_id\nP01_1\n")
    with pytest.raises(ValueError, match="and one for the label"):
        open_dataset(settings).samples("train")


def test_a_test_without_labels_may_be_written_like_its_training(tmp_path: Path) -> None:
    write(tmp_path, train_csv="a,1,0\nb,0,2\n", test_csv="P01_1\nP01_2\n")
    settings = DataSettings(str(tmp_path), "compositional", val=None, test="test.csv")
    dataset = open_dataset(settings)
    assert [(sample.path.name, sample.labels) for sample in dataset.samples("test")] == [
        ("P01_1.mp4", {}),
        ("P01_2.mp4", {}),
    ]
    assert {head: len(names) for head, names in dataset.classes.items()} == {"verb": 2, "noun": 3}
    assert open_dataset(replace(settings, train=None)).classes == {}
    with pytest.raises(ValueError, match=r"test\.csv:1: expected 'video_id,verb,noun'"):
        open_dataset(replace(settings, train="test.csv")).samples("train")


def test_short_videos_are_tested_but_not_trained_on(tmp_path: Path) -> None:
    """The published code tests videos of fewer frames than a clip has."""
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text("a.mp4 0\nshort.mp4 0\ngone.mp4 0\n")
    write_skips(tmp_path / "skip.csv", [Skip("short.mp4", "short", "", ""), Skip("gone.mp4", "missing", "", "")])
    dataset = open_dataset(tmp_path)
    assert [sample.path.stem for sample in dataset.samples("train")] == ["a"]
    assert [sample.path.stem for sample in dataset.samples("val")] == ["a", "short"]
    assert "2 of 3 videos are skipped (1 missing, 1 short)" in dataset.skipped("train")
    assert "1 of 3 videos are skipped (1 missing)" in dataset.skipped("val")


def test_a_yaml_file_describes_a_data_set(tmp_path: Path) -> None:
    write(tmp_path, train_csv="a.mp4 1\n", val_csv="a.mp4 0\n")
    text = "data: {layout: single, size: 112, augment: {flip: 0.5, scale: [0.5, 1]}, classes: {action: 2}}\noptim: 3\n"
    write(tmp_path, dataset_yaml=text)
    for dataset in (open_dataset(tmp_path), open_dataset(tmp_path / "dataset.yaml", tmp_path)):
        assert dataset.settings.size == 112
        assert dataset.settings.augment == AugmentSettings(flip=0.5, scale=(0.5, 1.0))
        assert dataset.samples("val")[0].labels == {"action": 0}
    with pytest.raises(ValueError, match="names no root"):
        open_dataset(tmp_path / "dataset.yaml")
    write(tmp_path, dataset_yaml="data: {layout: single, sise: 112}\n", bad_yaml="data: [", other_yaml="model: 1\n")
    with pytest.raises(ValueError, match=r"dataset\.yaml: .*sise"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="not YAML"):
        open_dataset(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="has no `data` section"):
        open_dataset(tmp_path / "other.yaml")


def test_an_annotation_file_alone_is_a_validation_set(tmp_path: Path) -> None:
    write(tmp_path, mine_csv="video,label\na.mp4,0\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.mp4").touch()
    dataset = open_dataset(tmp_path / "mine.csv", root=tmp_path / "elsewhere")
    assert dataset.splits == ("val",)
    assert dataset.samples("val")[0].path.is_file()
    with pytest.raises(ValueError, match=r"split is 'train'; .* has val"):
        dataset.samples("train")


@pytest.fixture
def messages() -> Iterator[list[str]]:
    with log_messages("cast.video.datasets") as seen:
        yield seen


def test_a_skip_list_is_followed_and_said_aloud_once(
    tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, train_csv="a.mp4 1\nb.mp4 0\nc.mp4 0\n", val_csv="d.mp4 0\n")
    write_skips(tmp_path / "skip.csv", [Skip("b.mp4", "missing", "train.csv:2", ""), Skip("d.mp4", "empty", "", "")])
    dataset = open_dataset(DataSettings(str(tmp_path), "single"))
    for _ in range(2):
        assert [sample.path.name for sample in dataset.samples("train")] == ["a.mp4", "c.mp4"]
    assert messages == [f"{tmp_path}/train.csv: 1 of 3 videos are skipped (1 missing), as {tmp_path}/skip.csv says"]
    assert len(dataset.all_samples("train")) == 3
    with pytest.raises(ValueError, match="all 1 videos are on"):
        dataset.samples("val")
    assert len(labels(tmp_path, layout="single", skip_list="none")) == 3
    with pytest.raises(ValueError, match=r"other\.csv: no such skip list"):
        labels(tmp_path, layout="single", skip_list="other.csv")
    with pytest.raises(ValueError, match="is no skip list"):
        labels(tmp_path, layout="single", skip_list="train.csv")
    messages.clear()
    monkeypatch.setenv("RANK", "1")
    open_dataset(DataSettings(str(tmp_path), "single")).samples("train")
    assert messages == []


def test_a_flip_that_would_change_the_label_is_refused(tmp_path: Path) -> None:
    write(
        tmp_path,
        train_csv="video,label\na,Pushing left to right\nb,Moving it LEFT\n",
        val_csv="video,label\na,Moving it LEFT\n",
    )
    flip = AugmentSettings(flip=0.5)
    with pytest.raises(ValueError, match=r"a mirrored 'Moving it LEFT' is no longer one .*set data.augment.flip to 0"):
        labels(tmp_path, augment=flip)
    assert len(labels(tmp_path)) == 2
    assert len(labels(tmp_path, "val", augment=flip)) == 1
    write(tmp_path, train_csv="video,label\na,bright light\nb,leftover\n")
    assert len(labels(tmp_path, augment=flip)) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layout": "wide"}, "layout is 'wide'; it must be 'compositional' or 'single' or 'csv'"),
        ({"sampling": "sparse"}, "sampling is 'sparse'"),
        ({"decoder": "decord"}, "decoder is 'decord'"),
        ({"workers": -1}, "workers is -1"),
        ({"layout": "single", "columns": {"path": "x"}}, "columns are given"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings("root", **wrong)


@pytest.mark.parametrize("text", ["path,label\na.mp4,4000000000\n", "a.mp4 4000000000\n"])
def test_identifiers_are_not_taken_for_class_indices(tmp_path: Path, text: str) -> None:
    layout = "csv" if text.startswith("path") else "single"
    write(tmp_path, train_csv=text)
    with pytest.raises(ValueError, match="action would have 4000000001 classes, allowed are 1 to 100000"):
        labels(tmp_path, layout=layout, val=None)
    with pytest.raises(ValueError, match="action would have 0 classes"):
        labels(tmp_path, layout=layout, val=None, classes={"action": 0})
