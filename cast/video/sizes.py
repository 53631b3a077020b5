"""Find videos so large that reading them takes most of the time, and give a command that shrinks them."""

from __future__ import annotations

from collections.abc import Mapping

from cast.ground.files import printable

#: A shorter side of more pixels is large: 720p and more. Published sets have 240 to 320.
LARGE = 480
#: The short side in the command if the recipe names none.
_USUAL = 320


def about_sizes(sizes: Mapping[str, tuple[int, int]], short_side: int | None) -> list[str]:
    """Lines about the large videos among some; empty if there are none.

    Args:
        sizes: file -> width and height of its pictures, upright.
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
    """FFmpeg's filter to this shorter side. The longer side is even, because encoders require it."""
    return f"scale=w='if(gt(iw,ih),-2,{short_side})':h='if(gt(iw,ih),{short_side},-2)'"


def command(short_side: int) -> str:
    """The command that makes a file with this shorter side. FFmpeg turns and mirrors pictures before it scales them."""
    return f'ffmpeg -i LARGE.mp4 -vf "{scale(short_side)}" -c:a copy SMALL.mp4'
