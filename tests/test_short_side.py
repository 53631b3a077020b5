"""One rule for large pictures: validation, evaluation, predict and streams shrink what training shrinks, to the bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from evaluation_cases import CLASSES, small_cast, write_dataset
from training_cases import PLAN, PointNet, PointSource
from video_files import write_video

import cast
from cast.cli import main
from cast.ground.sampling import read_sampling, read_short_side, write_sampling
from cast.loading import load_checkpoint
from cast.predict import Predictor
from cast.predict.window import Window
from cast.training import Checkpoints
from cast.training.distributed import make_accelerator
from cast.training.engine import Engine
from cast.training.identity import lasting
from cast.training.models import save_finished
from cast.training.recipes import load_recipe
from cast.training.settings import TrainSettings
from cast.video.annotations import Sample
from cast.video.augment import AugmentSettings, apply
from cast.video.dataset import VideoDataset
from cast.video.datasets import DataSettings
from cast.video.loader import ClipLoader
from cast.video.reader import read
from cast.video.sampling import view_indices
from cast.video.transforms import to_clip, view_transform
from cast.video.views import Protocol

SIDE, SIZE = 48, 32
SETTINGS = DataSettings("unused", size=SIZE, short_side=SIDE, workers=0)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "large.mp4", count=40, size=(96, 160))


def validation(video: Path, short_side: int | None) -> torch.Tensor:
    frames = read(video, view_indices(40, 0, 1), short_side=short_side)
    return to_clip(frames, view_transform(SIZE))


def test_training_augments_small_pictures(video: Path) -> None:
    augment = AugmentSettings(randaugment="rand-m7-n4-mstd0.5-inc1", on="device")
    settings = dataclasses.replace(SETTINGS, augment=augment)
    stored = next(ClipLoader([Sample(video, {"a": 0})], settings, 1, True).batches(0))
    assert stored.video.shape[-2:] == (SIDE, 80)
    assert stored.plans is not None
    assert stored.plans[0][1:] == (SIDE, 80)
    on_cpu = dataclasses.replace(settings, augment=dataclasses.replace(augment, on="cpu"))
    made = next(ClipLoader([Sample(video, {"a": 0})], on_cpu, 1, True).batches(0))
    assert torch.equal(made.video[0], apply(stored.plans[0][0], stored.video[0], SIZE))
    whole = dataclasses.replace(settings, short_side=None)
    assert next(ClipLoader([Sample(video, {"a": 0})], whole, 1, True).batches(0)).video.shape[-2:] == (96, 160)


@pytest.mark.parametrize("side", [SIDE, None])
def test_validation_evaluation_and_streams_see_the_same(video: Path, side: int | None) -> None:
    expected = validation(video, side)
    assert not torch.equal(expected, validation(video, None if side else SIDE))  # or this would compare nothing
    settings = dataclasses.replace(SETTINGS, short_side=side)
    assert torch.equal(next(ClipLoader([Sample(video, {"a": 0})], settings, 1, False).batches(0)).video[0], expected)
    alone = VideoDataset([Sample(video, {"a": 0})], view_transform(SIZE), train=False, short_side=side)
    assert torch.equal(alone[0][0], expected)
    protocol = Protocol(views=1, crops=1, size=SIZE, short_side=side)
    tested = protocol.read(video)[0]
    raw = to_clip(read(video, view_indices(40, 0, 1), short_side=side), view_transform(SIZE, normalise=False))
    assert torch.equal(tested, raw)
    ((clip, _, _),) = Window(protocol, every=40, window=40).clips(iter(read(video, range(40))))
    assert torch.equal(clip, raw)


def test_a_model_says_it_and_predict_and_evaluate_obey(video: Path, tmp_path: Path) -> None:
    model = small_cast()
    model.sampling, model.short_side = "uniform", 320
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/sampling.json").read_text()) == {"sampling": "uniform", "short_side": 320}
    assert cast.CAST.from_pretrained(tmp_path / "model").short_side == 320
    assert Predictor(tmp_path / "model").protocol.short_side == 320
    pytest.importorskip("matplotlib")
    root = write_dataset(tmp_path / "data", 2)
    arguments = ["evaluate", str(tmp_path / "model"), str(root), "--out", str(tmp_path / "out"), "--workers", "0"]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["about"]["protocol"]["short_side"] == 320
    assert "larger pictures shrunk to a short side of 320 first" in (tmp_path / "out/report.html").read_text()
    # What was trained before keeps its meaning: pictures as they are.
    write_sampling(tmp_path / "model", "uniform")
    assert Predictor(tmp_path / "model").protocol.short_side is None
    assert main([*arguments[:-3], str(tmp_path / "old"), "--workers", "0"]) == 0
    assert "short_side" not in json.loads((tmp_path / "old/metrics.json").read_text())["about"]["protocol"]


def test_a_finished_training_says_it(tmp_path: Path) -> None:
    model = small_cast()
    save_finished(lambda: cast.CAST(model.config), model.state_dict(), CLASSES, "dense", tmp_path, 300)
    assert load_checkpoint(tmp_path).short_side == 300
    assert (read_sampling(tmp_path), read_short_side(tmp_path)) == ("dense", 300)


@pytest.mark.parametrize("content", ['{"short_side": 0}', '{"short_side": "320"}', '{"short_side": true}', "{}"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "sampling.json").write_text(content)
    for read_part in (read_sampling, read_short_side):
        with pytest.raises(ValueError, match=r'sampling\.json: must have .* and "short_side" in pixels'):
            read_part(tmp_path)


def test_members_of_an_ensemble_agree_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    root = write_dataset(tmp_path / "data", 2)
    for name, side in (("a", 320), ("b", None)):
        model = small_cast()
        model.short_side = side
        model.save_pretrained(tmp_path / name)
    assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "b"), str(root), "--out", str(tmp_path / "out")]) == 1
    assert "must have the same short side" in capsys.readouterr().err


def test_a_side_below_the_clip_s_is_refused() -> None:
    with pytest.raises(ValueError, match=r"short_side is 320, less than size 336, .* make it larger"):
        DataSettings("unused", size=336)
    assert DataSettings("unused", size=336, short_side=None).short_side is None


def test_the_papers_recipes_leave_pictures_as_they_are() -> None:
    sides = {name: load_recipe(TrainSettings, name).data.short_side for name in ("ek100", "ssv2", "k400", "ablation")}
    assert set(sides.values()) == {None}
    assert load_recipe(TrainSettings, "own-data").data.short_side == 320


def test_a_training_of_before_goes_on_with_null_only(tmp_path: Path) -> None:
    def begin(side: int | None, old: bool = False) -> Engine:
        settings = load_recipe(TrainSettings, "own-data", f"data.short_side={'null' if side is None else side}")
        values = lasting(settings, ("out",))
        if old:
            del values["data"]["short_side"]
        accelerator, net = make_accelerator(micro_batch=PLAN.micro_batch), PointNet()
        checkpoints = Checkpoints(tmp_path, accelerator, {"settings": values}, net)
        return Engine(net, PointSource(PLAN.micro_batch), PLAN, accelerator, checkpoints)

    begin(None, old=True).run()
    with pytest.raises(ValueError, match=r"it has \{'settings\.data\.short_side': None\}, this one \{.*: 320\}"):
        begin(320)
    assert begin(None).progress.step == PLAN.epochs * PLAN.steps_per_epoch
