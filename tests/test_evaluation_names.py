"""A test set that shows some of the model's classes, in any order: labels mean what their names say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_cases import CLASSES, COUNTS, small_cast, write_dataset
from video_files import write_video

from cast.cli import main as command
from cast.evaluation import read_predictions
from cast.evaluation.names import agree
from cast.model.labels import numbers
from cast.video.datasets import VideoSet, open_dataset

NAMES = {"action": ["cut", "open", "wash", "<close>"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the class names of `CLASSES`."""
    model = small_cast()
    model.labels = CLASSES
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def listed(tmp_path: Path, text: str, classes: str = "") -> VideoSet:
    (tmp_path / "val.csv").write_text(text)
    settings = "data: {root: DIR, layout: LAYOUT, train: null CLASSES}"
    layout = "csv" if text.startswith("video") else "single"
    filled = settings.replace("DIR", str(tmp_path)).replace("LAYOUT", layout).replace("CLASSES", classes)
    (tmp_path / "dataset.yaml").write_text(filled)
    return open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("own", "text", "expected"),
    [
        (NAMES["action"], "video,label\na,wash\nb,cut\n", [2, 0]),
        (NAMES["action"], "video,label\na,wash\nb,<close>\nc,open\nd,cut\n", [2, 3, 1, 0]),  # sorted otherwise
        (NAMES["action"], "a.mp4 1\nb.mp4 2\n", [1, 2]),
        (["0", "1", "2", "3"], "a.mp4 1\nb.mp4 2\n", [1, 2]),
        (["3", "2", "1", "0"], "a.mp4 1\nb.mp4 2\n", [1, 2]),  # a number is a place, whatever the place is called
        (["3", "2", "1", "0"], "video,label\na,1\nb,2\n", [1, 2]),
    ],
)
def test_labels_become_the_model_s(own: list[str], text: str, expected: list[int], tmp_path: Path) -> None:
    videos = listed(tmp_path, text)
    names, samples = agree({"action": own}, videos, videos.samples("val"))
    assert names == {"action": own}
    assert [sample.labels["action"] for sample in samples] == expected
    assert [sample.path for sample in samples] == [sample.path for sample in videos.samples("val")]


def test_a_class_list_of_the_data_set_may_have_another_order(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("open\nwash\n")
    videos = listed(tmp_path, "a.mp4 0\nb.mp4 1\n")
    assert [sample.labels["action"] for sample in agree(NAMES, videos, videos.samples("val"))[1]] == [1, 2]


def test_names_are_preferred_to_numbers(tmp_path: Path) -> None:
    videos = open_dataset(write_dataset(tmp_path / "data", 1))
    samples = videos.samples("val")
    assert agree(numbers(COUNTS), videos, samples) == agree(CLASSES, videos, samples) == (CLASSES, samples)
    (tmp_path / "data" / "classes.json").write_text(json.dumps(numbers(COUNTS)))
    assert agree(CLASSES, open_dataset(tmp_path / "data"), samples) == (CLASSES, samples)


def test_a_list_without_labels_has_the_model_s_names(tmp_path: Path) -> None:
    videos = listed(tmp_path, "video\na.mp4\n")
    assert agree(NAMES, videos, videos.samples("val")) == (NAMES, videos.samples("val"))


@pytest.mark.parametrize(
    ("own", "text", "classes", "message"),
    [
        (NAMES["action"], "video,label\na,rinse\nb,cut\n", "", "has 1 classes of 'action' that the model does not "
         "have: 'rinse'; it has 'cut', 'open', 'wash', .... Give the data set the class names of the training"),
        (NAMES["action"], "a.mp4 4\n", "", "has 1 classes of 'action' that the model does not have: '4'"),
        (["0", "1", "2", "3"], "video,label\na,wash\nb,cut\n", "", "and the model has 4 without names: give"),
        (NAMES["action"], "a.mp4 1\n", ", classes: {action: 3}", "the model has 4 classes of 'action', data.classes "
         "says 3: give it the model's number"),
    ],
)  # fmt: skip
def test_labels_that_can_t_be_told_are_refused_with_the_cure(
    own: list[str], text: str, classes: str, message: str, tmp_path: Path
) -> None:
    videos = listed(tmp_path, text, classes)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        agree({"action": own}, videos, videos.samples("val"))
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="the model answers verb and noun, the data set has action"):
        agree(CLASSES, videos, videos.samples("val"))


def test_the_command_on_a_test_set_that_lacks_classes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with rare classes that the test set lacks, also when its answers are reported on anew."""
    shown = [("a", "wash", "pan"), ("b", "open", "<b>onion</b>")]
    for name, _, _ in shown:
        write_video(tmp_path / f"{name}.mp4", count=20)
    (tmp_path / "val.csv").write_text("video,verb,noun\n" + "".join(f"{','.join(row)}\n" for row in shown))
    (tmp_path / "EPIC_100_tail_nouns.csv").write_text("noun\n4\n")
    run = ["--crops", "1", "--workers", "0"]
    assert command(["evaluate", str(checkpoint), str(tmp_path), "--out", str(tmp_path / "out"), *run]) == 0
    made = read_predictions(tmp_path / "out/predictions.jsonl")
    assert made.classes == CLASSES
    assert {head: label.tolist() for head, label in made.labels.items()} == {"verb": [3, 0], "noun": [4, 2]}
    figures = json.loads((tmp_path / "out/metrics.json").read_text())["metrics"]
    assert "tail_noun_top1" in figures
    answers = str(tmp_path / "out/predictions.jsonl")
    assert command(["evaluate", answers, str(tmp_path), "--out", str(tmp_path / "again"), *run]) == 0
    assert json.loads((tmp_path / "again/metrics.json").read_text())["metrics"] == figures
    (tmp_path / "val.csv").write_text("video,verb,noun\na,wash,plate\n")
    capsys.readouterr()
    assert command(["evaluate", str(checkpoint), str(tmp_path), "--out", str(tmp_path / "no"), *run]) == 1
    assert "has 1 classes of 'noun' that the model does not have: 'plate'" in capsys.readouterr().err
