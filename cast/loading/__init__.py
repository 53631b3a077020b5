"""Any model from wherever it is: CAST, a baseline of its paper, or several that answer as one."""

from cast.loading.checkpoint import Checkpoint, Model, load_checkpoint
from cast.loading.ensemble import Loaded, as_loaded, load_models

__all__ = ["Checkpoint", "Loaded", "Model", "as_loaded", "load_checkpoint", "load_models"]
