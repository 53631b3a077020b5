"""The example of an HTTP service: a real server on this machine's loopback address, and clients that misbehave."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cast_models import randomise
from test_examples import EXAMPLES, refused
from video_files import write_video

import cast

ANSWER_KEYS = {"came", "allowed", "do"}


@pytest.fixture(scope="module")
def serve() -> Iterator[ModuleType]:
    """Under the name that the processes which decode import it by."""
    sys.path.insert(0, str(EXAMPLES))
    import serve

    yield serve
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("videos")
    good, other = (write_video(folder / f"{count}.mp4", count).read_bytes() for count in (20, 40))
    return {"good": good, "other": other, "cut": good[: len(good) // 2], "text": b"no video at all, " * 90}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = randomise(cast.CAST("tiny", heads={"verb": 3, "noun": 4}, depth=1))
    model.labels = {"verb": ["open", "close", "cut"], "noun": ["door", "tap", "onion", "drawer"]}  # type: ignore[assignment]
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


@contextmanager
def serving(serve: ModuleType, checkpoint: Path, **limits: Any) -> Iterator[Server]:
    """A server of its own in a thread, until it has shut down."""
    import uvicorn

    predictor = cast.Predictor(checkpoint, top=3)
    app = serve.create_app(predictor, replace(serve.Limits(), **limits))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield Server(server.servers[0].sockets[0].getsockname()[1], predictor)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


class Server:
    def __init__(self, port: int, predictor: cast.Predictor) -> None:
        self.port, self.predictor = port, predictor

    def ask(
        self, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}, method: str = ""
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method or ("GET" if body is None else "POST"), path, body, dict(headers))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        assert b"Traceback" not in content
        return response.status, json.loads(content), response.headers

    def refusal(self, status: int, *words: Any, **options: Any) -> dict[str, str]:
        """What an error's JSON says."""
        got, answer, _ = self.ask(*words, **options)
        assert (got, set(answer), set(answer["error"])) == (status, {"error"}, ANSWER_KEYS)
        return answer["error"]

    def together(self, *bodies: bytes) -> list[tuple[int, Any]]:
        with ThreadPoolExecutor(len(bodies)) as pool:
            return [answer[:2] for answer in pool.map(lambda body: self.ask("/predict", body), bodies)]


@pytest.fixture(scope="module")
def server(serve: ModuleType, checkpoint: Path) -> Iterator[Server]:
    with serving(serve, checkpoint, megabytes=0.2, frames=50, waiting=3) as running:
        yield running


def test_an_answer_is_the_predictor_s(server: Server, files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(files["good"])
    status, answer, _ = server.ask("/predict?top=2", files["good"])
    assert (status, answer["frames"], answer["views"]) == (200, 20, 6)
    expected = server.predictor(tmp_path / "clip.mp4").guesses
    assert list(answer["guesses"]) == ["verb", "noun", "action"]
    for head, guesses in answer["guesses"].items():
        assert len(guesses) == 2
        assert [(g["label"], pytest.approx(g["probability"])) for g in guesses] == [
            (g.label, g.probability) for g in expected[head][:2]
        ]


def test_requests_that_come_together_share_a_forward_pass(
    serve: ModuleType, checkpoint: Path, files: dict[str, bytes]
) -> None:
    """And a bad one among them fails alone."""
    with serving(serve, checkpoint, wait_ms=3000, batch=4) as server:
        passes: list[int] = []
        server.predictor.model.register_forward_pre_hook(lambda module, given: passes.append(len(given[0])))
        answers = server.together(files["good"], files["text"], files["other"], files["cut"])
        assert [status for status, _ in answers] == [200, 422, 200, 422]
        assert [answers[n][1]["frames"] for n in (0, 2)] == [20, 40]
        assert answers[0][1]["guesses"] != answers[2][1]["guesses"]
        assert passes == [12]  # clips: two videos of six views
        _, health, _ = server.ask("/health")
        assert (health["passes"], health["videos"], health["largest_batch"]) == (1, 2, 2)


def test_bad_requests_get_an_error_that_helps(server: Server, files: dict[str, bytes]) -> None:
    text = server.refusal(422, "/predict", files["text"])
    assert text["came"].startswith("a file that is not a video that FFmpeg can read")
    assert "50 frames" in text["allowed"]
    assert "is truncated" in server.refusal(422, "/predict", files["cut"])["came"]
    assert "an empty body" in server.refusal(422, "/predict", b"")["came"]
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert "curl --data-binary" in server.refusal(415, "/predict", files["good"], form)["do"]
    assert server.refusal(422, "/predict?top=0", files["good"])["allowed"] == "top from 1 to 3"
    assert server.refusal(404, "/nothing")["came"] == "GET /nothing"
    assert "POST /predict" in server.refusal(405, "/predict")["allowed"]
    assert server.ask("/health")[1]["status"] == "ok"


def test_what_is_too_large_is_cut_off(server: Server, files: dict[str, bytes], tmp_path: Path) -> None:
    said = server.refusal(413, "/predict", b"\0" * 200_001)
    assert (said["came"], said["allowed"]) == ("200,001 bytes, and perhaps more", "0.2 MB")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/predict", iter([b"\0" * 150_000] * 2), encode_chunked=True)  # its length is not said
    assert connection.getresponse().status == 413
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Length", "10000000000")
    connection.endheaders()  # and no byte of its body
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["came"][:14]) == (413, "10,000,000,000")
    connection.close()
    long = write_video(tmp_path / "long.mp4", 51).read_bytes()
    assert server.refusal(422, "/predict", long)["came"] == "a file that has 51 frames"


def test_a_full_service_says_when_to_come_back(server: Server, files: dict[str, bytes]) -> None:
    """Three clients have begun to send and hold the places; the fourth is sent away at once."""
    held = []
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Length", str(len(files["good"])))
        connection.endheaders(files["good"][:100])
        held.append(connection)
    while server.ask("/health")[1]["inside"] < 3:
        time.sleep(0.02)
    status, answer, headers = server.ask("/predict", files["good"])
    assert (status, answer["error"]["allowed"]) == (503, "3 at a time")
    assert int(headers["Retry-After"]) >= 1
    for connection in held:
        connection.close()
    while server.ask("/health")[1]["inside"]:
        time.sleep(0.02)
    assert server.ask("/predict", files["good"])[0] == 200


def test_what_is_too_slow_is_ended(serve: ModuleType, checkpoint: Path, files: dict[str, bytes]) -> None:
    with serving(serve, checkpoint, decode_seconds=0.001) as server:
        error = server.refusal(422, "/predict", files["good"])
        assert error["came"] == "a video that was not decoded within 0.001 seconds"
    with serving(serve, checkpoint, seconds=1.0, wait_ms=60_000) as server:
        before = time.monotonic()
        error = server.refusal(504, "/predict", files["good"])
        assert "not answered within 1 seconds" in error["came"]
        assert time.monotonic() - before < 20
        assert server.ask("/health")[1]["inside"] == 0


def test_a_video_that_ends_its_process_or_takes_its_memory_fails_alone(
    serve: ModuleType, server: Server, tmp_path: Path, files: dict[str, bytes]
) -> None:
    (tmp_path / "clip.mp4").write_bytes(files["good"])
    protocol = server.predictor.protocol
    with pytest.raises(serve.Refusal, match="ended the process"):
        serve.decode_elsewhere(tmp_path / "clip.mp4", DeadlyProtocol(), serve.Limits())
    large = write_video(tmp_path / "large.mp4", 20, size=(480, 640))
    with pytest.raises(serve.Refusal, match="memory"):
        serve.decode_elsewhere(
            large, protocol, serve.Limits(memory=0.02)
        )  # its frames alone are 18 MB, their crops more
    assert serve.decode_elsewhere(large, protocol, serve.Limits()).frames == 20


class DeadlyProtocol:
    """Ends the process that looks at it, as a fault in a decoder would."""

    @property
    def decoder(self) -> str:
        os.kill(os.getpid(), signal.SIGSEGV)
        return "pyav"


def test_a_failure_nobody_foresaw_is_logged_and_not_shown(
    server: Server, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(videos: Any) -> None:
        raise RuntimeError("out of memory at 0x1234")

    with monkeypatch.context() as patch:
        patch.setattr(server.predictor, "answer", fail)
        error = server.refusal(500, "/predict", files["good"])
    assert "0x1234" not in str(error)
    assert server.ask("/predict", files["good"])[0] == 200


def test_the_command_serves_and_shuts_down(checkpoint: Path, files: dict[str, bytes], tmp_path: Path) -> None:
    """A request that is inside at SIGTERM is answered first, and no file stays behind."""
    words = [sys.executable, str(EXAMPLES / "serve.py"), str(checkpoint), "--port", "0", "--wait-ms", "1500"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(EXAMPLES.parent)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"running on http://127\.0\.0\.1:(\d+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        server = Server(int(found[1]), None)  # type: ignore[arg-type]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.ask, "/predict", files["good"])
            while not server.ask("/health")[1]["inside"]:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert answer.result()[0] == 200
        said += process.stderr.read()
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert "Application shutdown complete" in said
    assert "Traceback" not in said
    assert list(tmp_path.glob("cast-serve-*")) == []


def test_the_command_refuses_bad_arguments(
    serve: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such checkpoint" in refused(serve.main, [str(tmp_path / "none")], capsys)
    assert "batch is 0; it must be above 0" in refused(serve.main, [str(checkpoint), "--batch", "0"], capsys)
    for port in ("99999", "-1"):
        assert f"--port is {port}; a port is from 1 to 65535" in refused(
            serve.main, [str(checkpoint), f"--port={port}"], capsys
        )
    assert "invalid float value: 'many'" in refused(serve.main, [str(checkpoint), "--megabytes", "many"], capsys)
