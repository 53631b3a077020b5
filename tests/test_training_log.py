"""What a training tells: bars, and a log of valid JSON that goes on where it was cut off."""

from __future__ import annotations

import io
import json
import math
import resource
from pathlib import Path

import pytest
from rich.console import Console

from cast.training import Progress, Step
from cast.training.distributed import make_accelerator
from cast.training.log import JsonLines, Log


def test_bars_show_speed_memory_and_time_left(tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    log = Log(tmp_path, make_accelerator(), 10, {"seed": 0}, console=console)
    log.start(Progress(step=2), "hello")
    for number in (3, 4):
        log.step(Progress(step=number), Step({"loss": 1.25, "verb": 50.0}, 1e-3, 0.5, 8, 0.5, False))
    log.end("bye")
    text = screen.getvalue()
    assert all(
        word in text for word in ("hello", "4/10", "loss 1.250", "verb 50.0%", "16.0 clips/s", "GB", "0:00:", "bye")
    )


def test_a_log_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"kind": "step", "step": {step}}}\n' for step in range(3)) + '{"kind": "st')
    JsonLines(path, 1, 0).write("step", step=2, loss=0.5)
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()] == [0, 1, 2]
    JsonLines(path, 0, 0)
    assert path.read_text() == ""


def test_a_log_that_finds_no_room_says_so(tmp_path: Path) -> None:
    """The system refuses to write more than 100 bytes into a file, as a full disk does."""
    log = JsonLines(tmp_path / "log.jsonl", 0, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*log\.jsonl: .*make room, then start again with --resume"):
            log.write("step", note="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_infinite_gradient_is_null_in_the_log(tmp_path: Path) -> None:
    """As a step has it that fp16 skipped; "Infinity" is no JSON."""
    log = Log(tmp_path, make_accelerator(), 1, {"clip_grad": math.inf}, bars=False, console=Console(quiet=True))
    log.start(Progress(), "")
    log.step(Progress(step=1), Step({"loss": math.nan}, 0.1, math.inf, clips=8, seconds=1.0, skipped=True))
    start, step = (
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        for line in (tmp_path / "log.jsonl").read_text().splitlines()
    )
    assert start["settings"] == {"clip_grad": None}
    assert (step["grad_norm"], step["loss"], step["skipped"]) == (None, None, True)
