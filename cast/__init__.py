"""CAST, the two-stream video transformer: model, weights, and the main job from an mp4 file to verb and noun."""

from importlib import import_module
from typing import TYPE_CHECKING

from cast._moved import keep_old_names

if TYPE_CHECKING:
    from cast.config import VARIANTS, CASTConfig
    from cast.experts import SpatialExpert, TemporalExpert
    from cast.model import CAST, load_official_checkpoint
    from cast.predict.predictor import Predictor
    from cast.zoo import create_model, list_models

__all__ = [
    "CAST",
    "VARIANTS",
    "CASTConfig",
    "Predictor",
    "SpatialExpert",
    "TemporalExpert",
    "create_model",
    "list_models",
    "load_official_checkpoint",
]

# On first use, so that `cast --help` and reading a video's frames need not load PyTorch (two seconds).
_HOMES = {
    "CAST": "cast.model",
    "CASTConfig": "cast.config",
    "Predictor": "cast.predict.predictor",
    "SpatialExpert": "cast.experts",
    "TemporalExpert": "cast.experts",
    "VARIANTS": "cast.config",
    "create_model": "cast.zoo",
    "list_models": "cast.zoo",
    "load_official_checkpoint": "cast.model",
}

keep_old_names()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"cast.{name} needs a package that is not installed: {error}", name=error.name
        ) from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
