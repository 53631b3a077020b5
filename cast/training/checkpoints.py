"""Checkpoints of the trained weights or of all weights, whole at any moment.

A checkpoint is a directory `step-<number>`:

* `weights.safetensors`: trained parameters and persistent buffers, optionally the frozen parameters too;
* `optimizer.safetensors`: AdamW's moments; `ema.safetensors`: averaged weights, if there are any;
* `engine/`: under DeepSpeed, its own files instead of `optimizer.safetensors`;
* `videos.safetensors`: a hash of every training video, 8 bytes each;
* `state.json`: the training's identity, its progress, a hash of its frozen experts, checksums of the files.

A checkpoint is written under another name, flushed and renamed. Only then are older ones removed. So a kill, a full
disk or a power cut at any point leaves this or the previous checkpoint whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from cast.training.distributed import on_main
from cast.training.ema import Average
from cast.training.files import CheckpointError, checksum, flush, read_tensors, write_tensors, write_text
from cast.training.identity import RULES
from cast.training.plain import flat
from cast.training.progress import Progress
from cast.training.tensors import (
    digest,
    frozen_names,
    read_moments,
    read_weights,
    write_moments,
    write_weights,
)

#: The weights in a checkpoint.
Weights = Literal["trainable", "full"]

_STATE, _WEIGHTS, _MOMENTS, _AVERAGE, _VIDEOS, _ENGINE = (
    "state.json",
    "weights.safetensors",
    "optimizer.safetensors",
    "ema.safetensors",
    "videos.safetensors",
    "engine",
)
_FORMAT = 1
_NAME = re.compile(r"step-\d{8}")


class Checkpoints:
    """The newest states of a training in a directory.

    Args:
        directory: has nothing else in it; all machines of a training must see it.
        accelerator: of the training.
        identity: identity of the training; a checkpoint of another one is refused.
        model: the model before accelerate prepares it; its frozen parameters are hashed.
        weights: `trainable` leaves the frozen parameters out (180 MB instead of 870 for CAST-B/16 in fp32).
        keep: number of newest checkpoints that stay.
        videos: int64 [videos], a hash of each. A checkpoint whose identity differs in `videos` only is accepted if
            these are a part of its videos, in its order.
    """

    directory: Path
    accelerator: Any
    keep: int

    def __init__(
        self,
        directory: str | os.PathLike[str],
        accelerator: Accelerator,
        identity: dict[str, Any],
        model: nn.Module,
        weights: Weights = "trainable",
        keep: int = 1,
        videos: Tensor | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must stay")
        if weights not in ("trainable", "full"):
            raise ValueError(f"weights is {weights!r}; a checkpoint holds 'trainable' or 'full' weights")
        self.directory, self.accelerator, self.keep, self.weights = Path(directory), accelerator, keep, weights
        self.videos = videos
        self.identity: Any = json.loads(json.dumps(identity))
        self._frozen = digest(model, frozen_names(model)) if accelerator.is_main_process else ""
        # attach() sets these once accelerate has prepared the model and the optimizer.
        self._model: nn.Module = model
        self._optimizer: torch.optim.Optimizer | None = None
        self._average: Average | None = None

    def attach(self, model: nn.Module, optimizer: Any, average: Average | None) -> None:
        """Take what accelerate prepared; its state is saved and loaded."""
        self._model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._average = average

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return _whole(self.directory)

    def save(self, progress: Progress) -> None:
        """Write the present state.

        Raises:
            CheckpointError: it could not be written; the previous checkpoint is whole.
        """
        tensors = {_WEIGHTS: read_weights(self._model, self.weights == "full")}
        if self._average is not None:
            tensors[_AVERAGE] = self._average.read()
        if self.videos is not None:
            tensors[_VIDEOS] = {"hashes": self.videos}
        part = self.directory / "unfinished"
        on_main(self.accelerator, lambda: shutil.rmtree(part, ignore_errors=True))
        if self._is_deepspeed:
            self._save_engine(part, progress)
        elif self._optimizer is not None:
            tensors[_MOMENTS] = read_moments(self._model, self._optimizer)
        on_main(self.accelerator, lambda: self._write(part, tensors, progress))

    def update(self, progress: Progress) -> None:
        """Write another progress into the checkpoint of `progress.step`, which exists; tensors stay.

        Raises:
            CheckpointError: it could not be written; the checkpoint is unchanged.
        """
        on_main(self.accelerator, lambda: self._update(self._place(progress), progress))

    def load(self) -> Progress | None:
        """Load the newest checkpoint into model, optimizer and average; None if there is none.

        Raises:
            ValueError: it belongs to another training, or to other frozen weights.
            CheckpointError: a file is missing or damaged, or not every process sees the same directory.
        """
        found = self._agreed_newest()
        if found is None:
            return None
        state: dict[str, Any] = on_main(self.accelerator, lambda: self._checked(found))
        write_weights(self._model, read_tensors(found / _WEIGHTS))
        self._frozen = state["frozen"]  # a full checkpoint has its own frozen weights
        if self._is_deepspeed:
            self.accelerator.load_state(str(found / _ENGINE), load_module_strict=self.weights == "full")
        elif self._optimizer is not None:
            write_moments(self._model, self._optimizer, read_tensors(found / _MOMENTS))
        if self._average is not None:
            self._average.write(read_tensors(found / _AVERAGE))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.accelerator.wait_for_everyone()
        return Progress(**state["progress"])

    @property
    def _is_deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == "DEEPSPEED")

    def _save_engine(self, part: Path, progress: Progress) -> None:
        """Write DeepSpeed's own files; every process writes a part."""
        try:
            # With this argument DeepSpeed leaves out the frozen experts.
            self.accelerator.save_state(str(part / _ENGINE), exclude_frozen_parameters=self.weights == "trainable")
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
            # Only this process raises. The others wait in DeepSpeed until the launcher ends them.
            written = sum(path.stat().st_size for path in _files(part))
            if self.accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)
            raise self._unwritten(progress, error, f"more than {written / 1e6:.0f}") from None
        self.accelerator.wait_for_everyone()  # the main process reads the others' files

    def _unwritten(self, progress: Progress, error: Exception, megabytes: str) -> CheckpointError:
        older = self.all()
        left = f"{older[-1]} is whole" if older else "There is no earlier one"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return CheckpointError(
            f"cannot write the checkpoint of step {progress.step} into {self.directory}: {reason}. {left}. A "
            f"checkpoint takes {megabytes} MB, {self.keep + 1} of them while one is written: make room, "
            "then start again with --resume"
        )

    def _write(self, part: Path, tensors: Mapping[str, Mapping[str, Tensor]], progress: Progress) -> None:
        try:
            part.mkdir(parents=True, exist_ok=True)
            for name, content in tensors.items():
                write_tensors(part / name, content, {"frozen": self._frozen, "weights": self.weights})
            for path in part.rglob("*"):  # DeepSpeed's files and folders; our tensors' files are flushed already
                flush(path)
            scaler = self.accelerator.scaler
            state = {
                "format": _FORMAT,
                "identity": self.identity,
                "frozen": self._frozen,
                "weights": self.weights,
                "progress": asdict(progress),
                "scaler": scaler.state_dict() if scaler is not None else {},
                "files": {path.relative_to(part).as_posix(): checksum(path) for path in _files(part)},
            }
            write_text(part / _STATE, json.dumps(state, indent=2) + "\n")
            flush(part)
            os.replace(part, self._place(progress))
            flush(self.directory)
        except OSError as error:
            size = sum(tensor.nbytes for content in tensors.values() for tensor in content.values())
            size += sum(path.stat().st_size for path in _files(part / _ENGINE))
            shutil.rmtree(part, ignore_errors=True)
            raise self._unwritten(progress, error, f"{size / 1e6:.0f}") from None
        for path in self.all()[: -self.keep]:
            shutil.rmtree(path)

    def _place(self, progress: Progress) -> Path:
        return self.directory / f"step-{progress.step:08d}"

    def _update(self, path: Path, progress: Progress) -> None:
        # Changes one file instead of writing a second checkpoint, because no tensor has changed. A directory with files
        # cannot be replaced in one move, so a kill in between would leave neither. One file can be: a kill leaves the
        # old state or the new one.
        part = path / f"{_STATE}.part"
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            write_text(part, json.dumps(state | {"progress": asdict(progress)}, indent=2) + "\n")
            os.replace(part, path / _STATE)
            flush(path)
        except (OSError, ValueError) as error:
            part.unlink(missing_ok=True)
            raise CheckpointError(
                f"cannot write the end of the epoch into {path}: {error}. The checkpoint itself is "
                "unchanged: make room, then start again with --resume, which validates again and repeats no step"
            ) from None

    def _agreed_newest(self) -> Path | None:
        found = self.all()
        name = found[-1].name if found else None
        main = broadcast_object_list([name])[0]
        if main != name:
            raise CheckpointError(
                f"process {self.accelerator.process_index} sees {name} in {self.directory}, the main process {main}: "
                "all machines must share this directory"
            )
        return found[-1] if found else None

    def _checked(self, path: Path) -> dict[str, Any]:
        """The state of a checkpoint, if it is whole and belongs to this training."""
        others = [str(other) for other in self.all() if other != path]
        advice = f"remove it to go on from {others[-1]}" if others else "there is no other one; start anew elsewhere"
        try:
            state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
            broken = [name for name, sum_ in state["files"].items() if checksum(path / name) != sum_]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): {advice}") from None
        if broken:
            raise CheckpointError(f"{path} is damaged: {', '.join(broken)} changed since it was written: {advice}")
        # A setting that an earlier version lacked counts as null, because null means that version's behaviour.
        theirs, ours = flat(state["identity"]), flat(self.identity)
        differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        if differing == [RULES]:
            raise ValueError(
                f"{path} was written by an earlier version, with another rule for {', '.join(ours[RULES])} "
                "(docs/training.md says which): go on with that version, or begin anew in another directory"
            )
        if differing and (differing != ["videos"] or not self._only_lost(path, state)):
            more = ". Training videos may get lost, but not be added, changed or sorted otherwise"
            raise ValueError(
                f"{path} is of another training: it has { {key: theirs.get(key) for key in differing} }, this one "
                f"{ {key: ours.get(key) for key in differing} }; give the same values, or choose another directory"
                f"{more if 'videos' in differing else ''}"
            )
        if state["weights"] == "trainable" and state["frozen"] != self._frozen:
            raise ValueError(
                f"{path} has only trained weights, and belongs to frozen weights with the hash {state['frozen']}; "
                f"this model's have {self._frozen}: load the same experts as in that training"
            )
        return state

    def _only_lost(self, path: Path, state: Mapping[str, Any]) -> bool:
        """Whether this training's videos are a part of the checkpoint's, in its order."""
        if self.videos is None or _VIDEOS not in state["files"]:
            return False
        theirs = iter(read_tensors(path / _VIDEOS)["hashes"].tolist())
        return all(video in theirs for video in self.videos.tolist())  # each search continues after the last match


def planned_videos(directory: str | os.PathLike[str]) -> int | None:
    """The number of videos at the start of the training in a directory, from its newest checkpoint; None if unknown."""
    found = _whole(Path(directory))
    try:
        return int(json.loads((found[-1] / _STATE).read_text())["identity"]["samples"]) if found else None
    except (OSError, ValueError, KeyError, TypeError):  # damaged; the later load gives a better message
        return None


def _whole(directory: Path) -> list[Path]:
    """Whole checkpoints in a directory, oldest first."""
    # Matches this name only: files found here may be deleted, and people keep copies such as step-00000500-best.
    return sorted(path for path in directory.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def _files(directory: Path) -> list[Path]:
    """Every file below a directory."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def load_trained(model: nn.Module, checkpoint: str | os.PathLike[str], average: bool = False) -> None:
    """Load a checkpoint's weights into a model with the frozen experts of its training.

    Args:
        model: of the same architecture, on any device.
        checkpoint: a directory `step-<number>`.
        average: take the averaged weights (EMA) for the parameters that have them.

    Raises:
        CheckpointError: a missing or damaged file.
        ValueError: the checkpoint belongs to other frozen weights, or has other names.
    """
    path = Path(checkpoint)
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint, or damaged: {error}") from None
    own = digest(model, frozen_names(model))
    if state["weights"] == "trainable" and state["frozen"] != own:
        raise ValueError(
            f"{path} belongs to frozen weights with the hash {state['frozen']}, the model's have {own}: "
            "load the experts that it was trained with"
        )
    tensors = read_tensors(path / _WEIGHTS)
    if average:
        tensors |= read_tensors(path / _AVERAGE)
    expected = model.state_dict().keys() - (frozen_names(model) if state["weights"] == "trainable" else set())
    if tensors.keys() != expected:
        raise ValueError(f"{path} does not fit this model: {sorted(tensors.keys() ^ expected)} are in one of them only")
    write_weights(model, tensors)
