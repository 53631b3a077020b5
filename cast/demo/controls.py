"""Linear probes: the demo's labels do not leak, and the frames contain what is needed to answer them.

Each probe is standardisation, principal components and logistic regression on grey pixels. Without the order of frames,
a probe must guess the direction of a verb like a coin flip. Given the actor's place, ordered frames carry the verb;
without the place a probe finds less of it. Probes at the place of the decoy or the bystander must stay at chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cast.demo.clips import CachedClips
from cast.demo.dataset import read_scenes
from cast.demo.scene import FRAMES, Classes
from cast.ground.optional import require


def chance(classes: Classes) -> dict[str, float]:
    """The accuracy of guessing, in percent."""
    verbs, nouns = len(classes.verbs), len(classes.nouns)
    return {"verb": 100 / verbs, "pair": 200 / verbs, "noun": 100 / nouns, "direction": 50.0}


Features = Callable[[np.ndarray], np.ndarray]  # [clips, frames, H, W] -> [clips, features]


def one_frame(pixels: np.ndarray) -> np.ndarray:
    """The middle frame."""
    return pixels[:, pixels.shape[1] // 2].reshape(len(pixels), -1)


def order_free(pixels: np.ndarray) -> np.ndarray:
    """Mean, deviation, minimum, maximum of each pixel, which do not depend on the order of frames."""
    parts = [pixels.mean(1), pixels.std(1), pixels.min(1), pixels.max(1)]
    return np.concatenate([part.reshape(len(pixels), -1) for part in parts], axis=1)


def ordered_frames(pixels: np.ndarray) -> np.ndarray:
    """Every fourth frame minus the clip's mean: motion, in order."""
    return (pixels - pixels.mean(1, keepdims=True))[:, ::4].reshape(len(pixels), -1)


FEATURES: dict[str, Features] = {
    "one frame": one_frame,
    "order-free statistics": order_free,
    "ordered frames": ordered_frames,
}


#: The region of a probe: the whole frame, or the quarter of one of the things.
PLACES = ("whole frame", "actor", "decoy", "bystander")


@dataclass(frozen=True)
class Control:
    """One probe's validation accuracies in percent: verb, pair (the verb without its direction), direction, noun."""

    where: str  # "whole frame", or the thing whose quarter is used
    features: str
    accuracy: Mapping[str, float]


def controls(
    train: CachedClips,
    val: CachedClips,
    directory: Any,
    places: Sequence[str] = PLACES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Control]:
    """All probes, trained on `train`, measured on `val`; `progress` gets the numbers of finished and of all probes.

    `direction` is the share with the right verb among clips with the right pair: a coin flip without order.
    """
    scenes = read_scenes(directory)
    grey = {name: clips.pixels.float().mean(2).numpy() for name, clips in (("train", train), ("val", val))}
    results = []
    for where in places:
        views = {
            name: grey[name] if where == "whole frame" else _quarters(grey[name], clips, scenes, where)
            for name, clips in (("train", train), ("val", val))
        }
        for name, features in FEATURES.items():
            x, y = features(views["train"]), features(views["val"])
            answers = probe(x, {head: train.labels[head].numpy() for head in ("verb", "noun")}, y)
            truths = {head: val.labels[head].numpy() for head in answers}
            results.append(Control(where, name, _accuracy(answers, truths)))
            progress(len(results), len(places) * len(FEATURES))
    return results


def shared_scans(directory: Any) -> set[int]:
    """Digit scans that occur both in training (also of experts) and in validation."""
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for name, things in read_scenes(directory).items():
        seen[name.startswith("val_")].update(int(thing["scan"]) for thing in things.values())
    return seen[True] & seen[False]


def _quarters(pixels: np.ndarray, clips: CachedClips, scenes: Any, role: str) -> np.ndarray:
    """The quarter of the frame with a thing in it, [clips, frames, H/2, W/2]."""
    height, width = (side // 2 for side in pixels.shape[2:])
    cut = np.empty((*pixels.shape[:2], height, width), pixels.dtype)
    for number, sample in enumerate(clips.samples):
        row, column = divmod(scenes[sample.path.stem][role]["quarter"], 2)
        part = pixels[number, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
        cut[number] = part
    return cut


def probe(train: np.ndarray, labels: Mapping[str, np.ndarray], val: np.ndarray) -> dict[str, np.ndarray]:
    """Predicted labels [clips] of `val` by head; all heads use the same components."""
    scaler = require("sklearn.preprocessing", "demo").StandardScaler()
    components = require("sklearn.decomposition", "demo").PCA(120, svd_solver="randomized", random_state=0)
    regression = require("sklearn.linear_model", "demo").LogisticRegression
    x = components.fit_transform(scaler.fit_transform(train))
    y = components.transform(scaler.transform(val))
    return {head: regression(C=0.03, max_iter=2000).fit(x, truth).predict(y) for head, truth in labels.items()}


def widths(side: int, where: str) -> int:
    """Number of columns of all features at one place together; `side` is a frame's in pixels."""
    pixels = np.zeros((1, FRAMES, *[side if where == "whole frame" else side // 2] * 2), np.float32)
    return sum(features(pixels).shape[1] for features in FEATURES.values())


def _accuracy(answers: Mapping[str, np.ndarray], truths: Mapping[str, np.ndarray]) -> dict[str, float]:
    verb = answers["verb"] == truths["verb"]
    pair = answers["verb"] // 2 == truths["verb"] // 2
    noun = answers["noun"] == truths["noun"]
    direction = verb.sum() / max(pair.sum(), 1)
    return {
        "verb": 100 * float(verb.mean()),
        "pair": 100 * float(pair.mean()),
        "direction": 100 * float(direction),
        "noun": 100 * float(noun.mean()),
    }
