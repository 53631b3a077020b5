"""The command line as a person meets it: help, version, answers, and one clear line when something is wrong."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cast_models import randomise
from video_files import write_audio, write_video

import cast
import cast.demo
from cast.cli import COMMANDS, main, pretrain, train
from cast.ground import optional
from cast.ground.optional import MissingExtraError, require
from cast.video.workers import WorkerError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    randomise(cast.CAST("tiny", heads={"verb": 3, "noun": 4}, depth=1)).save_pretrained(folder)
    (folder / "labels.json").write_text(
        json.dumps({"verb": ["open", "close", "cut"], "noun": ["door", "tap", "onion", "drawer"]})
    )
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", count=40)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What goes to stderr when the command fails with exit code 1 and prints nothing else."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_predict_prints_a_table(checkpoint: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(video), "--checkpoint", str(checkpoint), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "clip.mp4: 40 frames, 6 views, uniform sampling"
    assert all(word in lines[2] for word in ("verb", "noun", "action", "%"))
    assert len([line for line in lines if "│" in line]) == 2
    assert max(map(len, lines)) <= 80


def test_predict_prints_json(checkpoint: Path, video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(video), "--checkpoint", str(checkpoint), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [len(answer["guesses"][head]) for head in ("verb", "noun", "action")] == [3, 4, 5]


def test_a_bad_video_is_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    whole = write_video(tmp_path / "whole.mp4").read_bytes()
    truncated = tmp_path / "truncated.mp4"
    truncated.write_bytes(whole[: len(whole) // 2])
    cases = {
        tmp_path / "missing.mp4": "no such file",
        empty: "is empty (0 bytes)",
        truncated: "is truncated or damaged",
        write_audio(tmp_path / "song.m4a"): "holds no video, only audio",
    }
    for path, reason in cases.items():
        line = refused(capsys, "predict", path, "--checkpoint", checkpoint)
        assert line.startswith(f"cast predict: error: {path}: {reason}")


def test_a_bad_checkpoint_is_one_line(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such checkpoint" in refused(capsys, "predict", video, "--checkpoint", tmp_path / "none")
    assert "config.json" in refused(capsys, "predict", video, "--checkpoint", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "x.mp4"], "required: predict.checkpoint"),
        (["predict", "x.mp4", "--checkpoint", "c", "--top", "many"], "Got value: many"),
        (["predict", "x.mp4", "--checkpoint", "c", "--sampling", "sparse"], "'uniform', 'dense'"),
        (["predikt"], "invalid choice: 'predikt'"),
        ([], "to be one of {demo,data,"),
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_every_command_has_help_for_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert command.__name__ in overview
        if command in (train, pretrain):  # with parsers of their own, see tests/test_training_recipes.py
            continue
        with pytest.raises(SystemExit):
            main([command.__name__, "--help"])
        text = capsys.readouterr().out
        assert "None" not in text
        assert "<class" not in text
        assert text.count("(default:") == sum(
            value is not False and value is not None for value in command.__defaults__ or ()
        )
        assert "null" not in text


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["evaluate", "a", "b", "--sampling", "fast"], "'uniform', 'dense'"),
        (["evaluate", "a", "b", "--dtype", "half"], "'float32', 'bfloat16', 'float16'"),
        (["predict", "a", "--checkpoint", "b", "--sampling", "fast"], "'uniform', 'dense'"),
        (["export", "a", "--format", "tflite"], "'torch', 'onnx', 'torch-cuda'"),
    ],
)
def test_a_word_that_is_no_choice_is_answered_with_those_there_are(
    words: list[str], allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"(choose from {allowed})" in error
    assert "typing" not in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("cast ")


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys; from cast.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_a_failing_command_exits_with_1_and_no_traceback() -> None:
    command = [sys.executable, "-m", "cast.cli", "predict", "missing.mp4", "--checkpoint", "c"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "cast predict: error: missing.mp4: no such file\n"


def test_demo_gets_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(cast.demo, "main", lambda **options: calls.append(options), raising=False)
    assert main(["demo", "--out", str(tmp_path), "--seeds", "3"]) == 0
    assert main(["demo", "--quick"]) == 0
    assert calls == [{"out": tmp_path, "seeds": 3, "quick": False}, {"out": None, "seeds": 1, "quick": True}]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cast.demo, "main", lambda **options: require("not_a_package.inside", "demo"), raising=False)
    line = refused(capsys, "demo")
    assert "the package 'not_a_package' is not installed; run: pip install 'cast-kernels[demo]'" in line


def test_require_tells_missing_from_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require("json", "demo") is json
    with pytest.raises(MissingExtraError):
        require("not_a_package", "demo")

    def broken(name: str) -> None:
        raise ModuleNotFoundError("No module named 'inner'", name="inner")

    monkeypatch.setattr(optional.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError) as caught:
        require("outer", "demo")
    assert not isinstance(caught.value, MissingExtraError)


def test_an_interrupt_is_not_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cast.demo, "main", interrupt, raising=False)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "cast demo: interrupted\n"


@pytest.mark.parametrize(
    ("name", "words", "advice"),
    [
        ("cast.training.command.main", ["train", "ek100"], "lower optim.micro_batch (the steps stay"),
        ("cast.pretrain.command.main", ["pretrain", "own-data"], "lower optim.micro_batch"),
        ("cast.evaluation.run.main", ["evaluate", "a", "b"], "lower --batch_size"),
        ("cast.predict.main", ["predict", "a", "--checkpoint", "b"], "lower --batch"),
    ],
)
def test_a_full_device_and_dead_workers_are_one_line(
    name: str, words: list[str], advice: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> str:
        def main_(*arguments: object) -> None:
            raise error

        monkeypatch.setattr(name, main_)
        return refused(capsys, *words)

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\na lot of statistics. ")
    assert f"cast {words[0]}: error: CUDA out of memory. Tried to allocate 2.00 GiB; {advice}" in fail(full)
    assert fail(WorkerError("3 workers died")) == f"cast {words[0]}: error: 3 workers died\n"
    with pytest.raises(RuntimeError, match="a fault of ours"):
        fail(RuntimeError("a fault of ours"))


def test_a_full_disk_comes_with_a_cure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cast.video.check.main", full)
    assert main(["data", "check", "anywhere"]) == 1
    assert "No space left on device; free space where the command writes, or" in capsys.readouterr().err
