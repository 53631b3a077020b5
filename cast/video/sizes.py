"""Which videos of a data set are so large that reading them takes most of the time, and how to make them smaller."""

from __future__ import annotations

from collections.abc import Mapping

from cast.ground.files import printable

#: A shorter side of more pixels is large: 720p and more. Published sets are prepared at 240 to 320.
LARGE = 480
#: What the command makes of it where the recipe names no short side.
_USUAL = 320


def about_sizes(sizes: Mapping[str, tuple[int, int]], short_side: int | None) -> list[str]:
    """Lines about the large ones among some videos; none if there are none.

    Args:
        sizes: file -> width and height of its pictures as they are shown.
        short_side: the recipe's `data.short_side`.
    """
    large = {path: size for path, size in sizes.items() if min(size) > LARGE}
    if not large:
        return []
    name, (width, height) = max(large.items(), key=lambda item: min(item[1]))
    then = (
        f"training shrinks their pictures to {short_side} when it has decoded them (data.short_side)"
        if short_side is not None
        else "data.short_side is null, so training augments their pictures as they are, which takes many times as "
        "long and as much memory"
    )
    return [
        f"{len(large)} of {len(sizes)} videos have a shorter side of more than {LARGE} pixels, up to {width} x "
        f"{height} ({printable(name)}): {then}. To shrink a file once and for all:",
        f"  {command(short_side or _USUAL)}",
    ]


def scale(short_side: int) -> str:
    """FFmpeg's filter that gives pictures this shorter side, the longer one even, as encoders want it."""
    return f"scale=w='if(gt(iw,ih),-2,{short_side})':h='if(gt(iw,ih),{short_side},-2)'"


def command(short_side: int) -> str:
    """What makes a file with this shorter side; FFmpeg turns and mirrors pictures before it scales them."""
    return f'ffmpeg -i LARGE.mp4 -vf "{scale(short_side)}" -c:a copy SMALL.mp4'
