"""Published results for the balanced-understanding plot: CAST's paper, table 2, out of `cast/metrics/published.yaml`.

The paper's figure 4 draws these figures: (a) EPIC-Kitchens-100, noun against verb accuracy; (b) Kinetics-400 against
Something-Something V2. For some methods (CLIP, AIM, EVL, Video Swin, ORViT) tables 9 to 11 of the same paper print
other figures; these are table 2's. Methods without both figures are omitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cast.ground.renamed import renamed
from cast.metrics.published import read_published

#: Source of the figures, as the plot's note names it.
SOURCE = "arXiv 2311.18825, table 2"


@dataclass(frozen=True)
class PublishedResult:
    """A method's top-1 accuracies in percent: on the spatial task (nouns or K400), and on the temporal one."""

    method: str
    space: float
    time: float


def _points(space: str, time: str) -> tuple[PublishedResult, ...]:
    """Every method that has a figure in both columns, without the star that marks the authors' own run."""
    table = read_published()["headline"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    both = [row for row in rows if row[space] is not None and row[time] is not None]
    return tuple(PublishedResult(row["method"].rstrip("*"), float(row[space]), float(row[time])) for row in both)


EK100 = _points("noun", "verb")
#: Kinetics-400, Something-Something V2
K400_SSV2 = _points("k400", "ssv2")


def dataset_name(classes: Mapping[str, int]) -> str | None:
    """`EK100`, `SSV2` or `K400` if the numbers of classes are theirs; nothing else is compared."""
    known = {"EK100": {"verb": 97, "noun": 300}, "SSV2": {"action": 174}, "K400": {"action": 400}}
    return next((name for name, counts in known.items() if counts == dict(classes)), None)


__getattr__: Callable[[str], object] = renamed(__name__, {"Published": "PublishedResult"})
