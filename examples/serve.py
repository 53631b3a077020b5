"""A small HTTP service: send a video, get its most probable classes as JSON.

    pip install -e '.[examples]'
    python examples/serve.py runs/demo-quick/seed-0/cast --port 8000  # what `cast demo --quick` leaves
    curl --data-binary @clip.mp4 'http://127.0.0.1:8000/predict?top=5'
    curl http://127.0.0.1:8000/health

Why FastAPI and uvicorn: they pass on the request's body as it arrives, so that an upload is stopped at its limit
instead of read first; the rest is plain asyncio. LitServe would add batches, which are the forty lines of `Batches`
here. For the same reason the video is the request's body and not a form.

The way of a request: it takes one of `--waiting` places, or gets 503 with Retry-After. Its body goes into a file, up to
`--megabytes`. A separate process decodes the file within `--decode-seconds` and `--memory`, and is killed otherwise.
The clips of all requests that arrive within `--wait-ms` go through the model together. Only decoded clips get that far,
so a bad video fails only its own request. After `--seconds` in total the answer is 504. Every error is JSON that says
what came, what is allowed and what to do.

It listens only to this machine unless --host is given. Before making it public, put it behind a proxy that has TLS,
authenticates users and limits the time for sending headers.
"""

import argparse
import asyncio
import errno
import logging
import math
import resource
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cast import Predictor
from cast.predict import Decoded, Prediction, decode
from cast.video.decoders import decoder
from cast.video.files import VideoError
from cast.video.views import Protocol

log = logging.getLogger("uvicorn.error")
# Children are forked from a process that has imported their modules and runs no thread.
PROCESSES = get_context("forkserver")


@dataclass(frozen=True)
class Limits:
    """The limits of a request.

    Args:
        waiting: requests at a time, from their first byte to their answer
        megabytes: of an upload
        frames: of a video
        decode_seconds: for decoding a video
        memory: for decoding a video, in GB
        seconds: for a request in all
        decoders: videos that are decoded at a time
        batch: videos in a forward pass
        wait_ms: milliseconds that a video waits for others to share its forward pass
    """

    waiting: int = 32
    megabytes: float = 100.0
    frames: int = 20_000
    decode_seconds: float = 20.0
    memory: float = 2.0
    seconds: float = 60.0
    decoders: int = 2
    batch: int = 4
    wait_ms: float = 5.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0 or not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be above 0")


class Refusal(Exception):
    """An answer other than a prediction.

    Args:
        status: HTTP status.
        came: what the client sent, or what happened.
        allowed: the allowed request.
        do: advice.
        headers: of the answer.
    """

    def __init__(self, status: int, came: str, allowed: str, do: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(came)
        self.status, self.headers = status, headers
        self.body = {"error": {"came": came, "allowed": allowed, "do": do}}

    def answer(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


# ---- Decoding: each video in a separate process, which may crash, hang or run out of memory.


def decode_here(pipe: Connection, video: str, protocol: Protocol, limits: Limits) -> None:
    """In the child: decode the video and send the result through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which answers this request first
    torch.set_num_threads(1)
    now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + int(limits.memory * 1e9), before[1]))
    found: tuple[Any, int, str]
    try:
        frames = decoder(protocol.decoder).frame_count(video)
        if frames > limits.frames:
            found = None, 0, f"has {frames} frames"
        else:
            found = decode(video, protocol).clips.numpy(), frames, ""
    except VideoError as error:
        short = f"or {limits.memory:g} GB of memory are too little, of which FFmpeg may say the same"
        found = None, 0, f"{str(error).removeprefix(f'{video}: ')}; {short}"
        if getattr(error.__cause__, "errno", None) in (
            errno.ENOMEM,
            errno.EAGAIN,
        ):  # EAGAIN: no memory for another thread
            found = None, 0, f"takes more memory than {limits.memory:g} GB to decode"
    except (MemoryError, RuntimeError) as error:  # PyTorch's allocator raises the latter
        found = None, 0, f"takes more memory than {limits.memory:g} GB, or can't be cut into clips ({error})"
    resource.setrlimit(resource.RLIMIT_DATA, before)  # sending the result needs memory too
    pipe.send(found)


def decode_elsewhere(video: Path, protocol: Protocol, limits: Limits) -> Decoded:
    """A video's clips, from a process with limited time.

    Raises:
        Refusal: the video gave no clips.
    """
    ours, theirs = PROCESSES.Pipe(duplex=False)
    child = PROCESSES.Process(target=decode_here, args=(theirs, str(video), protocol, limits), daemon=True)
    allowed = (
        f"a video that FFmpeg can read, of at most {limits.frames} frames, that {limits.memory:g} GB and "
        f"{limits.decode_seconds:g} seconds suffice to decode"
    )
    child.start()
    theirs.close()
    try:
        if not ours.poll(limits.decode_seconds):
            what = f"a video that was not decoded within {limits.decode_seconds:g} seconds"
            raise Refusal(422, what, allowed, "send a shorter or smaller video")
        clips, frames, fault = ours.recv()
    except EOFError:
        what = "a file that ended the process which decoded it: a fault in the decoder, or no memory was left"
        raise Refusal(422, what, allowed, "encode the video again, for example with: ffmpeg -i VIDEO new.mp4") from None
    finally:
        child.kill()
        child.join()
        ours.close()
    if fault:
        raise Refusal(422, f"a file that {fault}", allowed, "send another file, or encode this one again")
    return Decoded(video.name, frames, torch.from_numpy(clips))


# ---- The model: requests that arrive together share a forward pass.


class Batches:
    """Collects decoded videos for a few milliseconds and gives the model up to `limits.batch` at once."""

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.waiting: asyncio.Queue[tuple[Decoded, asyncio.Future[Prediction]]] = asyncio.Queue()
        self.thread = ThreadPoolExecutor(1, "model")
        self.passes = self.videos = self.largest = 0

    async def __call__(self, decoded: Decoded) -> Prediction:
        answer: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((decoded, answer))
        return await answer

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            batch = [await self.waiting.get()]
            await asyncio.sleep(self.limits.wait_ms / 1000)
            while len(batch) < self.limits.batch and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            batch = [entry for entry in batch if not entry[1].done()]  # without requests that have timed out
            if batch:
                await self._forward(batch)

    async def _forward(self, batch: list[tuple[Decoded, asyncio.Future[Prediction]]]) -> None:
        videos = [decoded for decoded, _ in batch]
        try:
            loop = asyncio.get_running_loop()
            predictions = await loop.run_in_executor(self.thread, self.predictor.answer, videos)
        except Exception as error:  # such as out of memory; the next batch may succeed
            log.exception("a forward pass of %d videos failed", len(batch))
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        self.passes += 1
        self.videos += len(batch)
        self.largest = max(self.largest, len(batch))
        for (_, answer), prediction in zip(batch, predictions, strict=True):
            if not answer.done():
                answer.set_result(prediction)


# ---- The service.


class Service:
    """Places, files, and the handling of a request."""

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self.predictor, self.limits = predictor, limits
        self.inside, self.lately = 0, 1.0  # requests in work; seconds of the last one
        self.decoders = ThreadPoolExecutor(limits.decoders, "decoder")  # each thread waits for a process
        self.batches = Batches(predictor, limits)

    @asynccontextmanager
    async def open(self, app: FastAPI) -> AsyncIterator[None]:
        """Resources of the running service. It closes after the last request."""
        with tempfile.TemporaryDirectory(prefix="cast-serve-") as folder:
            self.folder = folder
            PROCESSES.set_forkserver_preload(["__main__", __name__, "cast.predict"])
            await asyncio.to_thread(self._first_process)
            task = asyncio.create_task(self.batches.run())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.to_thread(self.decoders.shutdown)
                await asyncio.to_thread(self.batches.thread.shutdown)

    @staticmethod
    def _first_process() -> None:
        """Start a process that takes seconds for the imports; later ones have them already."""
        child = PROCESSES.Process(target=int)
        child.start()
        child.join()

    async def predict(self, request: Request, top: int) -> dict[str, Any]:
        """Handle a request."""
        limits = self.limits
        if self.inside >= limits.waiting:
            came = f"a request beside {self.inside} others that are not answered yet"
            later = {"Retry-After": str(math.ceil(self.lately))}
            raise Refusal(503, came, f"{limits.waiting} at a time", "try again after Retry-After seconds", later)
        self.inside += 1
        start, stage = time.monotonic(), "its upload"
        try:
            async with asyncio.timeout(limits.seconds):
                with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".video") as file:
                    await self._receive(request, file)
                    stage = "decoding"
                    loop = asyncio.get_running_loop()
                    video, protocol = Path(file.name), self.predictor.protocol
                    decoded = await loop.run_in_executor(self.decoders, decode_elsewhere, video, protocol, limits)
                stage = "the model"
                prediction = await self.batches(decoded)
        except TimeoutError:
            came = f"a request that was not answered within {limits.seconds:g} seconds; {stage} took too long"
            raise Refusal(
                504, came, f"{limits.seconds:g} seconds for a request", "try again, or send a smaller video"
            ) from None
        finally:
            self.inside -= 1
            self.lately = time.monotonic() - start
        guesses = {head: found[:top] for head, found in asdict(prediction)["guesses"].items()}
        return {"frames": prediction.frames, "views": prediction.views, "guesses": guesses}

    async def _receive(self, request: Request, file: Any) -> None:
        """Write the request's body into a file, up to the limit."""
        most = int(self.limits.megabytes * 1e6)
        kind, length = request.headers.get("content-type", ""), request.headers.get("content-length", "")
        if kind.startswith("multipart/"):
            do = "send the file as it is: curl --data-binary @VIDEO"
            raise Refusal(415, f"a form ({kind.split(';')[0]})", "a request whose body is the video", do)
        # A client that is cut off while it sends sees a broken connection. So the same amount again is received and
        # dropped.
        if length.isdecimal() and int(length) > 2 * most:
            raise self._too_large(int(length))
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            if received > 2 * most:
                break
            if received <= most:
                await asyncio.to_thread(file.write, chunk)
        if received > most:
            raise self._too_large(received)
        if not received:
            do = "send one: curl --data-binary @VIDEO"
            raise Refusal(422, "an empty body", "a request whose body is the video", do)
        await asyncio.to_thread(file.flush)

    def _too_large(self, size: int) -> Refusal:
        allowed, do = f"{self.limits.megabytes:g} MB", "send a shorter or smaller video"
        return Refusal(413, f"{size:,} bytes, and perhaps more", allowed, do, {"Connection": "close"})

    def health(self) -> dict[str, Any]:
        """The state of the service."""
        batches = self.batches
        counts = {"passes": batches.passes, "videos": batches.videos, "largest_batch": batches.largest}
        heads = {head: len(names) for head, names in self.predictor.labels.items()}
        return {"status": "ok", "heads": heads, "inside": self.inside, **counts, "limits": asdict(self.limits)}


def create_app(predictor: Predictor, limits: Limits | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        predictor: its `batch` becomes the clips of a full batch of videos; its `top` is the most guesses of an answer.
        limits: of requests.
    """
    limits = limits or Limits()
    predictor.batch = limits.batch * predictor.protocol.clips
    service = Service(predictor, limits)
    app = FastAPI(title="CAST", lifespan=service.open)

    @app.post("/predict")
    async def predict(request: Request, top: Annotated[int, Query(ge=1, le=predictor.top)] = predictor.top) -> Any:
        """The most probable classes of the video in the body, by head."""
        return await service.predict(request, top)

    @app.get("/health")
    async def health() -> Any:
        """Whether requests are answered, and counts of the work so far."""
        return service.health()

    def answer(refusal: Callable[[Request, Any], Refusal]) -> Callable[[Request, Any], Awaitable[JSONResponse]]:
        async def handle(request: Request, error: Any) -> JSONResponse:
            return refusal(request, error).answer()

        return handle

    known = "POST /predict with a video as the body, GET /health"
    app.add_exception_handler(Refusal, answer(lambda request, error: error))
    app.add_exception_handler(ClientDisconnect, answer(lambda *_: Refusal(400, "half a video", known, "send it whole")))
    app.add_exception_handler(HTTPException, answer(lambda request, error: Refusal(
        error.status_code, f"{request.method} {request.url.path}", known, "see /docs", dict(error.headers or {})
    )))  # fmt: skip
    app.add_exception_handler(RequestValidationError, answer(lambda request, error: Refusal(
        422, f"top={request.query_params.get('top')}", f"top from 1 to {predictor.top}", "correct top, or leave it out"
    )))  # fmt: skip
    # Starlette logs the traceback of an unexpected error; the client gets this answer.
    app.add_exception_handler(Exception, answer(lambda *_: Refusal(
        500, "a request that failed here", known, "try again; if it fails again, the service's log says why"
    )))  # fmt: skip
    return app


def main(words: list[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, and then answer the requests in work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="as of cast predict: a directory, a file, a published name, owner/name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free (8000)")
    parser.add_argument("--top", type=int, default=5, help="guesses of an answer at most (5)")
    said = dict(line.strip().split(": ", 1) for line in (Limits.__doc__ or "").split("Args:\n")[1].strip().splitlines())
    for field in fields(Limits):
        kind = type(field.default)
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=field.default, help=f"{said[field.name]} ({field.default})")
    args = vars(parser.parse_args(words))
    host, port, checkpoint, top = (args.pop(name) for name in ("host", "port", "checkpoint", "top"))
    if not 0 <= port <= 65535:
        parser.error(f"--port is {port}; a port is from 1 to 65535, and 0 takes one that is free")
    try:
        limits = Limits(**args)
        app = create_app(Predictor(checkpoint, top=top), limits)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=math.ceil(limits.seconds) + 1)


if __name__ == "__main__":
    main()
