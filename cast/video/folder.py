"""The videos below a folder, and a list of everything else there."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cast.ground.files import printable
from cast.video.files import VIDEO_ENDINGS, PathLike
from cast.video.frame_folders import is_picture, numbered

#: Most names in a note for each kind of file.
_NAMED = 5


@dataclass
class Folder:
    """Result of a search below a folder.

    Args:
        root: the folder.
        videos: files whose names end like a video's, and folders of numbered frames, sorted; without hidden ones.
        left_out: reason -> the other files and folders, sorted.
    """

    root: Path
    videos: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """The omitted files: number, reason and first names; empty if there are none."""
        if not self.left_out:
            return ""
        parts = [f"{len(paths)} {why} ({self._first(paths)})" for why, paths in self.left_out.items()]
        return f"{printable(self.root)}: left out below it: {'; '.join(parts)}"

    def _first(self, paths: Sequence[Path]) -> str:
        names = [printable(path.relative_to(self.root)) for path in paths[:_NAMED]]
        return ", ".join(names) + (", ..." if len(paths) > _NAMED else "")


def find_videos(folder: PathLike) -> Folder:
    """Every video below a folder, and everything else with the reason for its omission.

    Links to files and folders are followed. A folder is searched once, even if several links lead to it or back to it.
    Its own name below `folder` is preferred to a link's. Endings may be in capitals. In a folder without videos,
    pictures numbered from 0 or 1 are the frames of one video.

    Raises:
        ValueError: there is no video; the message lists the other files.
    """
    found = Folder(Path(folder))
    waiting, seen = deque([found.root]), set[tuple[int, int]]()
    links: deque[Path] = deque()  # visited after all real folders, so that these keep their names
    while waiting or links:
        place = (waiting or links).popleft()
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                _leave(found, "links to folders that were searched already", place)
                continue
            seen.add((status.st_dev, status.st_ino))
            inside = sorted(os.scandir(place), key=lambda entry: entry.name)
            if not os.access(place, os.X_OK):  # without this permission only names can be read
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            _leave(found, f"folders that can't be read: {error.strerror}", place)
            continue
        if frames := numbered([entry.name for entry in inside]):
            found.videos.append(place)
        for entry in inside:
            path = Path(entry.path)
            if os.path.isdir(path) and not path.name.startswith("."):
                (links if entry.is_symlink() else waiting).append(path)
            elif not (frames and is_picture(path.name)):
                _sort_in(found, path)
    found.videos.sort()
    for paths in found.left_out.values():
        paths.sort()
    if not found.videos:
        known = ", ".join(sorted(VIDEO_ENDINGS))
        raise ValueError(
            f"{printable(folder)}: no folder of numbered frames is in it, and no file below it has a name that ends in "
            f"one of {known}" + (f". {found.note}" if found.note else ", nor is there any other file")
        )
    return found


def _sort_in(found: Folder, path: Path) -> None:
    if path.name.startswith("."):
        _leave(found, "hidden", path)
    elif os.path.islink(path) and not os.path.exists(path):
        _leave(found, "links that can't be followed", path)
    elif path.suffix.lower() not in VIDEO_ENDINGS:
        _leave(found, "whose names don't end like a video's", path)
    elif os.path.isfile(path):
        found.videos.append(path)
    else:
        _leave(found, "that are no regular files", path)


def _leave(found: Folder, why: str, path: Path) -> None:
    found.left_out.setdefault(why, []).append(path)
