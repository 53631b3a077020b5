"""Folders and files whose names are no UTF-8: every command reads them, and what it writes can be read."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import yaml
from evaluation_cases import small_cast, write_dataset
from video_files import write_video

from cast.cli import main
from cast.evaluation.inference import sample_names
from cast.evaluation.predictions import read_predictions
from cast.ground.files import printable
from cast.video.annotations import Sample


def odd(parent: Path, name: bytes) -> Path:
    return Path(os.fsdecode(os.path.join(os.fsencode(parent), name)))


def test_only_what_is_no_utf8_is_escaped() -> None:
    assert printable(os.fsdecode("für/日本 \U0001f600\\x41.mp4".encode())) == "für/日本 \U0001f600\\x41.mp4"
    assert printable(os.fsdecode(b"caf\xe9\xff.mp4")) == r"caf\xe9\xff.mp4"
    assert printable(Path("a")) == "a"


def test_samples_of_such_names_have_names(tmp_path: Path) -> None:
    samples = [Sample(odd(tmp_path, name), {}) for name in (b"\xe9/a.mp4", b"\xe8/a.mp4")]
    assert sample_names(samples) == [r"\xe9/a.mp4", r"\xe8/a.mp4"]


def test_the_data_check_writes_and_prints_them(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    root = odd(tmp_path, b"d\xe9")
    root.mkdir()
    write_video(root / "big.mp4", count=16, size=(482, 490))
    (root / "train.csv").write_text("big.mp4 0\ngone.mp4 1\n")
    assert main(["data", "check", str(root), "--workers", "1"]) == 1
    out = capfdbinary.readouterr().out.decode()
    assert r"d\xe9/train.csv:2: missing: gone.mp4" in out
    assert r"d\xe9/big.mp4): " in out
    (row,) = csv.DictReader((root / "skip.csv").read_text(encoding="utf-8").splitlines())
    assert row["path"] == "gone.mp4"
    assert row["where"].endswith(r"d\xe9/train.csv:2")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_an_evaluation_is_written_and_goes_on(tmp_path: Path, format: str) -> None:
    pytest.importorskip("matplotlib")
    if format == "parquet":
        pytest.importorskip("pyarrow")
    root, out, model = odd(tmp_path, b"d\xe9"), tmp_path / "out", tmp_path / "model"
    write_dataset(root, 2)
    small_cast().save_pretrained(model)
    arguments = ["evaluate", str(model), str(root), "--out", str(out), "--workers", "0", "--format", format]
    assert main(arguments) == 0
    about = read_predictions(out / f"predictions.{format}").about
    assert about["dataset"].endswith(r"d\xe9")
    assert r"d\xe9, val" in (out / "report.html").read_text(encoding="utf-8")
    assert main(arguments) == 0  # as the file says that it is the same evaluation


def test_a_pre_training_reads_and_writes_them(tmp_path: Path) -> None:
    root, out = odd(tmp_path, b"d\xe9"), tmp_path / "out"
    root.mkdir()
    for number in range(4):
        write_video(odd(root, b"caf\xe9%d.MTS" % number).with_suffix(".mp4"), count=12, size=(40, 40))
    recipe = {
        "data": {"root": str(root), "train": None, "val": None, "size": 32, "frames": 6, "workers": 0},
        "model": {
            "image_size": 32, "patch_size": 8, "num_frames": 6, "embed_dim": 16, "depth": 1, "num_heads": 2
        },
        "decoder": {"depth": 1},
        "optim": {"epochs": 1, "total_batch": 2, "micro_batch": 2, "warmup_epochs": 0},
        "run": {"precision": "fp32"},
        "pictures": 0,
    }  # fmt: skip
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert main(["pretrain", str(file), f"out={out}"]) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "4 of 4 videos below it are taken" in lines[0]["note"]
    assert yaml.safe_load((out / "settings.yaml").read_text(encoding="utf-8"))["data"]["root"] == str(root)
    assert main(["pretrain", str(file), f"out={out}", "--resume"]) == 0
