"""A data set: the places of annotations and videos, the names of classes, and the videos to skip."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cast.ground.files import parse_yaml, printable
from cast.video.annotations import (
    Layout,
    PathLike,
    Sample,
    check_once,
    guess_layout,
    read_compositional,
    read_single,
    read_text,
)
from cast.video.augment import AugmentSettings
from cast.video.classes import find_classes, find_file, read_classes
from cast.video.sampling import Sampling
from cast.video.shrink import check_short_side
from cast.video.skips import DEFAULT_NAME, SHORT, read_skips
from cast.video.tables import Table, read_table

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

#: More classes than any published set of videos has. Larger "indices" are identifiers, and would fill the memory.
MOST_CLASSES = 100_000

#: Words that mirroring exchanges.
_MIRRORED = (("left", "right"), ("cw", "ccw"), ("clockwise", "counterclockwise"), ("clockwise", "anticlockwise"))

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSettings:
    """The `data` section of a recipe.

    Args:
        root: directory of the data set; every other path is relative to it.
        layout: of the annotation files: "compositional" (`video_id,verb,noun`), "single" (`name.mp4 label`, or for
            folders of frames `name pictures label`), or "csv" (with a header).
        train: annotation file of the training videos; null if there is none.
        val: of the validation videos.
        test: of the test videos.
        videos: directory of the files or folders of frames; "{split}" in it is replaced by train, val or test.
        classes: the number of classes of each head, or the file with their names: {"verb": 97, "noun": "nouns.csv"};
            one file name for all heads; null to take them from the annotations. With a number or null, the files that
            data sets publish give the names, if `root` has them; the numbers must agree.
        columns: layout "csv" only: role of a column (path, verb, noun, action) -> its name in the header, if it can't
            be guessed.
        sampling: "uniform" (EPIC-Kitchens-100, Something-Something V2) or "dense" (Kinetics-400).
        frames: frames of a clip.
        size: side of a clip in pixels.
        short_side: larger pictures are first shrunk to this, in tests too (docs/video.md); null leaves them.
        decoder: "pyav", or "torchcodec" if it is installed.
        workers: processes that decode; 0 decodes in the training process.
        skip_list: the list of unusable videos by `cast data check`: its file, "auto" for skip.csv in `root` if it
            exists, or "none".
        augment: random changes to training clips.
    """

    root: str
    layout: Layout = "csv"
    train: str | None = "train.csv"
    val: str | None = "val.csv"
    test: str | None = None
    videos: str = "."
    classes: str | dict[str, int | str] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    sampling: Sampling = "uniform"
    frames: int = 16
    size: int = 224
    short_side: int | None = 320
    decoder: Literal["pyav", "torchcodec"] = "pyav"
    workers: int = 4
    skip_list: str = "auto"
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def __post_init__(self) -> None:
        choices = {
            "layout": ("compositional", "single", "csv"),
            "sampling": ("uniform", "dense"),
            "decoder": ("pyav", "torchcodec"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(map(repr, allowed))}")
        for name, lowest in (("frames", 1), ("size", 1), ("workers", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        check_short_side(self.short_side, self.size)
        if self.columns and self.layout != "csv":
            raise ValueError(f"columns are given, but layout {self.layout!r} has no header; leave them out")

    @property
    def heads(self) -> tuple[str, ...] | None:
        """The labels' names, if the layout alone determines them."""
        return {"compositional": ("verb", "noun"), "single": ("action",)}.get(self.layout)


class VideoSet:
    """A data set. Its annotations are read on first use.

    Args:
        settings: all settings of the data set.
        stated: the YAML file that names its sampling; None if the sampling is a default or the caller's.
    """

    settings: DataSettings
    stated: Path | None

    def __init__(self, settings: DataSettings, stated: Path | None = None) -> None:
        self.settings, self.stated = settings, stated
        self.root: Path = Path(settings.root)
        self._samples: dict[str, list[Sample]] = {}
        self._told: set[str] = set()

    @property
    def splits(self) -> tuple[Split, ...]:
        """Splits that have an annotation file in the settings."""
        return tuple(split for split in SPLITS if getattr(self.settings, split))

    @property
    def sampling(self) -> Sampling:
        """How frames are sampled."""
        return self.settings.sampling

    def annotations(self, split: str) -> Path:
        """The annotation file of a split.

        Raises:
            ValueError: the data set has no such split.
        """
        if split not in self.splits:
            raise ValueError(f"split is {split!r}; {self.root} has {', '.join(self.splits) or 'none'}")
        return self.root / getattr(self.settings, split)

    def videos(self, split: str) -> Path:
        """The directory of a split's files."""
        return self.root / self.settings.videos.replace("{split}", split)

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Names of the labels: verb and noun, or action. Empty if no split has labels and no setting names them."""
        if self.settings.heads:
            return self.settings.heads
        given = self.settings.classes
        named = tuple(given) if isinstance(given, dict) else ()
        return next((table.heads for table in map(self._table, self.splits) if table.heads), named)

    @cached_property
    def classes(self) -> dict[str, list[str]]:
        """Class names by head. Without names, the indices as text.

        Raises:
            ValueError: a file of names can't be read, or names are given for other heads.
        """
        given = self.settings.classes
        if given is None:
            return find_classes(self.root, self.heads) or self._from_annotations()
        entries = dict.fromkeys(self.heads, given) if isinstance(given, str) else given
        if set(entries) != set(self.heads):
            raise ValueError(f"classes are given for {sorted(entries)}, the labels are {sorted(self.heads)}")
        return {head: self._named(head, entries[head]) for head in self.heads}

    def _named(self, head: str, entry: int | str) -> list[str]:
        if isinstance(entry, str):
            return read_classes(self.root / entry, head)
        path = find_file(self.root, head)
        if path is None:
            return _numbers(head, entry)
        names = read_classes(path, head)
        if len(names) != entry:
            raise ValueError(
                f"classes says {entry} for {head!r}, but {path} names {len(names)}: give that number, or, "
                "if the file belongs to other videos, move it elsewhere"
            )
        return names

    def _from_annotations(self) -> dict[str, list[str]]:
        """The names in the training annotations. For indices: numbers up to the largest in any split."""
        if self.settings.layout != "csv":
            samples = [sample for split in self.splits for sample in self._read(split, None)]
            everywhere = [sample.labels for sample in samples if sample.labels]
            if not everywhere:
                return {}
            return {head: _numbers(head, max(labels[head] for labels in everywhere) + 1) for head in self.heads}
        tables = [table for table in map(self._table, self.splits) if table.heads]
        names = {}
        for head in self.heads:
            words = tables[0].words(head)
            if all(table.indexed(head) for table in tables):
                words = _numbers(head, max(int(word) for table in tables for word in table.words(head)) + 1)
            names[head] = words
        return names

    def all_samples(self, split: str) -> list[Sample]:
        """The videos of a split, including those on the skip list.

        Raises:
            ValueError: no such split, or its annotations don't fit or name a video twice; the message names file and
                line.
        """
        if split not in self._samples:
            if self.settings.layout == "csv":
                samples = self._table(split).samples(self.videos(split), self.classes)
            else:
                samples = self._read(split, {head: len(names) for head, names in self.classes.items()})
            check_once(self.annotations(split), samples)
            self._samples[split] = samples
        return self._samples[split]

    def _read(self, split: str, counts: Mapping[str, int] | None) -> list[Sample]:
        reader = read_compositional if self.settings.layout == "compositional" else read_single
        return reader(self.annotations(split), self.videos(split), counts, labelled=_needs_labels(split))

    def _table(self, split: str) -> Table:
        return read_table(self.annotations(split), self.settings.columns, labelled=_needs_labels(split))

    @cached_property
    def skip_list(self) -> Path | None:
        """The list of videos to leave out; None if there is none.

        Raises:
            ValueError: the settings name one that does not exist.
        """
        name = self.settings.skip_list
        if name == "none":
            return None
        path = self.root / (DEFAULT_NAME if name == "auto" else name)
        if name != "auto" and not path.is_file():
            raise ValueError(f"{path}: no such skip list; cast data check writes one")
        return path if path.is_file() else None

    @cached_property
    def _skips(self) -> dict[str, str]:
        return read_skips(self.skip_list) if self.skip_list else {}

    def samples(self, split: str) -> list[Sample]:
        """The videos of a split without those on the skip list. The first call logs their number.

        Short videos are left out of training only: the published code tests them with repeated frames. Either all
        videos of a validation or test split have labels, or none.

        Raises:
            ValueError: no such split, annotations that don't fit, or nothing is left.
        """
        everything = self.all_samples(split)
        kept = [sample for sample in everything if self._fault(sample, split) is None]
        # Of several training processes only the first one logs.
        if len(kept) < len(everything) and split not in self._told and os.environ.get("RANK", "0") == "0":
            _log.warning(self.skipped(split))
        self._told.add(split)
        if not kept:
            raise ValueError(f"{self.annotations(split)}: all {len(everything)} videos are on {self.skip_list}")
        if split == "train" and self.settings.augment.flip:
            self._check_flip()
        return kept

    def _check_flip(self) -> None:
        """Refuse to mirror clips if classes name a direction: a mirrored "left to right" shows another class."""
        for names in self.classes.values():
            words = [set(re.split(r"[^a-z]+", name.lower())) for name in names]
            for one, other in _MIRRORED:
                pair = [
                    next((n for n, w in zip(names, words, strict=True) if side in w), None) for side in (one, other)
                ]
                if None not in pair:
                    raise ValueError(
                        f"data.augment.flip is {self.settings.augment.flip}, but a mirrored {pair[0]!r} is no longer "
                        f"one (there is also {pair[1]!r}); set data.augment.flip to 0"
                    )

    def skipped(self, split: str) -> str:
        """The number of videos of a split that are left out, and the reasons, in one line."""
        reasons: dict[str, int] = {}
        for sample in self.all_samples(split):
            if fault := self._fault(sample, split):
                reasons[fault] = reasons.get(fault, 0) + 1
        total, count = sum(reasons.values()), len(self.all_samples(split))
        if not total:
            return f"{self.annotations(split)}: none of {count} videos is skipped"
        why = ", ".join(f"{number} {fault}" for fault, number in sorted(reasons.items()))
        return f"{self.annotations(split)}: {total} of {count} videos are skipped ({why}), as {self.skip_list} says"

    def _fault(self, sample: Sample, split: str) -> str | None:
        """The skip list's reason to leave a video out of a split; None if there is none."""
        fault = self._skips.get(printable(os.path.relpath(sample.path, self.root)))
        return None if fault == SHORT and split != "train" else fault


def _needs_labels(split: str) -> bool:
    """Whether a split must have labels. A challenge does not publish its test labels; training needs them."""
    return split == "train"


def _numbers(head: str, count: int) -> list[str]:
    if not 0 < count <= MOST_CLASSES:
        raise ValueError(
            f"{head} would have {count} classes, allowed are 1 to {MOST_CLASSES}: class indices count from 0 without "
            "large gaps; write names in a CSV with a header instead of numbers that stand for something else"
        )
    return [str(index) for index in range(count)]


def open_dataset(what: str | PathLike | DataSettings, root: str | PathLike | None = None) -> VideoSet:
    """Find a data set.

    Args:
        what: a directory with train.csv or val.csv (and a `dataset.yaml`, if the guess below is wrong); a YAML file
            with a `data` section, such as a recipe; an annotation file; or settings.
        root: directory of the data set, if `what` is not it.

    Returns:
        The data set. For a directory, layout and place of the videos are guessed from the annotations and the folders.
            An annotation file alone becomes the split "val".

    Raises:
        ValueError: there is no such data set; the message says what was looked for.
    """
    if isinstance(what, DataSettings):
        return VideoSet(what)
    path = Path(what)
    if path.is_dir():
        if (path / "dataset.yaml").is_file():
            return open_dataset(path / "dataset.yaml", root or path)
        return VideoSet(guess_settings(path))
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path, root)
    if path.is_file():
        folder = path.parent if root is None else Path(root)
        files: dict[Split, Path] = {"val": path.resolve()}
        return VideoSet(guess_settings(folder, files))
    raise ValueError(f"{path}: no such data set; give a directory, a YAML file with a `data` section, or annotations")


def _from_yaml(path: Path, root: str | PathLike | None) -> VideoSet:
    import yaml
    from jsonargparse import ArgumentParser

    try:
        document = parse_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    section = document.get("data") if isinstance(document, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{path}: has no `data` section")
    section = dict(section)
    if root is not None:
        section["root"] = os.fspath(root)
    elif not section.get("root"):
        raise ValueError(f"{path}: its `data` section names no root; say where the data set lies")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DataSettings, "data")
    try:
        namespace = parser.parse_object({"data": section})
        settings = parser.instantiate(namespace).data
    except Exception as error:  # jsonargparse raises its own types
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return VideoSet(settings, path if "sampling" in section else None)


def guess_settings(root: Path, files: Mapping[Split, Path] | None = None) -> DataSettings:
    """Settings guessed from a directory: the annotation files, their layout, the place of the videos.

    Args:
        root: directory of the data set.
        files: annotation files by split; if None `<split>.csv` in `root`.

    Raises:
        ValueError: there are no annotation files.
    """
    names: dict[str, str] = {split: os.fspath(path) for split, path in (files or {}).items()}
    names = names or {split: f"{split}.csv" for split in SPLITS if (root / f"{split}.csv").is_file()}
    if not names:
        raise ValueError(f"{root}: has none of train.csv, val.csv, test.csv; name them in a dataset.yaml")
    split, name = next(iter(names.items()))
    layout = guess_layout(read_text(root / name))
    settings: dict[str, Any] = {"train": None, "val": None} | names | {"root": os.fspath(root), "layout": layout}
    tried = ("{split}", "videos", "videos/{split}", ".")
    for videos in tried:
        guess = DataSettings(**settings, videos=videos, skip_list="none")
        if any(os.path.exists(sample.path) for sample in VideoSet(guess).all_samples(split)[:100]):
            break
    else:
        videos = next(place for place in tried if (root / place.replace("{split}", split)).is_dir())
    return DataSettings(**settings, videos=videos)
