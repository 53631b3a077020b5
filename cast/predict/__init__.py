"""Name the action in a video, in a folder of videos, or in a stream of frames."""

from cast.model.labels import LABELS
from cast.predict.command import main
from cast.predict.guesses import Failure, Guess, Moment, Prediction, load_labels, table
from cast.predict.predictor import Decoded, Predictor, decode, predict

__all__ = [
    "LABELS",
    "Decoded",
    "Failure",
    "Guess",
    "Moment",
    "Prediction",
    "Predictor",
    "decode",
    "load_labels",
    "main",
    "predict",
    "table",
]
