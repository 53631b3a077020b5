"""EPIC-Kitchens-100's unseen participants and rare classes, where the organisers' lists lie in the data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_cases import COUNTS, predictions, small_cast
from video_files import write_video

from cast.cli import main
from cast.evaluation import read_predictions, write_predictions
from cast.evaluation.subsets import TAIL, UNSEEN, read_subsets
from cast.video.annotations import Sample

#: Name, verb, noun.
VIDEOS = (("P01_1", 0, 0), ("P01_102_3", 2, 1), ("P18_01_0", 4, 3), ("P18_01_1", 0, 4), ("P180_01_0", 1, 4))
SAMPLES = [Sample(Path(f"{name}.mp4"), {"verb": verb, "noun": noun}) for name, verb, noun in VIDEOS]


def write_lists(root: Path, participants: str = "P18", verbs: str = "2\n4", nouns: str = "4") -> None:
    """In the organisers' form: a header of one column, a line for each."""
    (root / UNSEEN["val"]).write_text(f"participant_id\n{participants}\n")
    (root / TAIL["verb"]).write_text(f"verb\n{verbs}\n")
    (root / TAIL["noun"]).write_text(f"noun\n{nouns}\n")


def test_who_is_unseen_and_what_is_rare(tmp_path: Path) -> None:
    assert read_subsets(tmp_path, "val", SAMPLES, COUNTS) == {}
    write_lists(tmp_path)
    found = {name: videos.tolist() for name, videos in read_subsets(tmp_path, "val", SAMPLES, COUNTS).items()}
    unseen = [False, False, True, True, False]
    assert found == {
        "unseen_verb": unseen,
        "unseen_noun": unseen,
        "unseen_action": unseen,
        "tail_verb": [False, True, True, False, False],
        "tail_noun": [False, False, False, True, True],
        "tail_action": [False, True, True, True, True],  # either is rare
    }
    # Each list is of its own split; a subset without videos has no accuracy.
    assert {name.split("_")[0] for name in read_subsets(tmp_path, "train", SAMPLES, COUNTS)} == {"tail"}
    write_lists(tmp_path, "P32", "3", "4")
    assert set(read_subsets(tmp_path, "val", SAMPLES, COUNTS)) == {"tail_noun", "tail_action"}
    unlabelled = [Sample(sample.path, {}) for sample in SAMPLES]
    assert read_subsets(tmp_path, "val", unlabelled, COUNTS) == {}
    assert read_subsets(tmp_path, "val", SAMPLES, {"action": 3}) == {}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"verbs": "6"}, "lists class '6', and the data set's are 0 to 5"),
        ({"nouns": "cup"}, "lists class 'cup'"),
    ],
)
def test_a_list_of_another_data_set_is_refused(tmp_path: Path, lists: dict[str, str], message: str) -> None:
    write_lists(tmp_path, **lists)
    with pytest.raises(ValueError, match=message):
        read_subsets(tmp_path, "val", SAMPLES, COUNTS)


def test_a_list_needs_its_column_and_names_that_say_who(tmp_path: Path) -> None:
    write_lists(tmp_path)
    with pytest.raises(ValueError, match=r"clip_1\.mp4: no participant in the name"):
        read_subsets(tmp_path, "val", [*SAMPLES, Sample(Path("clip_1.mp4"), SAMPLES[0].labels)], COUNTS)
    (tmp_path / UNSEEN["val"]).write_text("P18\nP32\n")
    with pytest.raises(ValueError, match="must have a header with 'participant_id'"):
        read_subsets(tmp_path, "val", SAMPLES, COUNTS)


def test_their_accuracies_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers of which every one is known: P18's first action is right, of the second the noun alone."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    root, model = tmp_path / "data", tmp_path / "model"
    root.mkdir()
    for name, _, _ in VIDEOS:
        write_video(root / f"{name}.mp4", count=16)
    (root / "val.csv").write_text("".join(f"{name},{verb},{noun}\n" for name, verb, noun in VIDEOS))
    (root / "classes.json").write_text(json.dumps({h: [f"{h} {n}" for n in range(c)] for h, c in COUNTS.items()}))
    write_lists(root)
    small_cast(depth=1).save_pretrained(model)
    words = [str(model), str(root), "--views", "1", "--crops", "1", "--workers", "0"]
    assert main(["evaluate", *words, "--out", str(tmp_path / "first")]) == 0
    file = tmp_path / "first" / "predictions.jsonl"
    made = read_predictions(file)
    guesses = {"verb": [0, 0, 4, 1, 1], "noun": [0, 1, 3, 4, 0]}
    for head, values in made.probabilities.items():
        values.zero_()[range(5), guesses[head]] = 1.0
    write_predictions(file, made)

    capsys.readouterr()
    out = tmp_path / "second"
    assert main(["evaluate", str(file), str(root), "--out", str(out), "--baselines.other", str(file)]) == 0
    summary = json.loads((out / "metrics.json").read_text())
    expected = {
        "unseen_verb_top1": 50.0,
        "unseen_noun_top1": 100.0,
        "unseen_action_top1": 50.0,
        "tail_verb_top1": 50.0,
        "tail_noun_top1": 50.0,
        "tail_action_top1": 25.0,
    }
    for figures in (summary["metrics"], summary["baselines"]["other"]["metrics"]):
        assert {name: figures[name] for name in expected} == expected
        assert figures["action_top1"] == 40.0
    assert "for the 2 videos of participants who are not in the training" in summary["meanings"]["unseen_action_top1"]
    low, high = summary["confidence_95"]["tail_action"]
    assert 0 < low < 25 < high < 100
    assert "tail_action_top1" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "Tail action top-1" in page
    assert "actions with a rare verb or a rare noun" in page


def test_no_lists_no_word() -> None:
    from cast.evaluation import metrics

    assert not [name for name in metrics(predictions()) if name.startswith(("tail", "unseen"))]
