"""CAST, the two-stream video transformer: model, weights, and the main job from an mp4 file to verb and noun."""

from importlib import import_module

from cast._moved import MOVED, keep_old_names

TYPE_CHECKING = False  # type checkers take this for true; importing typing costs milliseconds
if TYPE_CHECKING:
    from cast.model.cast import CAST, load_official_checkpoint
    from cast.model.config import VARIANTS, CASTConfig
    from cast.model.experts import SpatialExpert, TemporalExpert
    from cast.model.zoo import create_model, list_models
    from cast.predict.predictor import Predictor

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

# Imported on first use, so that `cast --help` and reading a video's frames do not load PyTorch (two seconds).
_HOMES = {
    "CAST": "cast.model.cast",
    "CASTConfig": "cast.model.config",
    "Predictor": "cast.predict.predictor",
    "SpatialExpert": "cast.model.experts",
    "TemporalExpert": "cast.model.experts",
    "VARIANTS": "cast.model.config",
    "create_model": "cast.model.zoo",
    "list_models": "cast.model.zoo",
    "load_official_checkpoint": "cast.model.cast",
}

keep_old_names()


def __getattr__(name: str) -> object:
    if f"cast.{name}" in MOVED:
        return import_module(f"cast.{name}")
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
