"""A model as a directory, on the disk or on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn

from cast.ground.files import read_json
from cast.ground.sampling import SAMPLING, Sampling, as_json, read_sampling, read_short_side
from cast.model.config import CASTConfig, make_config
from cast.model.labels import LABELS, read_labels
from cast.model.weights.source import read_tensors

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
#: The files to download of a repository.
_PUBLISHED = [_CONFIG, _WEIGHTS, LABELS, SAMPLING, "README.md"]
#: A repository's name on the Hub.
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Shared(
    PyTorchModelHubMixin,
    library_name="cast-kernels",
    paper_url="https://arxiv.org/abs/2311.18825",
    pipeline_tag="video-classification",
    tags=["video", "action-recognition"],
):
    """`save_pretrained`, `from_pretrained` and, inherited, `push_to_hub`, for a module with a `config`.

    The directory has `config.json`, `model.safetensors` (official names), and a model card. It has `labels.json` if
    class names are known, and `sampling.json` if it is known how the training sampled frames and shrank pictures.
    """

    config: CASTConfig
    labels: dict[str, list[str]] | None
    sampling: Sampling | None
    short_side: int | None

    def save_pretrained(  # type: ignore[override]  # a model has its own configuration, the mixin takes one
        self,
        directory: str | os.PathLike[str],
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the model into a directory, made if need be.

        Args:
            directory: receives the files; they replace those of an earlier model, but a model card stays.
            config: not taken: the model's own configuration is written.
            repo_id: repository of the Hub, `owner/name`, for `push_to_hub`; the directory's name if None.
            push_to_hub: whether to publish as well.
            model_card_kwargs: for the model card's template.
            push_to_hub_kwargs: see `huggingface_hub.PyTorchModelHubMixin.push_to_hub`.

        Returns:
            The commit's address if it was published.
        """
        if config is not None:
            raise TypeError("config is not taken: the model's own configuration is written")
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        assert isinstance(self, nn.Module)
        tensors = {key: tensor.detach().contiguous() for key, tensor in self.state_dict().items()}
        # Write under other names first: a kill during the writing then leaves the old checkpoint whole.
        save_file(tensors, path / f"{_WEIGHTS}.part", metadata={"format": "pt"})
        _write(path / f"{_CONFIG}.part", self.config.to_dict())
        names, known = [_WEIGHTS, _CONFIG], {LABELS: self.labels, SAMPLING: as_json(self.sampling, self.short_side)}
        for name, value in known.items():
            if value is not None:
                _write(path / f"{name}.part", value)
                names.append(name)
        for name in names:
            os.replace(path / f"{name}.part", path / name)
        for name in known.keys() - set(names):
            (path / name).unlink(missing_ok=True)  # belongs to an earlier model with other classes or clips
        card = path / "README.md"
        if not card.exists():
            self.generate_model_card(**(model_card_kwargs or {})).save(card)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id=repo_id or path.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # only the mixin's options that have a meaning here
        cls,
        directory: str | os.PathLike[str],
        fused: bool = True,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode and in its stored dtype.

        Args:
            directory: a directory; `owner/name` that is no directory is a repository of the Hub.
            fused: whether compiled kernels may run.
            revision: of the repository; branch, tag or commit.
            token: for private repositories.
            cache_dir: where downloads are kept.
            local_files_only: whether to take only what was downloaded before.
            force_download: whether to download again.

        Raises:
            FileNotFoundError: `config.json` or `model.safetensors` is missing, or there is no such repository.
            ValueError: no JSON, or tensors that do not fit the configuration; all are listed.
            TypeError: a configuration with fields that CASTConfig does not have.
        """
        path = Path(directory)
        if is_repository(directory):
            path = download(
                os.fspath(directory),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        config = make_config(**_read_config(path))
        model = cls._holding(str(path), config, read_tensors(path / _WEIGHTS), fused)
        model.labels = read_labels(path, config.classes)
        model.sampling, model.short_side = read_sampling(path), read_short_side(path)
        return model

    @classmethod
    def _holding(cls, what: str, config: CASTConfig, tensors: Mapping[str, Tensor], fused: bool) -> Self:
        """A model made of these tensors."""
        raise NotImplementedError


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_config(path: Path) -> dict[str, Any]:
    file = path / _CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such directory; give one that save_pretrained wrote")
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json; save_pretrained writes one beside model.safetensors")
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}; expected CASTConfig's fields by name")
    if "design" in fields or "expert" in fields:
        raise ValueError(f"{file} is a baseline's, no CAST's: cast evaluate and cast.baselines.read_baseline load it")
    return fields


def is_repository(what: str | os.PathLike[str]) -> bool:
    """Whether this names a repository of the Hub, and nothing on the disk."""
    return not Path(what).exists() and bool(_REPOSITORY.fullmatch(os.fspath(what)))


def download(repository: str, **options: Any) -> Path:
    """The directory that contains the downloaded repository.

    Raises:
        FileNotFoundError: the download failed; the message says why.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=_PUBLISHED, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{repository}: no such directory, and the Hugging Face Hub gave no such model ({reason})"
        ) from None
