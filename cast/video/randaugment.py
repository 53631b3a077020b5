"""RandAugment in timm's notation, as in the published recipe, on whole clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: The highest magnitude; the lowest is 0.
_LEVELS = 10.0
#: Colour of the area that a shift, turn or shear uncovers.
_GREY = 128.0


@dataclass(frozen=True)
class Operation:
    """One operation with its strength: uint8 `[T, 3, H, W]` -> the same shape, equal for all frames."""

    name: str
    strength: float = 0.0

    def __call__(self, video: Tensor) -> Tensor:
        return _OPERATIONS[self.name](video, self.strength)


@dataclass(frozen=True)
class RandAugment:
    """Draws `count` of 15 operations with replacement; executes each with `probability`.

    These are timm's "increasing" operations: a larger magnitude gives a larger change.
    `torchvision.transforms.v2.RandAugment` differs: it has other operations, executes each drawn one, has 31 levels and
    no noise.

    Args:
        magnitude: 0 to 10.
        count: operations drawn for a clip.
        deviation: of the magnitude, which is normally distributed and clipped to 0..10.
        probability: of executing each drawn operation.
    """

    magnitude: float = 10.0
    count: int = 2
    deviation: float = 0.0
    probability: float = 0.5

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """Parse timm's notation: "rand", then "-m" magnitude, "-n" count, "-mstd" deviation, "-p" probability, "-inc1".

        Raises:
            ValueError: the text is something else.
        """
        fields = {"m": "magnitude", "n": "count", "mstd": "deviation", "p": "probability"}
        head, *parts = text.split("-")
        values: dict[str, float] = {}
        increasing = False
        for part in parts:
            letters = part.rstrip("0123456789.")
            try:
                number = float(part[len(letters) :])
            except ValueError:
                number = float("nan")
            if letters == "inc" and number == 1:
                increasing = True
            elif letters in fields and number >= 0 and (letters != "n" or number == int(number) >= 1):
                values[fields[letters]] = number
            else:
                raise ValueError(f"randaugment is {text!r}: can't read {part!r}; {_USAGE}")
        if head != "rand" or not increasing:
            raise ValueError(f"randaugment is {text!r}: it must begin with 'rand' and contain 'inc1'; {_USAGE}")
        if max(values.get("magnitude", 0), values.get("deviation", 0)) > _LEVELS or values.get("probability", 0) > 1:
            raise ValueError(f"randaugment is {text!r}: m and mstd must be at most 10, p at most 1; {_USAGE}")
        count = int(values.pop("count", cls.count))
        return cls(count=count, **values)

    def draw(self, rng: np.random.Generator) -> tuple[Operation, ...]:
        """The operations of one clip, in order, with strengths and signs."""
        operations = []
        for index in rng.integers(len(_STRENGTHS), size=self.count):
            name = list(_STRENGTHS)[index]
            level = float(np.clip(rng.normal(self.magnitude, self.deviation), 0.0, _LEVELS)) / _LEVELS
            sign = 1.0 if rng.random() < 0.5 else -1.0
            if rng.random() < self.probability:
                operations.append(Operation(name, _STRENGTHS[name](level, sign)))
        return tuple(operations)


_USAGE = "write for example rand-m7-n4-mstd0.5-inc1"

#: Operation -> its strength, from the level (0 to 1) and a random sign.
_STRENGTHS: Mapping[str, Callable[[float, float], float]] = {
    "autocontrast": lambda level, sign: 0.0,
    "equalize": lambda level, sign: 0.0,
    "invert": lambda level, sign: 0.0,
    "rotate": lambda level, sign: sign * level * 30,  # degrees
    "posterize": lambda level, sign: 4 - int(level * 4),  # bits kept
    "solarize": lambda level, sign: 256 - int(level * 256),  # inverted from this value upwards
    "solarize_add": lambda level, sign: int(level * 110),  # added to the dark half
    "color": lambda level, sign: 1 + sign * level * 0.9,
    "contrast": lambda level, sign: 1 + sign * level * 0.9,
    "brightness": lambda level, sign: 1 + sign * level * 0.9,
    "sharpness": lambda level, sign: 1 + sign * level * 0.9,
    "shear_x": lambda level, sign: sign * level * 0.3,
    "shear_y": lambda level, sign: sign * level * 0.3,
    "translate_x": lambda level, sign: sign * level * 0.45,  # of the width
    "translate_y": lambda level, sign: sign * level * 0.45,  # of the height
}


def _functional(name: str, *, strength: bool) -> Callable[[Tensor, float], Tensor]:
    def run(video: Tensor, value: float) -> Tensor:
        from torchvision.transforms.v2 import functional

        return getattr(functional, name)(video, value) if strength else getattr(functional, name)(video)

    return run


def _posterize(video: Tensor, bits: float) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.posterize(video, int(bits)) if bits else torch.zeros_like(video)


def _solarize(video: Tensor, threshold: float) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.solarize(video, threshold) if threshold < 256 else video


def _solarize_add(video: Tensor, amount: float) -> Tensor:
    return torch.where(video < 128, (video.short() + int(amount)).clamp(max=255).to(torch.uint8), video)


def _warp(video: Tensor, matrix: list[list[float]]) -> Tensor:
    """The output at pixel p = (x, y, 1), in pixels from the top left corner, is the input at `matrix` p.

    Bicubic. The area outside of the picture is grey, without a blurred edge. torchvision's own warps of tensors have no
    bicubic interpolation.
    """
    frames, _, height, width = video.shape
    size = torch.tensor([width, height], dtype=torch.float32, device=video.device)
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32, device=video.device) + 0.5,
        torch.arange(width, dtype=torch.float32, device=video.device) + 0.5,
        indexing="ij",
    )
    points = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.tensor(matrix, device=video.device).T
    inside = ((points >= 0) & (points < size)).all(-1)
    # All frames are channels of one picture, so that the sample points are computed once.
    flat = video.reshape(1, frames * 3, height, width).float()
    grid = (points * 2 / size - 1)[None]
    flat = torch.nn.functional.grid_sample(flat, grid, mode="bicubic", padding_mode="border", align_corners=False)
    flat = torch.where(inside, flat.round().clamp(0, 255), _GREY)
    return flat.to(torch.uint8).reshape(video.shape)


def _rotate(video: Tensor, degrees: float) -> Tensor:
    height, width = video.shape[-2:]
    angle = np.deg2rad(degrees)  # counter-clockwise
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    cx, cy = width / 2, height / 2
    return _warp(video, [[cos, -sin, cx - cos * cx + sin * cy], [sin, cos, cy - sin * cx - cos * cy]])


_OPERATIONS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "autocontrast": _functional("autocontrast", strength=False),
    "equalize": _functional("equalize", strength=False),
    "invert": _functional("invert", strength=False),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _functional("adjust_saturation", strength=True),
    "contrast": _functional("adjust_contrast", strength=True),
    "brightness": _functional("adjust_brightness", strength=True),
    "sharpness": _functional("adjust_sharpness", strength=True),
    "shear_x": lambda video, factor: _warp(video, [[1, factor, 0], [0, 1, 0]]),
    "shear_y": lambda video, factor: _warp(video, [[1, 0, 0], [factor, 1, 0]]),
    "translate_x": lambda video, share: _warp(video, [[1, 0, share * video.shape[-1]], [0, 1, 0]]),
    "translate_y": lambda video, share: _warp(video, [[1, 0, 0], [0, 1, share * video.shape[-2]]]),
}
