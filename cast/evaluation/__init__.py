"""Test a model: the multi-view protocol, prediction files, metrics, and a report in one HTML file."""

from cast.evaluation.clips import VALIDATION, average, probabilities
from cast.evaluation.inference import Cost, Run, evaluate
from cast.evaluation.predictions import Predictions, read_predictions, write_predictions
from cast.evaluation.submission import write_submission
from cast.evaluation.summary import metrics, summarise
from cast.video.views import Protocol

__all__ = [
    "VALIDATION",
    "Cost",
    "Predictions",
    "Protocol",
    "Run",
    "average",
    "evaluate",
    "metrics",
    "probabilities",
    "read_predictions",
    "summarise",
    "write_predictions",
    "write_submission",
]
