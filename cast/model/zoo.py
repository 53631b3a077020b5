"""Published models by name. Their authors share them on Google Drive; this module downloads nothing from there."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cast.ground.renamed import renamed
from cast.ground.sampling import Sampling
from cast.model.cast import CAST, load_official_checkpoint
from cast.model.config import make_config
from cast.model.hub import download, is_repository
from cast.model.weights.source import DEEPSPEED

#: Environment variable with the directory of downloaded checkpoints.
VARIABLE = "CAST_MODELS"
_HOME = Path("~/.cache/cast")
_ENDINGS = (".pth", ".pt", ".safetensors")
_CONFIG = "config.json"
_ZOO = "https://github.com/KHU-VLL/CAST#model-zoo"


@dataclass(frozen=True)
class PublishedModel:
    """A checkpoint of the authors.

    Args:
        data: its training data.
        heads: name -> classes.
        result: top-1 accuracy in percent as the authors report it (of actions).
        url: the authors' page (README of github.com/KHU-VLL/CAST).
        variant: its sizes, a name in `cast.VARIANTS`.
        sampling: of the test's frames; 2 x 3 views with uniform sampling, 5 x 3 with dense.
    """

    data: str
    heads: dict[str, int]
    result: float
    url: str
    variant: str = "base"
    sampling: Sampling = "uniform"


def _drive(file: str) -> str:
    return f"https://drive.google.com/file/d/{file}/view"


MODELS: dict[str, PublishedModel] = {
    "cast_base_ek100": PublishedModel(
        "EPIC-KITCHENS-100", {"verb": 97, "noun": 300}, 49.3, _drive("1pW5tMWG2N5zqQOOPcrawwQpIAhPFMoVx")
    ),
    "cast_base_ssv2": PublishedModel(
        "Something-Something V2", {"action": 174}, 71.6, _drive("1RrAVF4tlpZCPYNY49M0pKQfopP6p6Vir")
    ),
    "cast_base_k400": PublishedModel(
        "Kinetics-400", {"action": 400}, 85.3, _drive("16ndsBVNjRuJMRM40P0-a3Q1JVA8tNLK7"), sampling="dense"
    ),
}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows."""
    return list(MODELS)


def create_model(
    name: str,
    pretrained: bool = True,
    directory: str | os.PathLike[str] | None = None,
    fused: bool = True,
    trust_pickle: bool = False,
    **overrides: Any,
) -> CAST:
    """A published model by its name.

    Args:
        name: one of :func:`list_models`.
        pretrained: whether with the authors' weights, from a file that you downloaded; otherwise newly initialised.
        directory: place of that file: `<name>.pth`, `.pt`, `.safetensors`, or a directory `<name>` with DeepSpeed's or
            `save_pretrained`'s files. If None, the environment variable CAST_MODELS gives it, else ~/.cache/cast.
        fused: whether compiled kernels may run.
        trust_pickle: whether a torch file may run code while it loads.
        overrides: fields of CASTConfig, for a new model.

    Raises:
        ValueError: no such name, overrides for pre-trained weights, or a file that holds another model.
        FileNotFoundError: the file is missing; the message says where it is looked for and where to get it.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no model {name!r}; {hint}There are {', '.join(MODELS)}")
    published = MODELS[name]
    if not pretrained:
        model = CAST(published.variant, fused=fused, **({"heads": published.heads} | overrides))
        model.sampling = published.sampling
        return model
    if overrides:
        raise ValueError(f"{', '.join(overrides)} cannot be set for pre-trained weights; pass pretrained=False")
    path = _find(name, published, directory)
    wanted = make_config(published.variant, heads=published.heads)
    if (path / _CONFIG).is_file():
        model = CAST.from_pretrained(path, fused)
    else:
        model = load_official_checkpoint(path, wanted.num_heads, fused, trust_pickle)
    if model.config != wanted:
        theirs, ours = model.config.to_dict(), wanted.to_dict()
        differing = ", ".join(f"{key} {theirs[key]}, not {ours[key]}" for key in ours if theirs[key] != ours[key])
        raise ValueError(f"{path} is not {name}: it has {differing}. Load it with cast.load_official_checkpoint")
    model.sampling = model.sampling or published.sampling
    return model


def locate(what: str | os.PathLike[str]) -> Path:
    """The path of a model on this disk, a file or a directory. A model that is only on the Hub is downloaded.

    Args:
        what: see :func:`load`.

    Raises:
        FileNotFoundError: the file of a published model is missing, or there is no such repository.
    """
    name, path = os.fspath(what), Path(what)
    if path.exists():
        # A training's directory contains the finished model.
        inner = path / "model"
        return inner if (inner / _CONFIG).is_file() and not (path / _CONFIG).is_file() else path
    if name in MODELS:
        return _find(name, MODELS[name], None)
    return download(name) if is_repository(name) else path


def load(what: str | os.PathLike[str], fused: bool = True, trust_pickle: bool = False) -> CAST:
    """A model from any of these sources.

    Args:
        what: a directory of `save_pretrained` or of a training, a published name, an official checkpoint's file or
            DeepSpeed directory, or `owner/name` on the Hugging Face Hub.
        fused: whether compiled kernels may run.
        trust_pickle: whether a torch file may run code while it loads.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file can't be read, or is no such model.
    """
    if os.fspath(what) in MODELS and not Path(what).exists():
        return create_model(os.fspath(what), fused=fused, trust_pickle=trust_pickle)
    path = locate(what)
    if path.is_file() or (path / DEEPSPEED).is_file():
        return load_official_checkpoint(path, fused=fused, trust_pickle=trust_pickle)
    try:
        return CAST.from_pretrained(path, fused)
    except TypeError as error:  # a configuration with unknown fields
        raise ValueError(f"{path / _CONFIG}: {error}") from None


def _find(name: str, published: PublishedModel, directory: str | os.PathLike[str] | None) -> Path:
    folder = Path(directory or os.environ.get(VARIABLE) or _HOME).expanduser()
    for path in (folder / name, *(folder / f"{name}{ending}" for ending in _ENDINGS)):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"no weights of {name}: {folder / name}.pth is not there (nor {', '.join(_ENDINGS[1:])}, nor a directory "
        f"{name}). Download the checkpoint of {published.data} from {published.url} ({_ZOO}) and save it under this "
        f"name; {VARIABLE} or directory= names another place"
    )


__getattr__: Callable[[str], object] = renamed(__name__, {"Published": "PublishedModel"})
