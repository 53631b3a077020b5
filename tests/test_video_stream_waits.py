"""A camera that accepts and never answers, or stops midway: an error in time, and Ctrl-C at any time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cast_models import randomise
from video_files import numbers, write_video

import cast
from cast.video import stream
from cast.video.files import VideoError
from cast.video.stream import frames

#: Seconds after which a test is lost, where nothing but an interrupt may end the wait.
LONG = 120.0


@contextmanager
def camera(answer: bytes = b"", accepted: Callable[[], None] = lambda: None) -> Iterator[int]:
    """A server on a port that says `answer` to whoever calls, and then nothing more, but holds the line."""
    calls: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    call, _ = server.accept()
                    calls.append(call)
                    call.sendall(answer)
                except OSError:  # the test is over
                    return
                accepted()

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            for call in calls:
                call.close()
            server.shutdown(socket.SHUT_RDWR)  # or accept would wait on


@pytest.mark.parametrize("kind", ["tcp", "http", "rtsp", "rtmp"])
def test_a_camera_that_never_answers_is_an_error_in_time(kind: str) -> None:
    with camera() as port, pytest.raises(VideoError) as caught:
        next(frames(f"{kind}://127.0.0.1:{port}/live", timeout=(0.3, LONG)))
    assert str(caught.value).startswith(f"{kind}://127.0.0.1:{port}/live: did not answer within 0.3 seconds; ")
    assert "--timeout" in str(caught.value)


@pytest.mark.parametrize("kind", ["tcp", "http"])
def test_a_camera_that_stops_midway_is_an_error_in_time(kind: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.ts", count=120, b_frames=0).read_bytes()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: video/mp2t\r\n\r\n" if kind == "http" else b""
    seen = []
    with camera(head + video[: len(video) * 3 // 4]) as port:
        # Probing would wait for more than there is.
        pictures = frames(f"{kind}://127.0.0.1:{port}/live", "mpegts", (LONG, 1.0), probesize="5000")
        with pytest.raises(VideoError, match="gave no picture for 1 seconds"):
            seen.extend(numbers(picture[None])[0] for picture in pictures)
    assert seen == list(range(len(seen)))


def test_a_pipe_that_stays_empty_is_an_error_in_time() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        with pytest.raises(VideoError, match=r"^the pipe: did not answer within 0\.3 seconds"):
            next(frames(pipe, timeout=(0.3, LONG)))
        os.close(writer)


def test_a_slow_caller_is_no_silent_camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit counts the time that is waited for a picture, not the time that a model takes for one."""
    video = write_video(tmp_path / "v.mkv", count=12, b_frames=0)
    limits: list[float] = []
    wait = stream._Thread.next

    def told(self: stream._Thread, seconds: float, late: Callable[[], Exception]) -> object:
        limits.append(seconds)
        return wait(self, seconds, late)

    monkeypatch.setattr(stream._Thread, "next", told)
    with video.open("rb") as file:
        pictures = frames(file, timeout=(LONG, LONG / 2))
        assert [numbers(picture[None])[0] for picture in pictures] == list(range(12))
    assert limits == [LONG] + 13 * [LONG / 2]
    limits.clear()
    assert len(list(frames(video, timeout=1e-9))) == 12  # a file on the disk has no limit
    assert set(limits) == {0.0}


def test_a_stream_that_is_left_ends_its_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    pictures = frames(write_video(tmp_path / "v.mkv", count=60))
    next(pictures)
    (thread,) = set(threading.enumerate()) - before
    pictures.close()
    thread.join(LONG)
    assert not thread.is_alive()


@pytest.mark.parametrize("timeout", [-1.0, (1.0, -0.1), float("nan")])
def test_a_limit_below_zero_is_refused(timeout: float | tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="or 0 to wait without an end"):
        next(frames("rtsp://nowhere", timeout=timeout))


@pytest.mark.parametrize("kind", ["tcp", "http", "rtsp", "pipe"])
def test_a_wait_without_an_end_can_be_interrupted(kind: str) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    if kind == "pipe":
        reader, writer = os.pipe()
        threading.Timer(0.5, interrupt).start()
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            with pytest.raises(KeyboardInterrupt):
                next(frames(pipe, timeout=0))
            os.close(writer)
        return
    with camera(accepted=interrupt) as port, pytest.raises(KeyboardInterrupt):
        next(frames(f"{kind}://127.0.0.1:{port}/live", timeout=0))


@pytest.mark.parametrize("kind", ["rtsp", "pipe"])
def test_ctrl_c_ends_the_command(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    randomise(cast.CAST("tiny", heads={"action": 3}, depth=1)).save_pretrained(tmp_path)
    called = threading.Event()
    # The program that a user calls. `python -m` ends by the signal instead, where Ctrl-C falls into code that `exec`
    # runs from text, such as the making of a dataclass while a module is imported.
    program = str(Path(sysconfig.get_path("scripts"), "cast"))
    command = [program, "predict", "--checkpoint", str(tmp_path), "--timeout", "0"]
    with camera(accepted=called.set) as port:
        source = f"rtsp://127.0.0.1:{port}/live" if kind == "rtsp" else "-"
        with subprocess.Popen(
            [*command, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                if kind == "rtsp":
                    assert called.wait(LONG)
                else:
                    assert process.stderr is not None
                    # Once the line about the sampling is there the model is loaded; another library may warn before.
                    assert any("sampling is taken" in line for line in process.stderr)
                process.send_signal(signal.SIGINT)
                code = process.wait(LONG)
                assert process.stderr is not None
                said = process.stderr.read()
                assert code == 130, said
                assert said.endswith("cast predict: interrupted\n")
            finally:
                process.kill()
