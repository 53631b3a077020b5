"""The model: its sizes, its layers and experts, its weights from wherever they come, and itself as a directory."""

from importlib import import_module

TYPE_CHECKING = False  # what type checkers take for true; the module typing costs milliseconds
if TYPE_CHECKING:
    from cast.model.cast import CAST, STREAM_DTYPES, TRAINABLE, load_official_checkpoint

__all__ = ["CAST", "STREAM_DTYPES", "TRAINABLE", "load_official_checkpoint"]


def __getattr__(name: str) -> object:
    """On first use: who needs the sizes or the class names alone need not load the whole model."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cast.model.cast"), name)
