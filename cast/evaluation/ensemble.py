"""One checkpoint, or several whose probabilities are averaged (the paper's Table 1(a), "Ensemble of experts")."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cast.baselines import Ensemble
from cast.config import CASTConfig
from cast.evaluation.checkpoint import PREDICTIONS, Checkpoint, load_checkpoint
from cast.files import printable
from cast.labels import numbers
from cast.sampling import Sampling

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Loaded:
    """What is tested: a model, its sizes and heads, class names and sampling where known, and where it came from.

    `short_side` is the one that the training shrank larger pictures to, None if it did not.
    `about` goes into the predictions' file: `model`, `checkpoint` and `sha256`, of an ensemble lists of the latter two
    and `members`.
    """

    model: nn.Module
    config: CASTConfig
    classes: dict[str, list[str]] | None
    sampling: Sampling | None
    short_side: int | None
    about: Mapping[str, Any]


def load_models(checkpoints: Sequence[PathLike], trust_pickle: bool, sampling: Sampling | None = None) -> Loaded:
    """Load one model, or the members of an ensemble.

    Args:
        checkpoints: each what `load_checkpoint` takes.
        trust_pickle: as there.
        sampling: the caller's, which settles what the members do not agree on.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`; or members that cannot look at the same clips, name other
            classes or were trained with another sampling, or a member given twice or as a predictions file.
    """
    names = [printable(checkpoint) for checkpoint in checkpoints]
    if len(names) > 1 and (answers := [name for name in names if name.endswith(PREDICTIONS)]):
        raise ValueError(f"{answers[0]} holds answers, an ensemble's members must be checkpoints of models")
    members = [load_checkpoint(checkpoint, trust_pickle) for checkpoint in checkpoints]
    shas, kinds = [member.sha256 for member in members], [type(member.model).__name__ for member in members]
    if len(members) == 1:
        (only,) = members
        about: dict[str, Any] = {"model": kinds[0], "checkpoint": names[0], "sha256": shas[0]}
        return Loaded(only.model, only.model.config, only.classes, only.sampling, only.short_side, about)
    config = members[0].model.config
    _agree(names, "heads", [dict(member.model.config.classes) for member in members])
    _agree(names, "frames", [member.model.config.num_frames for member in members])
    _agree(names, "pixels", [member.model.config.image_size for member in members])
    _agree(names, "short side", [member.short_side for member in members])
    if sampling is None:
        _agree(names, "sampling", _known(members, lambda member: member.sampling), "; settle it with --sampling")
    if twice := [name for number, name in enumerate(names) if shas[number] in shas[:number]]:
        raise ValueError(f"{twice[0]} is in the ensemble twice: its weights are those of another member")
    named = _known(members, lambda member: _named(member, config))
    _agree(names, "class names", named)
    known = next((member.sampling for member in members if member.sampling), None)
    about = {"model": "Ensemble", "members": kinds, "checkpoint": names, "sha256": shas}
    model, side = Ensemble([member.model for member in members]), members[0].short_side
    return Loaded(model, config, named[0], known, side, about)


def _known(members: Sequence[Checkpoint], read: Callable[[Checkpoint], Any]) -> list[Any]:
    """What the members say, and for those that say nothing what the first of the others says."""
    said = [read(member) for member in members]
    first = next((value for value in said if value is not None), None)
    return [first if value is None else value for value in said]


def _named(member: Checkpoint, config: CASTConfig) -> dict[str, list[str]] | None:
    """The member's class names, unless they are numbers."""
    return member.classes if member.classes != numbers(config.classes) else None


def _agree(names: Sequence[str], what: str, values: Sequence[Any], hint: str = "") -> None:
    other = next((number for number, value in enumerate(values) if value != values[0]), None)
    if other is not None:
        first, second = (str(value)[:120] for value in (values[0], values[other]))
        raise ValueError(
            f"the members of an ensemble must have the same {what}: {names[0]} has {first}, {names[other]} has "
            f"{second}{hint}"
        )
