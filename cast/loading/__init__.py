"""Load any model: CAST, a baseline of its paper, or several models whose answers are averaged."""

from cast.loading.checkpoint import Checkpoint, Model, load_checkpoint
from cast.loading.ensemble import Loaded, as_loaded, load_models

__all__ = ["Checkpoint", "Loaded", "Model", "as_loaded", "load_checkpoint", "load_models"]
