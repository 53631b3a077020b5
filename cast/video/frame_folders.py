"""Folders of frames: one numbered picture file for each frame, as older tools and EPIC-Kitchens ship videos.

`img_00001.jpg`, `frame_0000000001.jpg`, `0.png`: any text may precede the number. Numbers run from 0 or 1 without a
gap; frame `i` of `cast.video.decoders` is picture number `i` in this order. A folder with a missing picture is refused,
because every later frame would be shifted.

Pillow reads the pictures: torchvision's own reader (0.29) ends the process at a PNG file with one wrong byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cast.video.files import VIDEO_ENDINGS, PathLike, video_error
from cast.video.shrink import shrink

#: Endings of pictures.
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
#: Most folders whose numbering stays in memory; one takes about 500 bytes.
CACHED_FOLDERS = 4096
#: Optical flow, written beside the frames by tools of TSN's time: no picture of the scene.
_FLOW = re.compile(r"flow_?[xy]?_")
_NAME = re.compile(r"(.*?)(\d+)(\.[^.]+)")
#: Modes with eight bits a channel that convert to RGB unambiguously, and modes with transparency.
_PLAIN, _TRANSPARENT = ("RGB", "L", "P", "1", "CMYK", "YCbCr"), ("RGBA", "LA", "PA")


@dataclass(frozen=True)
class _Numbering:
    """Names of a folder's frames: `count` of them from number `first` on."""

    prefix: str
    digits: int
    ending: str
    first: int
    count: int

    def name(self, index: int) -> str:
        return f"{self.prefix}{self.first + index:0{self.digits}d}{self.ending}"


class Folders:
    """Reads folders of frames as `cast.video.decoders.Decoder` reads files.

    Args:
        short_side: pictures with a longer shorter side are shrunk, see `cast.video.shrink`.
    """

    def __init__(self, short_side: int | None = None) -> None:
        self.short_side = short_side

    def frame_count(self, path: PathLike, threads: int = 0) -> int:
        """Number of pictures in the folder.

        Raises:
            VideoError: there are none, one is missing, or there are pictures of several kinds.
        """
        return _numbering(path).count

    def read(self, path: PathLike, indices: Sequence[int] | np.ndarray, threads: int = 0) -> np.ndarray:
        """The frames `indices` as uint8 RGB `[T, H, W, 3]`, turned as their EXIF data says.

        Grey, CMYK and palette pictures become RGB.

        Raises:
            VideoError: as :meth:`frame_count`; no such frame, a picture that can't be read whole, with more than eight
                bits a channel or with transparency, or pictures of different sizes.
        """
        wanted, numbering = [int(index) for index in indices], _numbering(path)
        bad = [index for index in wanted if not 0 <= index < numbering.count]
        if bad or not wanted:
            asked = f"frame {bad[0]} was asked for" if bad else "no frame was asked for"
            raise video_error(path, f"has frames 0 to {numbering.count - 1}, but {asked}")
        pictures = {
            index: shrink(_picture(path, numbering.name(index)), self.short_side) for index in sorted(set(wanted))
        }
        sizes = {picture.shape: numbering.name(index) for index, picture in pictures.items()}
        if len(sizes) > 1:
            told = " and ".join(f"{name} has {width}x{height}" for (height, width, _), name in sizes.items())
            raise video_error(path, f"has pictures of different sizes ({told} pixels); make them one size")
        return np.stack([pictures[index] for index in wanted])


def is_picture(name: str) -> bool:
    """Whether a file's name has the ending of a picture."""
    return os.path.splitext(name)[1].lower() in PICTURE_ENDINGS


def is_folder_of_frames(path: PathLike) -> bool:
    """Whether a directory has pictures and no videos; False if it can't be listed."""
    try:
        names = _names(path)
    except OSError:
        return False
    return any(map(is_picture, names)) and not any(map(_is_video, names))


def numbered(names: Iterable[str]) -> bool:
    """Whether all pictures among the files are numbered from 0 or 1 on, and there are no videos."""
    shown = [name for name in names if not name.startswith(".")]
    found = [_NAME.fullmatch(name) for name in shown if is_picture(name)]
    numbers = [int(match[2]) for match in found if match]
    return 0 < len(numbers) == len(found) and min(numbers) <= 1 and not any(map(_is_video, shown))


def _is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_ENDINGS


def _names(path: PathLike) -> list[str]:
    return sorted(name for name in os.listdir(path) if not name.startswith("."))


def _numbering(path: PathLike) -> _Numbering:
    try:
        return _read_numbering(os.path.abspath(path), os.stat(path).st_mtime_ns)
    except OSError as error:
        raise video_error(path, f"can't be listed ({error.strerror or error})") from None
    except _Misnumbered as error:
        raise video_error(path, str(error)) from None


class _Misnumbered(Exception):
    """The reason why the pictures of a folder are no video."""


@lru_cache(maxsize=CACHED_FOLDERS)
def _read_numbering(path: str, changed: int) -> _Numbering:
    """The numbering of a folder. `changed`, its time of last change, makes the cache forget an older reading."""
    pictures = list(filter(is_picture, _names(path)))
    if not pictures:
        raise _Misnumbered(f"is a directory without frames: no file in it ends in {', '.join(PICTURE_ENDINGS)}")
    matches = [_NAME.fullmatch(name) for name in pictures]
    if None in matches:
        raise _Misnumbered(f"has {pictures[matches.index(None)]} among its frames, which has no number; remove it")
    kinds: dict[tuple[str, str], list[str]] = {}
    for prefix, number, ending in (match.groups() for match in matches if match):
        kinds.setdefault((prefix, ending), []).append(number)
    kept = {kind: numbers for kind, numbers in kinds.items() if not _FLOW.fullmatch(kind[0])} or kinds
    if len(kept) > 1:
        told = " and ".join(f"{prefix}*{ending}" for prefix, ending in kept)
        raise _Misnumbered(f"has frames of {len(kept)} kinds, {told}; leave one")
    (((prefix, ending), numbers),) = kept.items()
    return _in_sequence(prefix, ending, numbers)


def _in_sequence(prefix: str, ending: str, numbers: list[str]) -> _Numbering:
    values = {int(number): number for number in numbers}
    first = min(values)
    found = _Numbering(prefix, min(map(len, numbers)), ending, first, max(values) - first + 1)
    if first > 1:
        raise _Misnumbered(
            f"begins with {prefix}{values[first]}{ending}; frames count from 0 or 1: are the first ones missing? Else "
            "number them anew"
        )
    if missing := found.count - len(values):
        name = next(found.name(index) for index in range(found.count) if first + index not in values)
        raise _Misnumbered(f"lacks {name}, {missing} of its {found.count} frames are missing; extract them again")
    written = {prefix + number + ending for number in numbers}
    if odd := sorted(written - {found.name(index) for index in range(found.count)}):
        raise _Misnumbered(f"has {odd[0]}, which is not numbered like the other frames; rename it")
    return found


def _picture(folder: PathLike, name: str) -> np.ndarray:
    """A picture as uint8 RGB [H, W, 3]."""
    path = os.path.join(folder, name)
    try:
        with Image.open(path) as picture:
            picture.verify()  # checks PNG's checksums, which `load` ignores
        with Image.open(path) as picture:
            picture.load()
            return np.array(_as_rgb(picture))  # a copy, because PyTorch warns of an array that can't be written
    except Exception as error:  # damaged files raise many types, SyntaxError among them
        said = getattr(error, "strerror", None) or str(error).replace(path, "it")
        reason = " ".join(said.split()) or type(error).__name__
        raise video_error(folder, f"{name} can't be read as a picture ({reason})") from None


def _as_rgb(picture: Any) -> Any:
    if getattr(picture, "n_frames", 1) > 1:
        raise ValueError(f"it holds {picture.n_frames} pictures")
    transparent = picture.mode in _TRANSPARENT or "transparency" in picture.info
    if transparent and picture.convert("RGBA").getextrema()[3][0] < 255:
        raise ValueError("it is transparent in places; save it without an alpha channel")
    if picture.mode not in (*_PLAIN, *_TRANSPARENT):
        raise ValueError(f"its pixels are {picture.mode!r}; save it with eight bits a channel")
    return ImageOps.exif_transpose(picture).convert("RGB")
