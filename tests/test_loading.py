"""`Predictor` and `cast predict` answer with every model that `cast evaluate` tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cast_models import randomise
from evaluation_cases import CLASSES, COUNTS, small_cast
from torch import nn
from video_files import write_video

from cast import Predictor
from cast.baselines import Ensemble, SingleExpert, build
from cast.cli import main
from cast.predict import Prediction

SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", count=40)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    single = SingleExpert("clip", "cast", **(SIZES | {"heads": COUNTS}))
    return {
        "cast": small_cast(depth=1),
        "single": randomise(single, 1).eval(),
        "both": randomise(build("independent", **(SIZES | {"heads": COUNTS})), 2).eval(),
    }


@pytest.fixture(scope="module")
def saved(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        (folder / name / "labels.json").write_text(json.dumps(CLASSES))
    return {name: folder / name for name in models}


def shares(prediction: Prediction) -> dict[str, dict[str, float]]:
    return {head: {g.label: g.probability for g in guesses} for head, guesses in prediction.guesses.items()}


def test_a_model_of_any_kind_answers_as_an_object_and_from_its_directory(
    models: dict[str, Any], saved: dict[str, Path], video: Path
) -> None:
    for name, model in models.items():
        given = Predictor(model, labels=CLASSES, top=20)
        found = Predictor(saved[name], top=20)
        assert found(video) == given(video)
        assert found.labels == CLASSES
        assert type(found.model) is type(model)


def test_several_models_answer_by_the_mean_of_their_probabilities(
    models: dict[str, Any], saved: dict[str, Path], video: Path
) -> None:
    alone = [shares(Predictor(path, top=20)(video)) for path in saved.values()]
    together = Predictor(list(saved.values()), top=20)(video)
    for head in COUNTS:
        for label, share in shares(together)[head].items():
            mean = sum(one[head][label] for one in alone) / len(alone)
            assert share == pytest.approx(mean, rel=2e-6, abs=1e-7)
    assert Predictor(Ensemble([*models.values()]), labels=CLASSES, top=20)(video) == together


def test_no_place_and_models_among_places_are_refused(models: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no checkpoint was given; give the path"):
        Predictor([])
    with pytest.raises(TypeError, match=r"a checkpoint is SingleExpert; .* several as cast\.baselines\.Ensemble"):
        Predictor([models["single"]])


def test_members_that_look_at_other_clips_are_refused(models: dict[str, Any]) -> None:
    longer = SingleExpert("clip", "cast", **(SIZES | {"heads": COUNTS, "num_frames": 32}))
    with pytest.raises(ValueError, match="must have the same frames: member 0 has 16, member 1 has 32"):
        Predictor(Ensemble([models["single"], longer]))


def test_the_command_takes_one_place_or_a_list(
    saved: dict[str, Path], video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for words in (str(saved["single"]), f"[{saved['single']},{saved['both']}]", f"[{saved['both']}]"):
        assert main(["predict", str(video), "--checkpoint", words, "--json", "--top", "2"]) == 0
        told = capsys.readouterr()
        assert "does not say how its training's frames were sampled" in told.err
        answers.append(json.loads(told.out)["guesses"]["verb"])
    assert answers[1] not in (answers[0], answers[2])


def test_a_model_that_is_given_stays_as_it_is(models: dict[str, Any], video: Path) -> None:
    model: nn.Module = models["single"]
    own = next(model.parameters())
    with torch.no_grad():
        predictor = Predictor(model, labels=CLASSES)  # type: ignore[arg-type]
        predictor(video)
    assert predictor.model is model
    assert next(predictor.model.parameters()) is own
