"""A small data set of videos that say their own number, a small model for it, and predictions without either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from cast_models import randomise
from video_files import write_video

import cast
from cast.evaluation import Predictions

CLASSES = {
    "verb": ["open", "close", "cut", "wash", "put", "take"],
    "noun": ["door", "tap", "<b>onion</b>", "cup", "pan"],
}
COUNTS = {head: len(names) for head, names in CLASSES.items()}


def write_dataset(root: Path, count: int = 7) -> Path:
    """`count` videos of 20 and more frames in the layout of EPIC-Kitchens-100, with class names."""
    (root / "val").mkdir(parents=True)
    lines = []
    for number in range(count):
        write_video(root / "val" / f"clip_{number}.mp4", count=20 + 3 * number)
        lines.append(f"clip_{number},{number % 6},{(number * 2) % 5}\n")
    (root / "val.csv").write_text("".join(lines))
    (root / "classes.json").write_text(json.dumps(CLASSES))
    return root


def small_cast(**overrides: Any) -> cast.CAST:
    """A randomised float32 CAST of 2 blocks for clips of 16 frames at 16 pixels, in evaluation mode."""
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "heads": COUNTS}
    return randomise(cast.CAST(**(sizes | overrides)), 0).eval()  # type: ignore[return-value]


def predictions(
    seed: int = 0, samples: int = 40, counts: dict[str, int] | None = None, names: Any = None, skill: float = 2.0
) -> Predictions:
    """Random answers; the right class has `skill` more in its logits."""
    counts = counts or COUNTS
    generator, truth = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    labels = {head: torch.randint(count, (samples,), generator=truth) for head, count in counts.items()}
    probabilities = {}
    for head, count in counts.items():
        logits = torch.randn(samples, count, generator=generator)
        logits[torch.arange(samples), labels[head]] += skill
        probabilities[head] = logits.softmax(-1)
    views = {head: torch.randint(count, (samples, 6), generator=generator) for head, count in counts.items()}
    names = names or {
        head: CLASSES[head] if counts == COUNTS else [f"{head} {index}" for index in range(count)]
        for head, count in counts.items()
    }
    videos = [f"P01_{number}.mp4" for number in range(samples)]
    return Predictions(videos, probabilities, labels, views, names, {"checkpoint": f"seed {seed}"})
