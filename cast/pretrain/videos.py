"""Videos to pre-train on, without labels."""

from __future__ import annotations

from pathlib import Path

from cast.ground.files import printable
from cast.video.annotations import Sample
from cast.video.datasets import DataSettings, VideoSet
from cast.video.folder import find_videos
from cast.video.skips import DEFAULT_NAME, read_skips


def unlabelled(settings: DataSettings, split: str) -> tuple[list[Sample], str]:
    """The videos of a split without labels, and a line about omitted ones.

    Args:
        settings: of the data set. Without an annotation file for training, all videos below its root are used.
        split: "train" or "val".

    Raises:
        ValueError: annotations that can't be read, or no videos.
    """
    if split == "train" and settings.train is None:
        return _folder(settings)
    videos = VideoSet(settings)
    return [Sample(sample.path, {}) for sample in videos.samples(split)], videos.skipped(split)


def _folder(settings: DataSettings) -> tuple[list[Sample], str]:
    if not settings.root:  # the recipe's default; Path would read it as the present directory
        raise ValueError("data.root is empty; it must name the directory with the videos")
    root = Path(settings.root)
    if not root.is_dir():
        raise ValueError(f"{printable(root)}: no such directory; data.root names the one with the videos")
    found = find_videos(root)
    skips: dict[str, str] = {}
    listed = root / (DEFAULT_NAME if settings.skip_list == "auto" else settings.skip_list)
    if settings.skip_list != "none" and (settings.skip_list != "auto" or listed.is_file()):
        skips = read_skips(listed)
    kept = [path for path in found.videos if printable(path.relative_to(root)) not in skips]
    if not kept:
        raise ValueError(f"{printable(root)}: all {len(found.videos)} videos are on {printable(listed)}")
    taken = f"{printable(root)}: {len(kept)} of {len(found.videos)} videos below it are taken"
    return [Sample(path, {}) for path in kept], f"{taken}\n{found.note}" if found.note else taken
