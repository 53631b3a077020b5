"""`cast pretrain`: a folder of videos without labels, resumed, on two processes, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cast_models import SMALL
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_pretrain import CONFIG
from video_files import write_video

import cast
from cast.cli import main
from cast.pretrain import PretrainSettings, VideoMAE
from cast.pretrain.command import PICTURE, WEIGHTS, fit
from cast.pretrain.videos import unlabelled
from cast.training.log import Log
from cast.video.datasets import DataSettings
from cast.video.folder import find_videos
from cast.video.sampling import stride_indices


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for number in range(4):
        (root / f"part{number % 2}").mkdir(exist_ok=True)
        write_video(root / f"part{number % 2}" / f"{number}.mp4", count=20 + number)
    (root / "broken.mp4").write_bytes(b"nothing")
    (root / "skip.csv").write_text("path,fault,where,detail\nbroken.mp4,undecodable,,\n")
    (root / ".hidden.mp4").touch()
    return root


def command(folder: Path, out: Path, *overrides: str) -> list[str]:
    sizes = {"image_size": 32, "patch_size": 8, "num_frames": 6, "embed_dim": 16, "depth": 2, "num_heads": 2}
    recipe = {
        "data": {"root": str(folder), "train": None, "val": None, "size": 32, "frames": 6, "workers": 0},
        "model": sizes,
        "mask_ratio": 0.75,
        "decoder": {"depth": 1},
        "optim": {"epochs": 20, "total_batch": 4, "micro_batch": 2, "lr": 0.1, "warmup_epochs": 1},
        "run": {"precision": "fp32"},
        "pictures": 1,
    }
    file = out.parent / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return ["pretrain", str(file), f"out={out}", *overrides]


def test_a_folder_without_labels_trains_and_resumes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [path.name for path in find_videos(folder).videos] == ["broken.mp4", "0.mp4", "2.mp4", "1.mp4", "3.mp4"]
    plain = ("normalised=false", "data.augment.scale=[1.0,1.0]", "data.augment.ratio=[1.0,1.0]")  # bars are flat
    assert main(command(folder, tmp_path / "whole", *plain)) == 0
    assert "4 of 5 videos below it are taken" in " ".join(capsys.readouterr().err.split())
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "epoch"]
    assert len(losses) == 20
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3]), losses
    assert (tmp_path / "whole" / PICTURE).read_bytes().startswith(b"\x89PNG")
    expert = cast.TemporalExpert(**SMALL | {"image_size": 32}).load(tmp_path / "whole" / WEIGHTS)
    assert expert.config.embed_dim == 16
    assert main(command(folder, tmp_path / "whole")) == 1  # not twice into one directory
    assert "add --resume" in capsys.readouterr().err


@pytest.mark.parametrize(("sampling", "stride", "status"), [("dense", 3, 1), ("uniform", 3, 0), ("dense", 2, 0)])
def test_frames_are_a_stride_apart_where_sampling_is_dense(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: str, stride: int, status: int
) -> None:
    """And a resumed training can't change it, but for uniform sampling, which has none."""
    steps = set()

    def watched(length: int, rng: np.random.Generator, sampling: str, frames: int, stride: int) -> np.ndarray:
        indices = stride_indices(length, rng, sampling, frames, stride)
        steps.update(np.diff(indices).tolist())
        return indices

    monkeypatch.setattr("cast.pretrain.command.stride_indices", watched)
    few = ("optim.epochs=2", "pictures=0", f"data.sampling={sampling}")
    assert main(command(folder, tmp_path / "out", *few, "stride=2")) == 0
    assert steps == {2} if sampling == "dense" else len(steps) > 1
    assert main(command(folder, tmp_path / "out", *few, f"stride={stride}", "--resume")) == status


def test_a_resumed_pre_training_gives_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("optim.epochs=3", "pictures=0")
    assert main(command(folder, tmp_path / "whole", *few)) == 0

    class Killed(Exception):
        pass

    def dies(self, progress, step) -> None:
        if progress.step == 2:
            raise Killed

    monkeypatch.setattr(Log, "step", dies)
    with pytest.raises(Killed):
        main(command(folder, tmp_path / "cut", *few, "checkpoint.every=1"))
    monkeypatch.undo()
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    assert main(command(folder, tmp_path / "cut", *few, "checkpoint.every=1", "--resume")) == 0
    # Not the files' bytes: safetensors writes the entries of a header in any order.
    cut, whole = (VideoMAE.read(tmp_path / name / WEIGHTS).state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in cut.items())


def test_an_average_is_what_is_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(folder, out, "optim.epochs=2", "optim.ema=0.5", "pictures=0")) == 0
    newest = max((out / "checkpoints").glob("step-*"))
    average, last = (load_file(newest / f"{name}.safetensors") for name in ("ema", "weights"))
    written = VideoMAE.read(out / WEIGHTS).state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in average.items())
    assert any(not torch.equal(tensor, last[name]) for name, tensor in average.items())


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    data = DataSettings(os.fspath(tmp_path), train=None, size=32, frames=6)
    with pytest.raises(ValueError, match="no file below it has a name that ends in one of"):
        fit(PretrainSettings(data, CONFIG, out=str(tmp_path / "out"), pictures=0))
    with pytest.raises(ValueError, match=r"no such directory; data\.root names the one with the videos"):
        fit(PretrainSettings(DataSettings("/none", train=None, size=32, frames=6), CONFIG, pictures=0))


def test_a_recipe_without_a_root_does_not_take_the_present_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"data\.root is empty"):
        unlabelled(DataSettings("", train=None), "train")


def test_other_videos_are_not_gone_on_with(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("optim.epochs=1", "pictures=0", "optim.warmup_epochs=0")
    assert main(command(folder, tmp_path / "out", *few)) == 0
    others = tmp_path / "others"
    shutil.copytree(folder, others)
    (others / "part0/0.mp4").rename(others / "part0/7.mp4")
    capsys.readouterr()
    assert main(command(others, tmp_path / "out", *few, "--resume")) == 1
    assert "is of another training: it has {'videos': " in capsys.readouterr().err


def test_a_full_disk_loses_no_pre_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("optim.epochs=1", "pictures=0", "optim.warmup_epochs=0")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("cast.pretrain.model.save_file", full)
    assert main(command(folder, tmp_path / "out", *few)) == 1
    assert "No space left on device. The last checkpoint is whole" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command(folder, tmp_path / "out", *few, "--resume")) == 0
    assert (tmp_path / "out" / WEIGHTS).is_file()


@pytest.mark.heavy
def test_two_processes_pre_train_together(folder: Path, tmp_path: Path) -> None:
    words = command(folder, tmp_path / "out", "optim.epochs=2", "pictures=0", "optim.warmup_epochs=0")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, "-m", "cast.cli", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2]  # 4 videos a step between them
    assert VideoMAE.read(tmp_path / "out" / WEIGHTS).config.embed_dim == 16


def test_a_misspelt_setting_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pretrain", "videomae", "data.root=x", "mask_ratoi=0.5"])
    assert caught.value.code == 2
    assert "mask_ratoi, which is no setting: did you mean mask_ratio?" in capsys.readouterr().err
