"""What `cast evaluate` takes for a model: published names, the authors' files, DeepSpeed's directories, the Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_cases import CLASSES, COUNTS, small_cast, write_dataset
from training_cases import same
from video_files import write_video

from cast.cli import main
from cast.evaluation.run import find_log
from cast.export import _FORMATS
from cast.loading import load_checkpoint
from cast.model import hub
from cast.model.config import VARIANTS
from cast.model.zoo import MODELS, PublishedModel, load

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

NAME = "cast_small_test"


class Stranger:
    """A class that a pickle names, as DeepSpeed's own do."""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The authors' checkpoint of a small model, as they write it, where a published name is looked for."""
    model = small_cast(num_heads=2, embed_dim=128)
    monkeypatch.setitem(VARIANTS, "small-test", model.config.to_dict())
    monkeypatch.setitem(
        MODELS, NAME, PublishedModel("the tests", COUNTS, 1.0, "https://example.org", "small-test", sampling="dense")
    )
    folder = tmp_path / "zoo"
    folder.mkdir()
    monkeypatch.setenv("CAST_MODELS", str(folder))
    torch.save({"module": model.state_dict()}, folder / f"{NAME}.pth")
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_published_name_is_tested_with_its_protocol(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cheapest reproduction: the authors' weights on a data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')  # of somebody's training
    root = write_dataset(tmp_path / "data", 1)
    out = tmp_path / "out"
    assert main(["evaluate", NAME, str(root), "--out", str(out), "--workers", "0", "--batch_size", "15"]) == 0
    assert "5x3 views, dense sampling: as the model was trained" in capsys.readouterr().out
    about = json.loads((out / "metrics.json").read_text())["about"]
    assert (about["checkpoint"], about["sha256"]) == (NAME, sha256(zoo / f"{NAME}.pth"))
    assert find_log(NAME) is None


def test_deepspeeds_directory_and_a_repository_are_read(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_checkpoint(NAME).model
    folder = tmp_path / "checkpoint-49"
    folder.mkdir()
    file = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": model.state_dict(), "global_steps": 8750}, file)
    for found in (load_checkpoint(folder).model, load(folder)):
        assert same(found, model)
    assert load_checkpoint(folder).sha256 == sha256(file)

    remote = tmp_path / "remote"
    kept = small_cast()
    kept.labels, kept.sampling = CLASSES, "dense"
    kept.save_pretrained(remote)
    asked: list[str] = []

    def download(repository: str, **options: Any) -> str:
        asked.append(repository)
        assert "sampling.json" in options["allow_patterns"]
        return str(remote)

    monkeypatch.setattr(hub, "snapshot_download", download)
    loaded = load_checkpoint("me/kitchen")
    assert (loaded.classes, loaded.sampling) == (CLASSES, "dense")
    assert loaded.sha256 == sha256(remote / "model.safetensors")
    assert set(asked) == {"me/kitchen"}


def test_what_is_nowhere_is_refused_with_what_there_is(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint; .*a published name .*cast_base_k400"):
        load_checkpoint(tmp_path / "none")
    (zoo / f"{NAME}.pth").unlink()
    with pytest.raises(FileNotFoundError, match="Download the checkpoint of the tests"):
        load_checkpoint(NAME)


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_a_pickle_needs_trust(
    command: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "theirs.pth"
    torch.save({"module": small_cast(num_heads=2, embed_dim=128, depth=1).state_dict(), "args": Stranger()}, file)
    monkeypatch.chdir(tmp_path)
    if command == "predict":
        words = [str(write_video(tmp_path / "clip.mp4", count=20)), "--checkpoint", str(file), "--batch", "6"]
    elif command == "evaluate":
        words = [str(file), str(write_dataset(tmp_path / "data", 1)), "--views", "1", "--workers", "0"]
    else:
        words = [str(file)]
        # Enough has been seen when the model is loaded; what an export costs is paid in tests/test_export.py.
        monkeypatch.setattr("cast.export.parity", lambda program, other: 0.0)
        monkeypatch.setattr("torch.export.export", lambda *arguments, **options: None)
        monkeypatch.setitem(
            _FORMATS, "torch", (lambda traced, path, *rest: path.write_text("program"), lambda *_: None)
        )
    assert main([command, *words]) == 1
    assert "in a command --trust_pickle" in capsys.readouterr().err
    assert main([command, *words, "--trust_pickle"]) == 0
