"""The loop's counters, and its report about one step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Progress of a training. `history` has one entry per finished epoch: mean loss and accuracies in percent."""

    step: int = 0
    seconds: float = 0.0  # spent in training steps, over all runs
    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)  # of the unfinished epoch


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Args:
        figures: mean loss over the global batch, and accuracy by head in percent if targets are single classes.
        lr: scheduled learning rate, before layer-wise decay.
        grad_norm: length of the whole gradient, before clipping; None if DeepSpeed does not give it.
        clips: of the global batch.
        seconds: from the request for the batch to the end of the step.
        skipped: whether fp16's scaler skipped the step because a gradient overflowed.
    """

    figures: dict[str, float]
    lr: float
    grad_norm: float | None
    clips: int
    seconds: float
    skipped: bool


class DivergenceError(ValueError):
    """The loss or a gradient is NaN or infinite; the weights are those before the step.

    Args:
        message: the event, and advice.
        step: the optimizer step, counted from 0.
        videos: names of the clips in the batches that failed.
    """

    step: int
    videos: list[str]

    def __init__(self, message: str, step: int, videos: list[str]) -> None:
        super().__init__(message)
        self.step, self.videos = step, videos
