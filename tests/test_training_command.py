"""`cast train` on real video files: from a recipe to a model that names actions, killed and resumed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

import torch
from processes import started
from safetensors import SafetensorError
from safetensors.torch import load_file

from cast import CAST
from cast.cli import main
from cast.demo.dataset import Sizes, make_dataset
from cast.training import CheckpointError, Checkpoints, Progress, Step, load_trained
from cast.training.command import Validation, fit
from cast.training.distributed import make_accelerator
from cast.training.log import Log
from cast.training.models import build
from cast.training.recipes import load_recipe
from cast.training.settings import TrainSettings
from cast.video.annotations import Sample
from cast.video.datasets import open_dataset
from cast.video.files import VideoError
from cast.video.loader import ClipLoader

HERE = Path(__file__).parent
#: Three steps of 8 clips an epoch, two epochs; a small model.
TINY = (
    "model.depth=1", "model.embed_dim=16", "model.num_heads=2", "optim.epochs=2", "optim.total_batch=8",
    "optim.micro_batch=4", "data.workers=0", "log.bars=false",
)  # fmt: skip
#: Everything that draws random numbers, and everything that a checkpoint has to remember.
RANDOM = (
    "data.augment.scale=[0.5,1.0]", "data.augment.erasing=0.5", "data.augment.randaugment=rand-m7-n4-mstd0.5-inc1",
    "data.augment.mixup=0.8", "data.augment.smoothing=0.1", "model.drop_path=0.3", "model.head_dropout=0.3",
    "model.depth=2", "optim.ema=0.9", "checkpoint.every=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("digits")
    make_dataset(directory, Sizes(plain=0, train=24, val=10), workers=1)
    return directory


def settings(data: Path, out: Path, *overrides: str) -> TrainSettings:
    return load_recipe(TrainSettings, "digits", f"data.root={data}", f"out={out}", *TINY, *overrides)


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def weights(out: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(out / name / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training with RANDOM that nobody disturbs leaves behind."""
    out = tmp_path_factory.mktemp("whole")
    fit(settings(data, out, *RANDOM))
    return out


def test_from_a_recipe_to_an_action(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["train", "digits", f"data.root={data}", f"out={out}", *TINY]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert "6 steps (2 epochs of 3) of 8 clips = 4 x 2 micro-batches x 1 process on cpu" in told
    assert "peak learning rate 0.001" in told
    assert "epoch 2  step 6 of 6" in told
    steps, epochs = lines(out, "step"), lines(out, "epoch")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["clips_per_s"] > 0 and line["memory_gb"] > 0 and line["grad_norm"] > 0 for line in steps)
    assert {"loss", "verb", "noun", "val loss", "val verb", "val noun"} <= epochs[-1].keys()
    assert load_recipe(TrainSettings, str(out / "settings.yaml")).optim.total_batch == 8
    video = data / "val" / "val_00000.mp4"
    assert main(["predict", str(video), "--checkpoint", str(out / "model"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["guesses"]["noun"][0]["label"] in json.loads((data / "classes.json").read_text())["noun"]
    finished = CAST.from_pretrained(out / "model")
    assert (finished.config.classes, finished.sampling) == ({"verb": 12, "noun": 10}, "uniform")

    assert main(command) == 1
    assert "add --resume to go on" in capsys.readouterr().err
    assert main([*command, "optim.lr=1e-4", "--resume"]) == 1
    assert "'settings.optim.lr'" in capsys.readouterr().err
    annotations = data / "train.csv"
    text = annotations.read_text()
    annotations.write_text("".join(reversed(text.splitlines(keepends=True))))
    try:
        assert main([*command, "--resume"]) == 1
    finally:
        annotations.write_text(text)
    assert "is of another training: it has {'videos'" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert "going on after step 6" in capsys.readouterr().err


def test_a_log_without_checkpoints_is_not_overwritten(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("what an earlier training left\n")
    command = ["train", "digits", f"data.root={data}", f"out={tmp_path}", *TINY, "optim.epochs=1"]
    assert main([*command, "optim.warmup_epochs=0"]) == 1
    told = capsys.readouterr().err
    assert str(tmp_path) in told
    assert "choose another out, or add --resume to begin anew" in told
    assert log.read_text() == "what an earlier training left\n"
    assert not (tmp_path / "settings.yaml").exists()


def test_an_interrupt_says_how_to_go_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Log, progress: Progress, step: Step) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Log, "step", interrupt)
    assert main(["train", "digits", f"data.root={data}", f"out={tmp_path}", *TINY]) == 130
    assert "stopped; the same command with --resume goes on" in capsys.readouterr().err


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", [5])
def test_resuming_in_an_epoch_gives_the_same_bits(
    data: Path, whole: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixup, drop path, dropout, augmentation, averages, accumulation; with other worker processes the second time."""
    tell = Log.step

    def kill(self: Log, progress: Any, step: Any) -> None:
        tell(self, progress, step)
        if progress.step == stop:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", kill)
        with pytest.raises(Killed):
            fit(settings(data, tmp_path, *RANDOM))
    assert (tmp_path / "checkpoints" / f"step-{stop - 1:08d}").is_dir()
    assert not (tmp_path / "model").exists()
    torch.manual_seed(77)
    fit(settings(data, tmp_path, *RANDOM, "data.workers=1"), resume=True)
    for model in ("model", "model-ema"):
        assert equal(weights(tmp_path, model), weights(whole, model))
    assert not equal(weights(whole), weights(whole, "model-ema"))
    drop = ("clips_per_s", "memory_gb")
    logs = [
        [{k: v for k, v in line.items() if k not in drop} for line in lines(out, "step")] for out in (tmp_path, whole)
    ]
    assert logs[0] == logs[1]
    assert lines(tmp_path, "epoch") == lines(whole, "epoch")


def test_a_failed_validation_costs_no_step_and_no_line_is_written_twice(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the first epoch, with checkpoints at ends only: a bad video, then a kill after the log's line."""
    steps: list[int] = []
    tell = Log.step

    def note(self: Log, progress: Any, step: Any) -> None:
        steps.append(progress.step)
        tell(self, progress, step)

    def fail(*_: object) -> None:
        raise OSError("val_00000.mp4 is damaged")

    def kill(*_: object) -> None:
        raise Killed

    def again(**options: bool) -> None:
        fit(settings(data, tmp_path, *RANDOM, "checkpoint.every=0"), **options)

    monkeypatch.setattr(Log, "step", note)
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "__call__", fail)
        with pytest.raises(OSError, match="is damaged"):
            again()
    assert lines(tmp_path, "epoch") == []
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "update", kill)
        with pytest.raises(Killed):
            again(resume=True)
    assert lines(tmp_path, "epoch") == lines(whole, "epoch")[:1]
    again(resume=True)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert lines(tmp_path, "epoch") == lines(whole, "epoch")
    for model in ("model", "model-ema"):
        assert equal(weights(tmp_path, model), weights(whole, model))


def test_kill_9_at_any_moment(data: Path, whole: Path, tmp_path: Path) -> None:
    """A real process and a real SIGKILL, in the middle of the first epoch; then the same command with --resume."""
    words = ["train", "digits", f"data.root={data}", f"out={tmp_path}", *TINY, *RANDOM, "--resume"]
    with started(main, words, log=tmp_path / "log.txt") as process:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "checkpoints").glob("step-*")):
            assert process.is_alive(), "it ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint appeared"
            time.sleep(0.005)
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    fit(settings(data, tmp_path, *RANDOM), resume=True)
    for model in ("model", "model-ema"):
        assert equal(weights(tmp_path, model), weights(whole, model))


def test_a_training_can_start_from_a_cast(data: Path, whole: Path, tmp_path: Path) -> None:
    small = "model.depth=2"
    start = settings(data, tmp_path, small, f"experts.cast={whole / 'model'}", "experts.train=false")
    classes = open_dataset(start.data).classes
    model, notes = build(start, classes)
    assert notes == []
    assert equal({k: v.detach() for k, v in model.state_dict().items()}, weights(whole))
    assert {name for name, p in model.named_parameters() if not p.requires_grad} >= {"clip_conv1.weight"}
    other, notes = build(start, {"verb": classes["verb"][:3], "noun": classes["noun"]})
    assert "head_verb.weight" in notes[0]
    assert other.head_verb.out_features == 3
    assert torch.equal(other.head_noun.weight, model.head_noun.weight)
    with pytest.raises(ValueError, match="does not fit the recipe's model"):
        build(settings(data, tmp_path, f"experts.cast={whole / 'model'}"), classes)


def test_a_checkpoint_of_what_trains_finds_its_experts(data: Path, whole: Path, tmp_path: Path) -> None:
    start = settings(data, tmp_path, "model.depth=2", f"experts.cast={whole / 'model'}", "experts.train=false")
    fit(start)
    classes = open_dataset(start.data).classes
    model, _ = build(start, classes)
    newest = tmp_path / "checkpoints" / "step-00000006"
    assert "clip_conv1.weight" not in load_file(newest / "weights.safetensors")
    load_trained(model, newest)
    assert equal({k: v.detach() for k, v in model.state_dict().items()}, weights(tmp_path))
    assert torch.equal(weights(tmp_path)["clip_conv1.weight"], weights(whole)["clip_conv1.weight"])


def test_settings_that_cannot_train(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed

    def refused(*overrides: str) -> str:
        assert main(["train", "digits", f"data.root={data}", f"out={tmp_path}", *TINY, *overrides]) == 1
        return capsys.readouterr().err

    assert "experts.clip names no weights" in refused("experts.train=false")
    assert "out of 1, 2, 4, 8" in refused("optim.micro_batch=3")
    assert "24 videos make no step of optim.total_batch=64" in refused("optim.total_batch=64")
    assert "model.heads is {'action': 7}" in refused("model.heads={action: 7}")
    assert "run.compile is 'inductr'" in refused("run.compile=inductr")
    assert "pip install 'cast-kernels[wandb]'" in refused("log.trackers=[wandb]")
    if not torch.cuda.is_available():
        assert "fp16 needs a GPU" in refused("run.precision=fp16")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    told = refused(f"out={tmp_path / 'file' / 'out'}")
    assert f"cannot write into {tmp_path / 'file' / 'out'}" in told
    assert "choose another out" in told
    # What accelerate launch --cpu --num_processes 2 leaves in the environment of the only process that it starts.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "asked for several processes, but has started one process alone" in refused()


def test_precision_compilation_and_a_tracker(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    more = ("run.precision=bf16", "run.compile=eager", "run.fused=false", "log.trackers=[tensorboard]", "log.every=3")
    progress = fit(settings(data, tmp_path, *more, "optim.epochs=1", "validate_every=0"))
    assert progress.history[0].keys() == {"epoch", "loss", "verb", "noun"}
    assert [line["step"] for line in lines(tmp_path, "step")] == [3]
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path).values())
    assert not any("_orig_mod" in name for name in weights(tmp_path))


def test_a_model_that_finds_no_room_is_written_by_resuming(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CAST, "save_pretrained", refuse)
        with pytest.raises(CheckpointError, match=r"No space left on device.*with --resume"):
            fit(settings(data, tmp_path, "optim.epochs=1", "validate_every=0"))
    fit(settings(data, tmp_path, "optim.epochs=1", "validate_every=0"), resume=True)
    assert weights(tmp_path)


def test_a_training_goes_on_without_a_video_that_turned_out_damaged(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, root)
    recipe = settings(root, out, "checkpoint.every=1", "validate_every=0")
    loader = ClipLoader(open_dataset(recipe.data).samples("train"), recipe.data, 8, True, recipe.seed)
    bad = Path(list(loader.batches(0))[-1].names[3])
    bad.write_bytes(bad.read_bytes()[:1500])
    with pytest.raises(VideoError, match=rf"^{bad}: ") as caught:
        fit(recipe)
    assert [line["step"] for line in lines(out, "step")] == [1, 2]

    line = re.search("add the line (.*) to (.*), below the header (.*), and go on", str(caught.value))
    assert line is not None
    assert line[2] == str(root / "skip.csv")
    (root / "skip.csv").write_text(f"{line[3]}\n{line[1]}\n")
    shutil.copytree(out, tmp_path / "again")
    capsys.readouterr()
    assert fit(recipe, resume=True).step == 6
    told = "23 of the 24 training videos that this training began with are left"
    assert told in capsys.readouterr().err.replace("\n", " ")
    assert told in lines(out, "start")[-1]["note"]
    assert [line["step"] for line in lines(out, "step")] == [1, 2, 3, 4, 5, 6]

    # Cut off once more, it still gives the same bits.
    again = replace(recipe, out=str(tmp_path / "again"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "step", stop_at(4))
        with pytest.raises(KeyboardInterrupt):
            fit(again, resume=True)
    fit(again, resume=True)
    assert equal(weights(out), weights(tmp_path / "again"))

    (root / "skip.csv").unlink()
    with pytest.raises(ValueError, match=r"is of another training: it has {'videos'.* may get lost, but not be added"):
        fit(recipe, resume=True)


def test_validation_needs_labels(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.val\) have no labels; set data\.val=null"):
        Validation(settings(data, tmp_path), [Sample(data / "val" / "val_00000.mp4", {})], make_accelerator())


def stop_at(number: int) -> Any:
    """A `Log.step` that ends the training before the checkpoint of a step."""

    def step(log: Log, progress: Progress, step: Step) -> None:
        if progress.step == number:
            raise KeyboardInterrupt

    return step
