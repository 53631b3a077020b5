"""From a video file and a checkpoint directory to named actions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from cast_models import randomise
from published_views import views_of
from rich.console import Console
from video_files import write_video

import cast
from cast.predict import LABELS, Guess, Prediction, Predictor, load_labels, main, predict, table
from cast.video.reader import VideoError

VERBS, NOUNS = ["open", "close", "cut"], ["door", "tap", "onion", "drawer"]


def checkpoint(folder: Path, heads: Mapping[str, int], labels: Mapping[str, list[str]] | None) -> Path:
    """A small CAST with random weights, saved."""
    torch.manual_seed(0)
    model = randomise(cast.CAST("tiny", heads=heads, depth=1))
    model.save_pretrained(folder)
    if labels is not None:
        (folder / LABELS).write_text(json.dumps(labels))
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", count=90)


@pytest.fixture(scope="module")
def compositional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compositional")
    return checkpoint(folder, {"verb": 3, "noun": 4}, {"verb": VERBS, "noun": NOUNS})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("single"), {"action": 6}, None)


def run(folder: Path, video: Path, **options) -> Prediction:
    model = cast.CAST.from_pretrained(folder)
    return predict(model, video, load_labels(folder, model.config.classes), **options)


def test_probabilities_are_the_mean_over_all_views(compositional: Path, video: Path) -> None:
    model = cast.CAST.from_pretrained(compositional).eval()
    with torch.no_grad():
        views = [model(clip[None]) for clip in views_of(video, 48)]
    prediction = run(compositional, video, top=10)
    assert prediction.frames == 90
    assert prediction.views == len(views) == 6
    for head, names in (("verb", VERBS), ("noun", NOUNS)):
        expected = torch.stack([view[head][0].softmax(-1) for view in views]).mean(0)
        got = {guess.label: guess.probability for guess in prediction.guesses[head]}
        assert got == pytest.approx(dict(zip(names, expected.tolist(), strict=True)), abs=1e-5)


def test_actions_are_pairs_ranked_by_joint_probability(compositional: Path, video: Path) -> None:
    guesses = run(compositional, video, top=12).guesses
    assert list(guesses) == ["verb", "noun", "action"]
    verb, noun = ({guess.label: guess.probability for guess in guesses[head]} for head in ("verb", "noun"))
    joint = {f"{v} {n}": p * q for v, p in verb.items() for n, q in noun.items()}
    assert {guess.label: guess.probability for guess in guesses["action"]} == pytest.approx(joint, abs=1e-6)
    order = [guess.probability for guess in guesses["action"]]
    assert order == sorted(order, reverse=True)
    assert all(guess.label == f"{VERBS[guess.index[0]]} {NOUNS[guess.index[1]]}" for guess in guesses["action"])


def test_one_head_without_names_gives_indices(single: Path, video: Path) -> None:
    prediction = run(single, video, top=3, sampling="dense")
    assert prediction.views == 15
    assert list(prediction.guesses) == ["action"]
    assert len(prediction.guesses["action"]) == 3
    assert all(guess.label == str(guess.index) for guess in prediction.guesses["action"])


def test_table_has_a_row_for_every_guess(compositional: Path, video: Path) -> None:
    assert table(run(compositional, video, top=4)).row_count == 4


def test_class_names_in_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    guess = Guess("put [bold] down", 0, 0.5)
    Console(width=60).print(table(Prediction("clip.mp4", 16, 6, {"action": [guess]})))
    assert "put [bold] down" in capsys.readouterr().out


def test_json_reads_back(compositional: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(video, compositional, top=2, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["video"] == str(video)
    assert (answer["frames"], answer["views"]) == (90, 6)
    assert [len(answer["guesses"][head]) for head in ("verb", "noun", "action")] == [2, 2, 2]
    best = answer["guesses"]["verb"][0]
    assert best["label"] == VERBS[best["index"]]
    assert 1 / 3 <= best["probability"] <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "labels.json is no JSON"),
        ('{"verb": ["a", "b", "c"]}', "list of 4 names for 'noun', as the model has; it has none"),
        ('{"verb": ["a"], "noun": []}', "list of 3 names for 'verb', as the model has; it has 1 names"),
        ("[]", "list of 3 names for 'verb'"),
    ],
)
def test_labels_that_do_not_fit_the_model_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / LABELS).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_labels(tmp_path, {"verb": 3, "noun": 4})


def test_a_model_in_another_dtype_is_fed_in_it(tmp_path: Path, video: Path) -> None:
    model = randomise(cast.CAST("tiny", heads={"action": 6}, depth=1))
    single_precision = predict(model, video, {"action": list("abcdef")}, top=6)
    model.bfloat16().save_pretrained(tmp_path)
    half_precision = run(tmp_path, video, top=6)
    a, b = ({g.index: g.probability for g in p.guesses["action"]} for p in (single_precision, half_precision))
    assert b == pytest.approx(a, abs=0.03)
    assert max(a.values()) - min(a.values()) > 0.2  # or this would compare nothing


def test_an_unknown_configuration_is_refused_by_name(video: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"depht": 3}')
    with pytest.raises(ValueError, match=r"config.json: .*depht"):
        main(video, tmp_path)


def test_bad_requests_are_refused(compositional: Path, video: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top is 0; it must be at least 1"):
        main(video, compositional, top=0)
    with pytest.raises(FileNotFoundError, match="none: no such checkpoint; give a directory that save_pretrained"):
        main(video, tmp_path / "none")
    model = cast.CAST.from_pretrained(compositional)
    with pytest.raises(ValueError, match="labels: must have a list of 4 names for 'noun', as the model has; it has 2"):
        predict(model, video, {"verb": VERBS, "noun": NOUNS[:2]})
    with pytest.raises(ValueError, match="sampling is 'sparse'; it must be 'uniform' or 'dense'"):
        predict(model, video, {"verb": VERBS, "noun": NOUNS}, sampling="sparse")
    guesses = Predictor(model)
    for call in (guesses, lambda x: list(guesses.many([x])), lambda x: predict(model, x, guesses.labels)):
        with pytest.raises(
            TypeError, match=r"a video came as ndarray; it must be a file's path. Predictor.stream takes"
        ):
            call(np.zeros((16, 32, 32, 3), np.uint8))
    with pytest.raises(TypeError, match=r"videos is the one path 'a.mp4'; give a list of paths"):
        list(guesses.many("a.mp4"))
    with pytest.raises(VideoError, match="no such file"):
        main(tmp_path / "none.mp4", compositional)
