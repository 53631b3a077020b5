"""The models that the paper compares CAST with: other experts, other exchanges, and none (Tables 1, 5 and 7)."""

from cast.baselines.named import DESIGNS, SINGLES, build, is_baseline, read_baseline
from cast.baselines.single import Ensemble, SingleExpert
from cast.baselines.two_stream import Design, TwoStream

__all__ = [
    "DESIGNS",
    "SINGLES",
    "Design",
    "Ensemble",
    "SingleExpert",
    "TwoStream",
    "build",
    "is_baseline",
    "read_baseline",
]
