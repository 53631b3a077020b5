"""`cast data check`: read every annotation, probe every video, write a list of videos that training cannot use."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cast.ground.files import printable
from cast.video.annotations import PathLike, Sample
from cast.video.datasets import VideoSet, open_dataset
from cast.video.files import VideoError
from cast.video.frame_folders import Folders
from cast.video.probe import Fault, Probe, probe_all
from cast.video.sizes import about_sizes
from cast.video.skips import DEFAULT_NAME, FAULTS, SHORT, Skip, read_rows, write_skips

#: Printed faults; the skip list has all.
_SHOWN = 20

#: Most names of classes without a video in a message.
_ABSENT = 5
#: Most lines about videos annotated twice, or about wrong numbers of pictures, for each annotation file.
_NAMED = 5


#: File -> width and height of its pictures.
Sizes = dict[str, tuple[int, int]]


def find_faults(
    dataset: VideoSet,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    every_frame: bool = False,
) -> list[Skip]:
    """Every video of every split that training cannot use; arguments and errors as of :func:`look_at`."""
    return look_at(dataset, workers, progress, every_frame)[0]


def look_at(
    dataset: VideoSet,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    every_frame: bool = False,
) -> tuple[list[Skip], Sizes]:
    """Every video of every split that training cannot use, in the order of the annotations; and the pictures' sizes.

    Args:
        dataset: the data set to check; its present skip list is ignored.
        workers: processes.
        progress: called with videos probed and videos in all.
        every_frame: decode all frames, not only those that validation takes.

    Raises:
        ValueError: an annotation file does not fit (the message names file and line), or `workers` is below 1.
        MissingExtraError: the decoder is not installed.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    settings = dataset.settings
    where: dict[str, str] = {}
    for split in dataset.splits:
        for sample in dataset.all_samples(split):
            where.setdefault(os.fspath(sample.path), f"{dataset.annotations(split)}:{sample.line}")
    probe = Probe(settings.frames, settings.sampling, settings.decoder, every_frame)
    found: dict[str, Fault] = {}
    sizes: Sizes = {}
    for done, (path, fault, size) in enumerate(probe_all(probe, list(where), workers), start=1):
        progress(done, len(where))
        if fault:
            found[path] = fault
        if size:
            sizes[path] = size
    faults = [
        Skip(printable(os.path.relpath(path, dataset.root)), found[path][0], printable(place), found[path][1])
        for path, place in where.items()
        if path in found
    ]
    return faults, {path: sizes[path] for path in where if path in sizes}


def main(
    what: PathLike,
    root: PathLike | None = None,
    workers: int | None = None,
    out: PathLike | None = None,
    every_frame: bool = False,
) -> None:
    """Check a data set, print its faults and write its skip list, which is empty if there are none.

    Lines of the present list with a fault that no check reports were written by a person, and stay.

    Raises:
        ValueError: there is no such data set, its annotations don't fit, or some videos can't be used.
    """
    dataset = open_dataset(what, root)
    for split in dataset.splits:
        print(f"{dataset.annotations(split)}: {len(dataset.all_samples(split))} videos")
    classes = ", ".join(f"{len(names)} classes of {head}" for head, names in dataset.classes.items())
    print(classes or "no labels", flush=True)
    for note in (*_gaps(dataset), *_repeats(dataset), *_miscounted(dataset)):
        print(note, flush=True)
    named = dataset.settings.skip_list
    path = Path(out) if out else dataset.root / (DEFAULT_NAME if named in ("auto", "none") else named)
    if not os.access(path.parent, os.W_OK):  # fails now, and not after the probe of every video
        raise ValueError(f"{path}: its directory is not there or can't be written to; choose another file with --out")
    by_hand = [row for row in read_rows(path) if row.fault not in FAULTS] if path.is_file() else []
    kept = {row.path for row in by_hand}
    found, sizes = _with_bar(dataset, workers or os.cpu_count() or 1, every_frame)
    for line in about_sizes(sizes, dataset.settings.short_side):
        print(line)
    faults = [skip for skip in found if skip.path not in kept]
    write_skips(path, [*faults, *by_hand])
    if by_hand:
        print(f"{path} keeps {len(by_hand)} more, listed by hand")
    for skip in faults[:_SHOWN]:
        print(f"{skip.where}: {skip.fault}: {skip.path} ({skip.detail})")
    if len(faults) > _SHOWN:
        print(f"... and {len(faults) - _SHOWN} more in {path}")
    if faults:
        counts = ", ".join(f"{number} {fault}" for fault, number in sorted(Counter(f.fault for f in faults).items()))
        tested = "; tests still use the short ones" if any(skip.fault == SHORT for skip in faults) else ""
        raise ValueError(
            f"{len(faults)} videos can't be used ({counts}); {path} lists them, and training skips them{tested}"
        )
    if not by_hand:
        print(f"every video can be used; {path} is empty")


def _gaps(dataset: VideoSet) -> list[str]:
    """A line for each head with classes that no training video shows. A model learns never to answer such a class."""
    if "train" not in dataset.splits:
        return []
    seen = {head: {sample.labels[head] for sample in dataset.all_samples("train")} for head in dataset.classes}
    lines = []
    for head, names in dataset.classes.items():
        if absent := [name for index, name in enumerate(names) if index not in seen[head]]:
            shown = ", ".join(absent[:_ABSENT]) + (", ..." if len(absent) > _ABSENT else "")
            lines.append(f"no training video shows {len(absent)} of {len(names)} classes of {head}: {shown}")
    return lines


def _repeats(dataset: VideoSet) -> list[str]:
    """A line for each video that an earlier split has too. Above all this finds test videos in the training split."""
    first: dict[str, tuple[Path, Sample]] = {}
    files: set[Path] = set()
    lines = []
    for split in dataset.splits:
        file = dataset.annotations(split)
        if file in files:  # val and test may have the same file
            continue
        files.add(file)
        again = []
        for sample in dataset.all_samples(split):
            name = os.path.normpath(sample.path)
            if name not in first:
                first[name] = file, sample
                continue
            where, other = first[name]
            how = "the same labels" if sample.labels == other.labels else "other labels"
            again.append(
                f"{file}:{sample.line}: {os.path.relpath(name, dataset.root)} is in {where}:{other.line} already, "
                f"with {how}"
            )
        lines += _first(again, file)
    return lines


def _miscounted(dataset: VideoSet) -> list[str]:
    """A line for each folder of frames with more or fewer pictures than its annotation states."""
    folders, lines = Folders(), []
    for split in dataset.splits:
        other = []
        for sample in dataset.all_samples(split):
            if sample.pictures is None or not os.path.isdir(sample.path):
                continue
            try:
                count = folders.frame_count(sample.path)
            except VideoError:  # the probe reports it
                continue
            if count != sample.pictures:
                other.append(
                    f"{dataset.annotations(split)}:{sample.line}: {os.path.relpath(sample.path, dataset.root)} holds "
                    f"{count} pictures, not {sample.pictures}; all of them are used"
                )
        lines += _first(other, dataset.annotations(split))
    return lines


def _first(lines: list[str], file: Path) -> list[str]:
    more = [f"... and {len(lines) - _NAMED} more in {file}"] if len(lines) > _NAMED else []
    return lines[:_NAMED] + more


def _with_bar(dataset: VideoSet, workers: int, every_frame: bool) -> tuple[list[Skip], Sizes]:
    bar = Progress(
        TextColumn("probing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with bar:
        task = bar.add_task("probing")
        return look_at(dataset, workers, lambda done, total: bar.update(task, completed=done, total=total), every_frame)
