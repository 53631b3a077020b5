"""Comparison of two models on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Paired:
    """Two models' hits on the same samples.

    `won` counts samples that only the first model got right, `lost` those of the second. `p_value` is McNemar's exact
    test, two-sided: the probability of so uneven a split if both models were equally good.
    """

    won: int
    lost: int
    p_value: float


def paired_hits(ours: Tensor, theirs: Tensor) -> Paired:
    """Compare two models' hits, bool [samples] each.

    Raises:
        ValueError: the numbers of samples differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} samples cannot be compared with {len(theirs)}; they must be the same")
    won, lost = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    return Paired(won, lost, _binomial_two_sided(min(won, lost), won + lost))


def _binomial_two_sided(fewer: int, total: int) -> float:
    """P(at most `fewer` or at least `total - fewer` heads) in `total` tosses of a fair coin."""
    if not total:
        return 1.0
    # In logarithms, because 0.5 ** 2000 is 0 in a double.
    tails = [_log_choose(total, heads) - total * math.log(2) for heads in range(fewer + 1)]
    highest = max(tails)
    return min(1.0, 2 * math.exp(highest) * math.fsum(math.exp(term - highest) for term in tails))


def _log_choose(total: int, chosen: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a percentage (Wilson's score interval), for another sample of videos.

    Raises:
        ValueError: `total` is below 1, or `hits` is not from 0 to `total`.
    """
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(f"{hits} hits of {total} samples; there must be a sample, and 0 to all of them hits")
    z, share = 1.959963984540054, hits / total  # the standard normal distribution's 97.5 % point
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 100 / (1 + z * z / total)
    return max(0.0, scale * (centre - spread)), min(100.0, scale * (centre + spread))
