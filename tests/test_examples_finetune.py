"""The example that fine-tunes on a folder of videos: the recipe's own training, opened up for changes."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_examples import example, refused
from video_files import write_video

import cast
from cast.training.command import fit
from cast.training.recipes import load_recipe
from cast.training.settings import TrainSettings
from cast.video.annotations import Sample

#: The recipe at the size of the model below, for seconds.
SMALL = (
    "data.size=16", "data.workers=0", "model.image_size=16", "model.patch_size=8", "model.embed_dim=16",
    "model.depth=1", "model.num_heads=2", "run.precision=fp32", "log.bars=false", "optim.total_batch=4",
    "optim.micro_batch=4", "optim.warmup_epochs=1", "optim.lr=1", "data.augment.mixup=0",
    "data.augment.randaugment=null",
)  # fmt: skip
SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def finetune() -> ModuleType:
    return example("finetune_own_videos")


def picture(bright: slice, number: int, height: int, width: int) -> np.ndarray:
    result = np.full((height, width, 3), 40, np.uint8)
    result[bright] = 220
    return result


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in where it is bright; one has fewer videos."""
    folder = tmp_path_factory.mktemp("my videos")
    for name, bright, count in (("above, at the top", slice(0, 24), 10), ("below", slice(24, 48), 6)):
        (folder / name).mkdir()
        for n in range(count):
            draw = lambda *size, bright=bright: picture(bright, *size)  # noqa: E731
            write_video(folder / name / f"{n}.mp4", 16 + n, draw=draw)
    (folder / "below" / "notes.txt").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CAST of other classes."""
    torch.manual_seed(0)
    model = cast.CAST(heads={"action": 5}, **SIZES)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.any():
            torch.nn.init.xavier_uniform_(parameter.detach().flatten(1))
    path = tmp_path_factory.mktemp("start") / "model"
    model.save_pretrained(path)
    return path


def test_a_folder_of_videos_becomes_a_model_that_names_them(
    finetune: ModuleType, videos: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(videos), "--cast", str(start), "--out", str(tmp_path), "--balance", "--train-norms"]
    finetune.main([*words, *SMALL, "optim.epochs=12"])
    said = "".join(capsys.readouterr())
    assert "13 videos train, 3 validate" in said
    assert "new heads, as the classes differ" in said
    for name in ("above, at the top/4.mp4", "above, at the top/9.mp4", "below/4.mp4"):
        label = name.split("/")[0]
        assert any(line.startswith(f"{name}: {label} (") for line in said.splitlines()), said
    before, after = (load_file(path / "model.safetensors") for path in (start, tmp_path / "model"))
    changed = {
        name for name in before if before[name].shape == after[name].shape and (before[name] != after[name]).any()
    }
    assert "blocks.0.norm1.weight" in changed  # --train-norms
    assert not changed & {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "clip_conv1.weight"}


def test_unchanged_it_trains_to_the_bits_of_the_command(
    finetune: ModuleType, videos: Path, start: Path, tmp_path: Path
) -> None:
    finetune.list_videos(videos, tmp_path)
    settings = load_recipe(TrainSettings, "own-data", *SMALL, "optim.epochs=2", f"experts.cast={start}")
    lists = {split: str(tmp_path / f"{split}.csv") for split in ("train", "val")}
    settings = replace(settings, data=replace(settings.data, root=str(videos), **lists))
    ours, theirs = (replace(settings, out=str(tmp_path / name)) for name in ("ours", "theirs"))
    finetune.finetune(ours)
    fit(theirs)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("ours", "theirs")]
    ends = [[line["val action"] for line in log if line["kind"] == "epoch"] for log in logs]
    assert ends[0] == ends[1] != []


def test_a_word_and_its_option_say_the_same(finetune: ModuleType) -> None:
    nothing: dict[str, str | None] = dict.fromkeys(finetune.OPTIONS)
    read = finetune.read_settings
    assert read(["experts.cast=a", "out=b"], nothing) == read([], nothing | {"--cast": "a", "--out": "b"})
    experts = ["experts.clip=a.pt", "experts.videomae=b.pth"]
    assert read(experts, nothing) == read(experts[1:], nothing | {"--clip": "a.pt"})
    settings = read(experts, nothing)
    assert (settings.experts.clip, settings.experts.videomae, settings.out) == ("a.pt", "b.pth", "runs/own-videos")
    assert read(["experts.train=true"], nothing).experts.train  # experts that train may start from nothing


def test_every_fifth_video_of_a_class_validates(finetune: ModuleType, videos: Path, tmp_path: Path) -> None:
    finetune.list_videos(videos, tmp_path)
    with open(tmp_path / "val.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [
            "above, at the top/4.mp4",
            "above, at the top/9.mp4",
            "below/4.mp4",
        ]
    with open(tmp_path / "train.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 13


def test_balance_lets_a_rare_class_weigh_as_much(finetune: ModuleType) -> None:
    samples = [Sample(Path("v.mp4"), {"action": label}, 1) for label in (0, 0, 0, 1)]
    criterion = finetune.Balanced(samples, {"action": 2}, smoothing=0.0)
    assert criterion.weights["action"].tolist() == pytest.approx([4 / 6, 2])
    logits = torch.tensor([[2.0, 0], [0, 1], [1, 0], [0, 3]])
    labels = torch.tensor([0, 0, 0, 1])
    loss, figures = criterion({"action": logits}, {"action": labels})
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss, (each[:3].mean() + each[3]) / 2)
    assert figures["action"] == 75
    soft, _ = criterion({"action": logits}, {"action": torch.eye(2)[labels]})
    assert torch.isfinite(soft)


def test_what_makes_no_data_set_is_refused(
    finetune: ModuleType, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no folder" in refused(finetune.main, [str(tmp_path / "none")], capsys)
    out = ["--out", str(tmp_path / "out")]
    cases = [
        ([str(videos / "below"), *out, "--cast", "a"], "has 0 subfolders; there must be one for each class"),
        ([str(videos), *out, "optim.lrr=3"], "did you mean optim.lr?"),
        ([str(videos), *out], "name a whole CAST with --cast, or the files of both experts with --clip and --videomae"),
        ([str(videos), "--clip", "a.pt", *out], "with --clip and --videomae"),
        ([str(videos), *out, "--cast", "a", "experts.cast=b"], "--cast and experts.cast are the same setting"),
        ([str(videos), *out, "--cast", "a", "out=b"], "--out and out are the same setting: give one of them"),
        ([str(videos), *out, "--cast", "a", "experts.clip=b"], "leave out experts.clip"),
        ([str(videos), "--cast", "a", "data.root=b"], "data.root can't be given: the folder VIDEOS is the root"),
    ]
    for words, message in cases:
        with pytest.raises(SystemExit) as stopped:
            finetune.main(words)
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err
