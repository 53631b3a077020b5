"""Clips a second on one core: decoding, and decoding with the augmentation of the recipes.

    OMP_NUM_THREADS=1 pytest benchmarks/ --benchmark-only -k data

A row is one worker's work on a clip: 16 of 300 frames of 340 x 256 pixels (H.264, a key frame every 12), made into
float32 `[3, 16, 224, 224]`. Every clip comes from a file that was not open before, as in the first epoch of a training,
so the time includes opening and indexing. The videos are generated: a moving texture with noise, so that decoding has
work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import SAMPLE_SECONDS
from measure import CpuMachine
from report import recorded_time, replay

from cast_kernels.gpu.timing import Spread, interleave

av = pytest.importorskip("av", reason="the rows of data decode video with PyAV")

from cast.ground.optional import MissingExtraError  # noqa: E402
from cast.video import reader as exact_reader  # noqa: E402
from cast.video.augment import AugmentSettings, apply, draw  # noqa: E402
from cast.video.decoders import Name, decoder  # noqa: E402
from cast.video.sampling import Sampling, train_indices  # noqa: E402

CPU_ONLY = True
HEIGHT, WIDTH, FRAMES, SIZE = 256, 340, 300, 224
PUBLISHED = "rand-m7-n4-mstd0.5-inc1"
#: Clips of one call, each with its own random draws; all rows make the same clips.
CLIPS = 12
#: Most samples of each row, and seconds for all samples of a group.
SAMPLES, GROUP_SECONDS = 9, 90.0

#: Row -> decoder and augmentation; with None it only decodes.
ROWS: dict[str, tuple[Name, AugmentSettings | None]] = {
    "decode (pyav)": ("pyav", None),
    "decode (torchcodec)": ("torchcodec", None),
    "decode, crop, flip": ("pyav", AugmentSettings(flip=0.5)),
    "decode, RandAugment m7 n4, crop, flip": ("pyav", AugmentSettings(flip=0.5, randaugment=PUBLISHED)),
    "decode, RandAugment m9, jitter 0.4, crop, flip": (
        "pyav",
        AugmentSettings(flip=0.5, randaugment="rand-m9-mstd0.5-inc1", color_jitter=0.4),
    ),
    "frames in memory, RandAugment m7 n4, crop, flip": (
        "pyav",
        AugmentSettings(flip=0.5, randaugment=PUBLISHED),
    ),
}
IN_MEMORY = "frames in memory"
GROUPS: tuple[Sampling, ...] = ("uniform", "dense")


def write_clip(path: Path, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> Path:
    """Write a texture that moves two pixels a frame, with new noise in every frame."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, : width + 2 * frames]
    texture = 128 + 60 * np.sin(x / 11) * np.cos(y / 17) + 25 * rng.standard_normal(x.shape)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"qp": "26", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 12
        for number in range(frames):
            picture = texture[:, 2 * number : 2 * number + width, None] + rng.normal(0, 4, (height, width, 3))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_clips(path: Path, name: str, sampling: Sampling, size: int = SIZE) -> Callable[[], object]:
    """A function that makes :data:`CLIPS` clips for the row `name`; each clip has its own name of the file."""
    reader_name, augment = ROWS[name]
    reader = decoder(reader_name)
    paths = [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(CLIPS)]
    for copy in paths:
        if not copy.exists():
            copy.hardlink_to(path)

    def read(seed: int) -> np.ndarray:
        length = reader.frame_count(paths[seed], threads=1)
        return reader.read(paths[seed], train_indices(length, np.random.default_rng(seed), sampling), threads=1)

    kept = [read(seed) for seed in range(CLIPS)] if name.startswith(IN_MEMORY) else None

    def run() -> None:
        exact_reader._indices.clear()  # torchcodec caches only the last file, which is another one
        for seed in range(CLIPS):
            frames = kept[seed] if kept else read(seed)
            if augment:
                plan = draw(augment, size, *frames.shape[1:3], np.random.default_rng((1, seed)))
                apply(plan, torch.from_numpy(frames).permute(0, 3, 1, 2), size)

    return run


@cache
def measure_group(path: Path, sampling: Sampling) -> dict[str, dict[str, Any]]:
    """All rows: name -> milliseconds of a clip, and clips a second."""
    steps, rows = {}, {}
    for name in ROWS:
        try:
            steps[name] = make_clips(path, name, sampling)
        except MissingExtraError as error:
            rows[name] = {"missing": str(error)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a DataLoader's worker
    try:
        for step in steps.values():
            step()
        elapsed = CpuMachine().elapsed_ms
        for name, values in interleave(elapsed, steps, SAMPLES, GROUP_SECONDS, SAMPLE_SECONDS["cpu"]).items():
            each = [ms / CLIPS for ms in values]
            spread = Spread.of(each)
            rows[name] = {
                "median_ms": spread.median, "spread_ms": [spread.low, spread.high], "all_ms": each,
                "clips_per_second": 1e3 / spread.median,
            }  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return rows


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("videos") / "clip.mp4")


@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=recorded_time)
@pytest.mark.parametrize(("sampling", "name"), [(sampling, name) for sampling in GROUPS for name in ROWS])
def test_data(sampling: Sampling, name: str, video: Path, benchmark: Any, report: Any) -> None:
    """One row of its group's interleaved run."""
    row = measure_group(video, sampling)[name]
    report.add(f"data, {sampling}: 16 of {FRAMES} frames, {WIDTH} x {HEIGHT}, one core", name, row)
    benchmark.group = f"data {sampling}"
    replay(benchmark, row)
    if "missing" in row:
        pytest.skip(row["missing"])
