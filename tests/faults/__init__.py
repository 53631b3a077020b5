"""All deliberate faults; `tests/mutations.py` makes them."""

from faults import kernels, operations, pipeline

FAULTS = [*kernels.FAULTS, *operations.FAULTS, *pipeline.FAULTS]
