"""The learning rate of every optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(peak: float, floor: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The published schedule: from 0 in equal steps to `peak`, then half a cosine to `floor`.

    As in the official code, the first step runs at 0, the last of `warmup_steps` and the next at `peak`, and the last
    step of all ends one cosine step above `floor`.

    Args:
        peak: highest learning rate.
        floor: end of the cosine.
        warmup_steps: optimizer steps of the rise.
        total_steps: optimizer steps of the whole training.

    Returns:
        Step, counted from 0 -> learning rate.

    Raises:
        ValueError: more steps of warm-up than steps in all.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warm-up takes {warmup_steps} of {total_steps} steps; it must be from 0 to all of them")

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * step / max(warmup_steps - 1, 1)
        share = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * share))

    return rate
