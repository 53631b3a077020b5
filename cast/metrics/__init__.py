"""Accuracies, figures by class, and comparisons of models; all in percent."""

from cast.metrics.accuracy import (
    action_accuracy,
    average_views,
    compositional_metrics,
    harmonic_mean,
    paired_accuracy,
    top_classes,
    top_k_accuracy,
    top_pairs,
)
from cast.metrics.classwise import (
    ClassF1,
    Confusion,
    class_f1,
    confusion_matrix,
    confusion_pairs,
    mean_class_accuracy,
)
from cast.metrics.compare import Paired, paired_hits, wilson_interval

__all__ = [
    "ClassF1",
    "Confusion",
    "Paired",
    "action_accuracy",
    "average_views",
    "class_f1",
    "compositional_metrics",
    "confusion_matrix",
    "confusion_pairs",
    "harmonic_mean",
    "mean_class_accuracy",
    "paired_accuracy",
    "paired_hits",
    "top_classes",
    "top_k_accuracy",
    "top_pairs",
    "wilson_interval",
]
