"""A model says how its frames were sampled, and tests go by it: a Kinetics model is never tested with other frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluation_cases import CLASSES, COUNTS, small_cast, write_dataset
from video_files import write_video

import cast
from cast.baselines import build
from cast.cli import main
from cast.evaluation.run import choose_sampling
from cast.ground.sampling import read_sampling, write_sampling
from cast.loading import load_checkpoint
from cast.model.config import make_config
from cast.model.zoo import MODELS, create_model
from cast.predict import Predictor
from cast.training.models import save_finished
from cast.video.datasets import DataSettings, VideoSet, open_dataset

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", count=80)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained as on Kinetics."""
    folder = tmp_path_factory.mktemp("dense")
    model = small_cast()
    model.sampling = "dense"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A model of an earlier version, which does not say."""
    small_cast().save_pretrained(tmp_path / "unknown")
    return tmp_path / "unknown"


def test_a_model_keeps_its_sampling(dense: Path, tmp_path: Path) -> None:
    again = cast.CAST.from_pretrained(dense)
    assert again.sampling == "dense"
    again.sampling = None
    again.save_pretrained(dense.with_name("again"))
    assert cast.CAST.from_pretrained(dense.with_name("again")).sampling is None
    again.save_pretrained(tmp_path)
    write_sampling(tmp_path, "uniform")
    again.save_pretrained(tmp_path)  # an earlier model's, which this one's may not be
    assert not (tmp_path / "sampling.json").exists()


@pytest.mark.parametrize("content", ["dense", "[]", "{}", '{"sampling": "sparse"}'])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "sampling.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"sampling\.json( is no JSON|: must have .*uniform.* or .*dense.*; remove the file)"
    ):
        read_sampling(tmp_path)


@pytest.mark.parametrize("design", ["cast", "lateral"])
def test_a_finished_training_says_it(tmp_path: Path, design: str) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}

    def make():  # type: ignore[no-untyped-def]
        config = make_config(heads=COUNTS, **sizes)
        return cast.CAST(config) if design == "cast" else build(design, config)

    save_finished(make, make().state_dict(), CLASSES, "dense", tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert (loaded.sampling, loaded.classes) == ("dense", CLASSES)


def test_published_models_say_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with torch.device("meta"):
        found = {name: create_model(name, pretrained=False).sampling for name in MODELS}
    assert found == {"cast_base_ek100": "uniform", "cast_base_ssv2": "uniform", "cast_base_k400": "dense"}


def test_predict_goes_by_the_model(dense: Path, unknown: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(video), "--checkpoint", str(dense)]) == 0
    told = capsys.readouterr()
    assert "80 frames, 15 views, dense sampling" in told.out
    assert not told.err
    assert main(["predict", str(video), "--checkpoint", str(dense), "--sampling", "uniform"]) == 0
    assert "6 views, uniform sampling" in capsys.readouterr().out
    assert main(["predict", str(video), "--checkpoint", str(unknown), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["views"] == 6
    assert (
        "does not say how its training's frames were sampled; uniform sampling is taken, --sampling dense" in told.err
    )
    assert Predictor(cast.CAST.from_pretrained(dense)).protocol.name == "5x3"


def test_evaluate_goes_by_the_model(
    dense: Path, unknown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory says nothing about its sampling: the model decides, not the guess."""
    root = write_dataset(tmp_path / "data", 2)
    for name, model, words in (
        ("a", dense, "5x3 views, dense sampling: as the model was trained"),
        ("b", unknown, "2x3 views, uniform sampling: the default, because neither the model nor"),
    ):
        arguments = ["evaluate", str(model), str(root), "--out", str(tmp_path / name), "--workers", "0"]
        assert main(arguments) == 0
        assert words in capsys.readouterr().out
        about = json.loads((tmp_path / name / "metrics.json").read_text())["about"]
        assert about["protocol"]["views"] == (5 if name == "a" else 2)
        assert about["protocol"]["sampling"] == ("dense" if name == "a" else "uniform")

    stated = root / "dataset.yaml"
    stated.write_text("data: {root: '', layout: compositional, train: null, videos: val, sampling: uniform}\n")
    arguments = ["evaluate", str(dense), str(root), "--out", str(tmp_path / "c")]
    assert main(arguments) == 1
    refused = capsys.readouterr().err
    assert f"trained with dense sampling, data.sampling in {stated} is uniform" in refused
    assert "--sampling dense or --sampling uniform" in refused
    assert not (tmp_path / "c").exists()


def test_who_decides(tmp_path: Path) -> None:
    settings = DataSettings(str(tmp_path), sampling="dense")
    silent, stated = VideoSet(settings), VideoSet(settings, tmp_path / "dataset.yaml")
    assert choose_sampling("uniform", "dense", stated) == ("uniform", "as asked for")
    assert choose_sampling(None, "dense", stated)[0] == "dense"
    assert choose_sampling(None, "uniform", silent)[0] == "uniform"
    assert choose_sampling(None, None, silent)[0] == "dense"
    found, why = choose_sampling(None, None, stated)
    assert (found, why) == ("dense", f"data.sampling in {tmp_path / 'dataset.yaml'}; the model does not say")
    with pytest.raises(ValueError, match=r"trained with uniform sampling, .* is dense"):
        choose_sampling(None, "uniform", stated)


def test_only_a_file_that_names_it_states_it(tmp_path: Path) -> None:
    path = tmp_path / "dataset.yaml"
    for text, stated in (("{root: here}", None), ("{root: here, sampling: uniform}", path)):
        path.write_text(f"data: {text}\n")
        assert open_dataset(path).stated == stated
