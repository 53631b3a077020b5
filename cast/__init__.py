"""CAST, the two-stream video transformer: model, weights, and the main job from an mp4 file to verb and noun."""

from cast.config import VARIANTS, CASTConfig
from cast.experts import SpatialExpert, TemporalExpert
from cast.model import CAST, load_official_checkpoint

__all__ = ["CAST", "VARIANTS", "CASTConfig", "SpatialExpert", "TemporalExpert", "load_official_checkpoint"]
