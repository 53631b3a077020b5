"""The demo's data set on disk: mp4 files and annotations in the layout of EPIC-Kitchens-100.

`plain.csv`, `train.csv`, `val.csv` have lines `video_id,verb,noun`. Their videos are in a folder of the same name.
`classes.json` names verbs and nouns. `scenes.csv` has the other contents of each clip, for the controls. The same seed
gives the same bytes. For that reason colours are converted here, because FFmpeg's result depends on buffer alignment.
And x264 runs in one thread at a constant quantiser, because its rate control differed between runs in 6 % of files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np

from cast.demo.scene import ALL, SPLITS, Classes, Split, plan, render
from cast.ground.files import write_bytes, write_json, write_text

#: Written last, so a directory with it is complete.
MANIFEST = "dataset.json"
#: File with the names of the verbs and nouns.
CLASSES = "classes.json"
FPS = 12
#: Clips in a worker's task.
_CHUNK = 40


@dataclass(frozen=True)
class Sizes:
    """Clips of each split. Multiples of 120 have every action equally often."""

    plain: int = 1800
    train: int = 2400
    val: int = 1200

    def of(self, split: Split) -> int:
        return int(getattr(self, split))


def video_id(split: Split, index: int) -> str:
    return f"{split}_{index:05d}"


def make_dataset(
    directory: str | os.PathLike[str],
    sizes: Sizes | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    classes: Classes = ALL,
) -> dict[str, Any]:
    """Write the data set, or check that it is complete.

    Args:
        directory: receives videos and annotations; an interrupted run's files are made again.
        sizes: clips of each split.
        seed: source of all randomness.
        workers: processes; if None, one per core. The bytes do not depend on their number.
        progress: called with the number of finished clips, and of all clips.
        classes: verbs and nouns of the clips.

    Returns:
        The manifest: seed, sizes, and a SHA-256 over all files' names and bytes.

    Raises:
        ValueError: the directory has a data set with another seed, other sizes or other classes.
    """
    root, sizes = Path(directory), sizes or Sizes()
    wanted: dict[str, Any] = {"seed": seed, "sizes": {split: sizes.of(split) for split in SPLITS}}
    if (root / MANIFEST).exists():
        found: dict[str, Any] = json.loads((root / MANIFEST).read_text())
        names = json.loads((root / CLASSES).read_text())
        if {key: found.get(key) for key in wanted} != wanted or names != classes.names():
            raise ValueError(
                f"{root} has a data set made with {found} of the classes {names}; wanted is {wanted} of "
                f"{classes.names()}: choose another directory"
            )
        total = sum(wanted["sizes"].values())
        progress(total, total)
        return found
    jobs = [
        (split, range(start, min(start + _CHUNK, sizes.of(split))))
        for split in SPLITS
        for start in range(0, sizes.of(split), _CHUNK)
    ]
    for split in SPLITS:
        (root / split).mkdir(parents=True, exist_ok=True)
    done, total = 0, sum(len(indices) for _, indices in jobs)
    for count in _run(partial(_write_clips, root, seed, classes), jobs, workers or os.cpu_count() or 1):
        done += count
        progress(done, total)
    for name, text in annotation_files(sizes, seed, classes).items():
        write_text(root / name, text)
    manifest = wanted | {"sha256": digest(root)}
    write_json(root / MANIFEST, manifest)
    return manifest


def annotation_files(sizes: Sizes, seed: int, classes: Classes = ALL) -> dict[str, str]:
    """Every text file of the data set, name -> content."""
    files: dict[str, str] = {CLASSES: json.dumps(classes.names(), indent=2) + "\n"}
    scenes = ["video_id,thing,scan,tiles,verb,quarter"]
    for split in SPLITS:
        lines = []
        for index in range(sizes.of(split)):
            name, scene = video_id(split, index), plan(seed, split, index, classes)[0]
            lines.append(f"{name},{scene.verb},{scene.noun}")
            for role, thing in zip(("actor", "bystander", "decoy"), scene.things, strict=False):
                tiles = "".join(map(str, thing.tiles))
                scenes.append(f"{name},{role},{thing.scan},{tiles},{thing.verb},{thing.quarter}")
        files[f"{split}.csv"] = "\n".join(lines) + "\n"
    files["scenes.csv"] = "\n".join(scenes) + "\n"
    return files


def digest(directory: str | os.PathLike[str]) -> str:
    """SHA-256 over the names and bytes of all files except the manifest, in the order of their names."""
    root, total = Path(directory), hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != MANIFEST):
        total.update(path.relative_to(root).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def encode(frames: np.ndarray) -> bytes:
    """uint8 [T, H, W, 3], even H and W -> an H.264 mp4 file, the same bytes every time."""
    height, width = frames.shape[1:3]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"qp": "20", "preset": "veryfast", "flags": "+bitexact"}
        stream.codec_context.thread_count = 1
        for planes in to_yuv420(frames):
            picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def to_yuv420(frames: np.ndarray) -> np.ndarray:
    """RGB uint8 [T, H, W, 3] -> planar YUV 4:2:0, uint8 [T, 3H/2, W]; BT.601, limited range, rounded to nearest."""
    red, green, blue = np.moveaxis(frames.astype(np.float32), -1, 0)
    luma = 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255
    chroma = (
        128 + (-37.797 * red - 74.203 * green + 112.0 * blue) / 255,
        128 + (112.0 * red - 93.786 * green - 18.214 * blue) / 255,
    )
    count, height, width = luma.shape
    # The mean of two by two pixels. NumPy's `mean` over such short axes takes a third of the time of the whole clip.
    rows = [c[:, :, ::2] + c[:, :, 1::2] for c in chroma]
    halved = [(c[:, ::2] + c[:, 1::2]) / 4 for c in rows]
    planes = [plane.reshape(count, -1) for plane in (luma, *halved)]
    return np.concatenate(planes, 1).round().astype(np.uint8).reshape(count, height * 3 // 2, width)


def _write_clips(root: Path, seed: int, classes: Classes, job: tuple[Split, range]) -> int:
    split, indices = job
    for index in indices:
        write_bytes(root / split / f"{video_id(split, index)}.mp4", encode(render(seed, split, index, classes)))
    return len(indices)


def _run(work: Callable[[Any], int], jobs: Sequence[Any], workers: int) -> Iterator[int]:
    with ExitStack() as stack:
        if workers == 1:
            yield from map(work, jobs)
        else:
            # Forking a process with threads (PyTorch's) can deadlock the child.
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            yield from pool.map(work, jobs)


def read_scenes(directory: str | os.PathLike[str]) -> dict[str, dict[str, Mapping[str, int | str]]]:
    """`scenes.csv` as video_id -> role -> {scan, tiles, verb, quarter}."""
    scenes: dict[str, dict[str, Mapping[str, int | str]]] = {}
    for line in (Path(directory) / "scenes.csv").read_text().splitlines()[1:]:
        name, role, scan, tiles, verb, quarter = line.split(",")
        scenes.setdefault(name, {})[role] = {
            "scan": int(scan),
            "tiles": tiles,
            "verb": int(verb),
            "quarter": int(quarter),
        }
    return scenes
