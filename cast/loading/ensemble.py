"""One checkpoint, or several whose probabilities are averaged (the paper's Table 1(a), "Ensemble of experts")."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cast.baselines import Ensemble
from cast.ground.files import printable
from cast.ground.sampling import Sampling
from cast.loading.checkpoint import Checkpoint, Model, load_checkpoint
from cast.model import CAST
from cast.model.config import CASTConfig
from cast.model.labels import numbers

PathLike = str | os.PathLike[str]
#: Endings of files that contain answers instead of weights.
PREDICTIONS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Loaded:
    """A model with its sizes and heads, its class names and sampling if known, and its origin.

    The training shrank larger pictures to `short_side` pixels; None if it did not. `names` and `members` give the
    origin, one entry for each member of an ensemble. Both are empty for a model that was not loaded.
    """

    model: Model | Ensemble
    config: CASTConfig
    classes: dict[str, list[str]] | None
    sampling: Sampling | None
    short_side: int | None
    names: Sequence[str] = ()
    members: Sequence[Checkpoint] = ()

    def about(self) -> dict[str, Any]:
        """The entries for a predictions file; reads the files of the weights.

        Returns:
            `model`, `checkpoint` and `sha256`; of an ensemble lists of the latter two, and `members`.: `model`,
                `checkpoint` and `sha256`; for an ensemble also `members`, and lists of the last two.
        """
        if len(self.members) == 1:
            kind, digest = type(self.model).__name__, self.members[0].sha256
            return {"model": kind, "checkpoint": self.names[0], "sha256": digest}
        kinds = [type(member.model).__name__ for member in self.members]
        digests = [member.sha256 for member in self.members]
        return {"model": "Ensemble", "members": kinds, "checkpoint": list(self.names), "sha256": digests}


def as_loaded(model: Model | Ensemble) -> Loaded:
    """Wrap a model that the caller already has.

    Raises:
        ValueError: an ensemble whose members take other clips, or have other heads.
    """
    if isinstance(model, CAST):
        return Loaded(model, model.config, model.labels, model.sampling, model.short_side)
    if not isinstance(model, Ensemble):
        return Loaded(model, model.config, None, None, None)
    members: list[Any] = list(model.members)
    configs = [member.config for member in members]
    _same_clips([f"member {number}" for number in range(len(configs))], configs)
    return Loaded(model, configs[0], None, None, None)


def load_models(checkpoints: Sequence[PathLike], trust_pickle: bool, sampling: Sampling | None = None) -> Loaded:
    """Load one model, or the members of an ensemble.

    Args:
        checkpoints: each as `load_checkpoint` takes it.
        trust_pickle: as in `load_checkpoint`.
        sampling: chosen by the caller; needed if the members have different ones.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`; or members that take other clips, have other classes or
            were trained with another sampling; or a member given twice or as a predictions file; or no checkpoint at
            all.
        TypeError: a model instead of a path or name.
    """
    if not checkpoints:
        raise ValueError(
            "no checkpoint was given; give the path or name of one, or of several whose answers are averaged"
        )
    if made := next((one for one in checkpoints if not isinstance(one, str | os.PathLike)), None):
        raise TypeError(
            f"a checkpoint is {type(made).__name__}; a list must have paths or names: give one model by "
            "itself, or several as cast.baselines.Ensemble([...])"
        )
    names = [printable(checkpoint) for checkpoint in checkpoints]
    if len(names) > 1 and (answers := [name for name in names if name.endswith(PREDICTIONS)]):
        raise ValueError(f"{answers[0]} has answers; an ensemble's members must be checkpoints of models")
    members = [load_checkpoint(checkpoint, trust_pickle) for checkpoint in checkpoints]
    if len(members) == 1:
        (only,) = members
        return Loaded(only.model, only.model.config, only.classes, only.sampling, only.short_side, names, members)
    config = members[0].model.config
    _same_clips(names, [member.model.config for member in members])
    _agree(names, "short side", [member.short_side for member in members])
    if sampling is None:
        _agree(names, "sampling", _known(members, lambda member: member.sampling), "; settle it with --sampling")
    shas = [member.sha256 for member in members]
    if twice := [name for number, name in enumerate(names) if shas[number] in shas[:number]]:
        raise ValueError(f"{twice[0]} is in the ensemble twice: its weights are those of another member")
    named = _known(members, lambda member: _named(member, config))
    _agree(names, "class names", named)
    known = next((member.sampling for member in members if member.sampling), None)
    model, side = Ensemble([member.model for member in members]), members[0].short_side
    return Loaded(model, config, named[0], known, side, names, members)


def _same_clips(names: Sequence[str], configs: Sequence[CASTConfig]) -> None:
    """Check that the members take the same clips and have the same heads."""
    _agree(names, "heads", [dict(config.classes) for config in configs])
    _agree(names, "frames", [config.num_frames for config in configs])
    _agree(names, "pixels", [config.image_size for config in configs])


def _known(members: Sequence[Checkpoint], read: Callable[[Checkpoint], Any]) -> list[Any]:
    """One value for each member; a member without one gets the first known value."""
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
