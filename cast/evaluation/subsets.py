"""EPIC-Kitchens-100's hard videos: those of participants without a training video, and those of rare classes.

The organisers' annotations (github.com/epic-kitchens/epic-kitchens-100-annotations) list the participants, column
`participant_id`, separately for validation and test. They also list the numbers of rare verbs, column `verb`, and rare
nouns, column `noun`. As in their challenge, a rare action has a rare verb or a rare noun.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cast.video.annotations import Sample

UNSEEN = {
    "val": "EPIC_100_unseen_participant_ids_validation.csv",
    "test": "EPIC_100_unseen_participant_ids_test.csv",
}
TAIL = {"verb": "EPIC_100_tail_verbs.csv", "noun": "EPIC_100_tail_nouns.csv"}


def read_subsets(
    directory: Path, split: str, samples: Sequence[Sample], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """The subsets of videos that the organisers' files in a directory define.

    Args:
        directory: of the data set.
        split: train, val or test.
        samples: its videos.
        counts: head -> classes.

    Returns:
        `unseen_verb`, `tail_noun` and so on, each subset with the task -> bool [samples]. Empty subsets are omitted.
        The
            result is empty without labels, or without verbs and nouns.

    Raises:
        ValueError: a file without its column, a rare class that is no number of a class, or a list of participants and
            a video whose name does not begin with a participant.
    """
    if not ({"verb", "noun"} <= counts.keys() and all(sample.labels for sample in samples)):
        return {}
    found: dict[str, Tensor] = {}
    participants = _column(directory / UNSEEN[split], "participant_id") if split in UNSEEN else None
    if participants is not None:
        unseen = torch.tensor([_participant(sample.path) in participants for sample in samples])
        found |= {f"unseen_{task}": unseen for task in ("verb", "noun", "action")}
    for head, name in TAIL.items():
        words = _column(directory / name, head)
        if words is not None:
            rare = _classes(directory / name, words, counts[head])
            found[f"tail_{head}"] = torch.tensor([sample.labels[head] in rare for sample in samples])
    if {"tail_verb", "tail_noun"} <= found.keys():
        found["tail_action"] = found["tail_verb"] | found["tail_noun"]
    return {name: videos for name, videos in found.items() if bool(videos.any())}


def meanings(subsets: Mapping[str, Tensor]) -> dict[str, str]:
    """The meaning of each subset's accuracy."""
    whose = {
        "unseen": "participants who are not in the training set",
        "tail_verb": "rare verbs",
        "tail_noun": "rare nouns",
        "tail_action": "actions with a rare verb or a rare noun",
    }
    return {
        f"{name}_top1": f"the same for the {int(videos.sum()):,} videos of "
        f"{whose.get(name) or whose['unseen']} (EPIC-Kitchens-100's lists)"
        for name, videos in subsets.items()
    }


def _classes(path: Path, words: Sequence[str], count: int) -> set[int]:
    wrong = [word for word in words if not (word.isascii() and word.isdigit() and int(word) < count)]
    if wrong:
        raise ValueError(f"{path}: lists class {wrong[0]!r}, and the data set's are 0 to {count - 1}; remove the file")
    return set(map(int, words))


def _participant(path: Path) -> str:
    """The participant P01 of P01_101_12.mp4, which is the number of a narration."""
    found = re.match(r"(P\d+)_", path.name)
    if found is None:
        raise ValueError(
            f"{path}: no participant in the name. With a list of unseen participants in the data set, files are called "
            "<narration_id>.mp4, as P01_101_12.mp4; rename them or remove the list"
        )
    return found[1]


def _column(path: Path, name: str) -> list[str] | None:
    """A column's words; None if there is no such file."""
    if not path.is_file():
        return None
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), skipinitialspace=True))
    if not rows or name not in rows[0]:
        raise ValueError(f"{path}: must have a header with {name!r} and a line for each; take the organisers' file")
    return [row[name].strip() for row in rows]
