"""The contents of a clip of the demo's data set, and their drawing: handwritten digits that act on a photograph.

A *crowded* scene has three things, each in its own quarter of the frame:

- the **actor**, a real digit that performs the verb: the clip's verb and noun are its own;
- the **bystander**, another real digit, frozen in a random moment of a random verb;
- the **decoy**, a digit cut into four tiles that changed places, which performs its own verb.

One frame does not show which digit is the actor, because a bystander may look like any moment of an actor. Motion alone
does not show whose verb counts. The noun needs several moments; the verb needs to see which digit moves. Bystander and
decoy are drawn independently of the labels. A *plain* scene has only the actor.

All drawing is element-wise arithmetic on a generator seeded by (seed, split, index). A clip does not depend on the
other clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from cast.ground.optional import require

VERBS = (
    "move_left",
    "move_right",
    "move_up",
    "move_down",
    "grow",
    "shrink",
    "rotate_cw",
    "rotate_ccw",
    "appear",
    "disappear",
    "open",
    "close",
)
NOUNS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

#: Frames of a clip: two for each of the 16 that a model sees, so that training can draw one of every two.
FRAMES = 32
#: Height and width of a frame in pixels.
SIZE = 64
#: Scans (of scikit-learn's 1797) from here on occur only in validation.
FIRST_VALIDATION_SCAN = 1300

Split = Literal["plain", "train", "val"]
SPLITS: tuple[Split, ...] = ("plain", "train", "val")
_STILLS = len(SPLITS)

_SHUTTER = (70, 60, 50)
#: Distance of a quarter's centre from the frame's edge, over the frame's size.
_QUARTER = 0.26
#: Side of a thing's square over the frame's size: a quarter with a margin.
_WINDOW = 0.52


@dataclass(frozen=True)
class Classes:
    """The verbs and nouns of a set, by name. A clip's label is an index. Verbs come in pairs."""

    verbs: tuple[str, ...] = VERBS
    nouns: tuple[str, ...] = NOUNS

    def names(self) -> dict[str, list[str]]:
        """Class names by head."""
        return {"verb": list(self.verbs), "noun": list(self.nouns)}

    def heads(self) -> dict[str, int]:
        """Number of classes by head."""
        return {head: len(names) for head, names in self.names().items()}


#: All verbs and nouns.
ALL = Classes()


@dataclass(frozen=True)
class Thing:
    """One glyph and its action."""

    scan: int
    tiles: tuple[int, ...]  # new place of each of the scan's four tiles; (0, 1, 2, 3) leaves it whole
    verb: int  # number in VERBS
    progress: np.ndarray  # [FRAMES], 0 before to 1 after; constant for a bystander
    quarter: int


@dataclass(frozen=True)
class Scene:
    """A clip's labels and contents; `actor` is `things[0]`, then bystander and decoy if it is crowded."""

    verb: int
    noun: int
    things: tuple[Thing, ...]


def plan(seed: int, split: Split, index: int, classes: Classes = ALL) -> tuple[Scene, np.random.Generator]:
    """The scene of one clip, and the generator for the rest of it. Labels cycle through all pairs."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    noun, verb = index % len(classes.nouns), index // len(classes.nouns) % len(classes.verbs)
    scans, own = _scans(split, classes.nouns), _scans(split, classes.nouns[noun : noun + 1])
    quarters = rng.permutation(4)
    acted = VERBS.index(classes.verbs[verb])
    things = [Thing(_pick(rng, own), (0, 1, 2, 3), acted, _course(rng), int(quarters[0]))]
    if split != "plain":
        frozen = np.full(FRAMES, _course(rng)[rng.integers(FRAMES)])
        things.append(Thing(_pick(rng, scans), (0, 1, 2, 3), _any_verb(rng, classes), frozen, int(quarters[1])))
        things.append(_decoy(rng, scans, int(quarters[2]), classes))
    return Scene(verb, noun, tuple(things)), rng


def render(seed: int, split: Split, index: int, classes: Classes = ALL) -> np.ndarray:
    """One clip, uint8 [FRAMES, SIZE, SIZE, 3]."""
    scene, rng = plan(seed, split, index, classes)
    canvas = np.repeat(_background(rng)[None], FRAMES, axis=0)
    for number in rng.permutation(len(scene.things)):
        _draw(canvas, rng, scene.things[number])
    return canvas.round().clip(0, 255).astype(np.uint8)


def render_still(seed: int, index: int, classes: Classes = ALL) -> tuple[np.ndarray, int]:
    """One picture with a digit, in half of them also a decoy: uint8 [SIZE, SIZE, 3], and the noun.

    For the spatial expert, which learns nouns from single frames. The scans are those of the training clips.
    """
    rng = np.random.default_rng([seed, _STILLS, index])
    noun, quarters = index % len(classes.nouns), rng.permutation(4)
    own = _scans("train", classes.nouns[noun : noun + 1])
    things = [Thing(_pick(rng, own), (0, 1, 2, 3), _any_verb(rng, classes), _course(rng), int(quarters[0]))]
    if rng.random() < 0.5:
        things.append(_decoy(rng, _scans("train", classes.nouns), int(quarters[1]), classes))
    canvas = _background(rng)[None]
    for thing in things:
        moment = thing.progress[[rng.integers(FRAMES)]]
        _draw(canvas, rng, Thing(thing.scan, thing.tiles, thing.verb, moment, thing.quarter))
    return canvas[0].round().clip(0, 255).astype(np.uint8), noun


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Scans uint8 [1797, 8, 8] and their classes [1797]."""
    digits = require("sklearn.datasets", "demo").load_digits()
    return (digits.images * (255 / 16)).round().astype(np.uint8), digits.target


@cache
def _photos() -> tuple[np.ndarray, ...]:
    return tuple(require("sklearn.datasets", "demo").load_sample_images().images)


@cache
def _scans(split: Split, nouns: tuple[str, ...]) -> np.ndarray:
    """The scans of these digits that a split may use."""
    classes = _digits()[1]
    places = np.arange(FIRST_VALIDATION_SCAN, len(classes)) if split == "val" else np.arange(FIRST_VALIDATION_SCAN)
    return places[np.isin(classes[places], [NOUNS.index(noun) for noun in nouns])]


def _pick(rng: np.random.Generator, scans: np.ndarray) -> int:
    return int(rng.choice(scans))


def _any_verb(rng: np.random.Generator, classes: Classes) -> int:
    return VERBS.index(classes.verbs[rng.integers(len(classes.verbs))])


def _decoy(rng: np.random.Generator, scans: np.ndarray, quarter: int, classes: Classes) -> Thing:
    while True:
        tiles = rng.permutation(4)
        if (tiles != np.arange(4)).all():
            return Thing(_pick(rng, scans), tuple(tiles.tolist()), _any_verb(rng, classes), _course(rng), quarter)


def _course(rng: np.random.Generator) -> np.ndarray:
    """Progress of the verb in each frame: a smooth step from 0 to 1 that takes 60 to 100 % of the clip."""
    duration = rng.uniform(0.6, 1)
    start = rng.uniform(0, 1 - duration)
    u = np.clip((np.linspace(0, 1, FRAMES) - start) / duration, 0, 1)
    return u * u * (3 - 2 * u)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A darkened random crop of a random photograph, float32 [SIZE, SIZE, 3]."""
    image = require("PIL.Image", "demo")
    photo = _photos()[rng.integers(2)]
    side = int(rng.integers(SIZE, 3 * SIZE))
    top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
    crop = image.fromarray(photo[top : top + side, left : left + side]).resize((SIZE, SIZE), image.BILINEAR)
    return np.asarray(crop, np.float32) * np.float32(0.55)


def _draw(canvas: np.ndarray, rng: np.random.Generator, thing: Thing) -> None:
    """Draw a thing into all frames, in place. The second verb of a pair is the first one in reverse."""
    tint = rng.uniform(150, 255, 3).astype(np.float32)
    size, base, reach = rng.uniform(0.29, 0.35) * SIZE, rng.uniform(-12, 12), rng.uniform(0.08, 0.12) * SIZE
    centre = [(_QUARTER + (1 - 2 * _QUARTER) * side + rng.uniform(-0.02, 0.02)) * SIZE for side in _place(thing)]
    side = round(_WINDOW * SIZE)
    corner = [round(c) - side // 2 for c in centre]
    glyph = _Glyph(thing, side)
    pair, backwards = divmod(thing.verb, 2)
    for frame, u in zip(canvas, thing.progress[::-1] if backwards else thing.progress, strict=True):
        (x, y), span, angle, alpha = centre, size, base, 1.0
        if pair == 0:
            x += reach * (1 - 2 * u)
        elif pair == 1:
            y += reach * (1 - 2 * u)
        elif pair == 2:
            span *= 0.5 + 0.7 * u
        elif pair == 3:
            angle += 50 - 100 * u
        elif pair == 4:
            alpha = u
        _blend(frame, glyph.at(x - corner[0], y - corner[1], span, angle) * np.float32(alpha), corner, tint)
        if pair == 5:
            _shut(frame, x - span / 2, y - span / 2, (1 - u) * span, span)


def _place(thing: Thing) -> tuple[int, int]:
    row, column = divmod(thing.quarter, 2)
    return column, row


class _Glyph:
    """A scan that can be drawn at any place, size and angle."""

    def __init__(self, thing: Thing, side: int) -> None:
        self.image = require("PIL.Image", "demo")
        scan = _digits()[0][thing.scan]
        tiles = scan.reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 4, 4)[list(thing.tiles)]
        # A border of zeros: bicubic interpolation reaches two pixels beyond the scan.
        padded = np.pad(tiles.reshape(2, 2, 4, 4).swapaxes(1, 2).reshape(8, 8), 2)
        self.source, self.side = self.image.fromarray(padded), side
        self.last: tuple[tuple[float, ...], np.ndarray] | None = None

    def at(self, x: float, y: float, span: float, angle: float) -> np.ndarray:
        """Opacity float32 [side, side, 1], the scan centred at (x, y), `span` wide, turned by `angle` degrees."""
        if self.last is None or self.last[0] != (x, y, span, angle):
            c, s = np.cos(np.deg2rad(angle)) * 8 / span, np.sin(np.deg2rad(angle)) * 8 / span
            matrix = (c, -s, 6 - c * x + s * y, s, c, 6 - s * x - c * y)
            drawn = self.source.transform((self.side, self.side), self.image.AFFINE, matrix, self.image.BICUBIC)
            self.last = (x, y, span, angle), np.asarray(drawn, np.float32)[:, :, None] / np.float32(255)
        return self.last[1]


def _blend(frame: np.ndarray, opacity: np.ndarray, corner: list[int], tint: np.ndarray) -> None:
    left, top = (max(c, 0) for c in corner)
    right, bottom = (min(c + len(opacity), SIZE) for c in corner)
    part = opacity[top - corner[1] : bottom - corner[1], left - corner[0] : right - corner[0]]
    region = frame[top:bottom, left:right]
    region += part * (tint - region)


def _shut(frame: np.ndarray, left: float, top: float, width: float, height: float) -> None:
    """Draw an opaque shutter."""
    x0, x1, y0, y1 = (max(round(v), 0) for v in (left, left + width, top, top + height))
    frame[y0:y1, x0:x1] = _SHUTTER
