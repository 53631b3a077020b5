"""All deliberate faults; `tests/mutations.py` makes them."""

from faults import gpu_training, kernels, operations, pipeline

FAULTS = [*kernels.FAULTS, *operations.FAULTS, *pipeline.FAULTS, *gpu_training.FAULTS]
