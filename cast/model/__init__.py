"""The model: its sizes, layers and experts, its weights, and its directory."""

from importlib import import_module

TYPE_CHECKING = False  # type checkers take this for true; importing typing costs milliseconds
if TYPE_CHECKING:
    from cast.model.cast import CAST, STREAM_DTYPES, TRAINABLE, load_official_checkpoint

__all__ = ["CAST", "STREAM_DTYPES", "TRAINABLE", "load_official_checkpoint"]


def __getattr__(name: str) -> object:
    """Import the model on first use: a caller who needs only sizes or names of classes does not wait for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cast.model.cast"), name)
