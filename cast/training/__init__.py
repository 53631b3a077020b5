"""Training: one engine for one process or many, recipes, and checkpoints that survive a kill."""

from cast.training.checkpoints import Checkpoints, load_trained
from cast.training.engine import Engine, Plan, Source
from cast.training.files import CheckpointError
from cast.training.groups import layer_scale, parameter_groups
from cast.training.indexed import Clips, Recipe, train
from cast.training.progress import DivergenceError, Progress, Step
from cast.training.schedule import cosine

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Clips",
    "DivergenceError",
    "Engine",
    "Plan",
    "Progress",
    "Recipe",
    "Source",
    "Step",
    "cosine",
    "layer_scale",
    "load_trained",
    "parameter_groups",
    "train",
]
