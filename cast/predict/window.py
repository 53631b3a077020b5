"""A sliding window over a stream of pictures."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from cast.video.shrink import shrink
from cast.video.transforms import view_transform
from cast.video.views import Protocol


class Window:
    """The last pictures of a stream, at the model's size, so that any camera's window needs little memory.

    Args:
        protocol: sampling, frames and size of a clip.
        every: pictures from one clip to the next.
        window: last pictures from which a clip is sampled.

    Raises:
        ValueError: `every` or `window` is below 1.
    """

    protocol: Protocol
    every: int

    def __init__(self, protocol: Protocol, every: int, window: int) -> None:
        for name, value in (("every", every), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1 frame")
        self.protocol, self.every = protocol.centre(), every
        self._pictures: deque[Tensor] = deque(maxlen=window)
        self._transform = view_transform(protocol.size, normalise=False)

    def clips(self, frames: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, int, int]]:
        """Clips uint8 [3, T, S, S], each with the numbers of its window's first and last picture.

        Raises:
            ValueError, TypeError: a picture of another shape or type, or none at all.
        """
        seen, told = 0, 0
        for frame in frames:
            self._pictures.append(self._picture(frame, seen))
            seen += 1
            if seen >= (told + self.every if told else self._pictures.maxlen or 1):
                told = seen
                yield self._clip(), seen - len(self._pictures), seen - 1
        if not seen:
            raise ValueError("the stream ended before its first frame")
        if told < seen:
            yield self._clip(), seen - len(self._pictures), seen - 1

    def _picture(self, frame: np.ndarray, number: int) -> Tensor:
        if not isinstance(frame, np.ndarray):
            raise TypeError(f"frame {number} came as {type(frame).__name__}; give arrays, uint8 RGB [H, W, 3]")
        if frame.dtype != np.uint8:
            raise TypeError(f"frame {number} is {frame.dtype}; give uint8 from 0 to 255")
        if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise ValueError(f"frame {number} has shape {list(frame.shape)}; give RGB pictures [H, W, 3]")
        frame = shrink(np.ascontiguousarray(frame), self.protocol.short_side)
        picture = torch.from_numpy(frame).permute(2, 0, 1)[None]
        small: Tensor = self._transform(picture)
        return small[0]

    def _clip(self) -> Tensor:
        chosen = self.protocol.indices(len(self._pictures))[0]
        return torch.stack([self._pictures[index] for index in chosen], dim=1)
