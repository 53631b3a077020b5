"""All deliberate faults; `tests/mutations.py` makes them."""

from faults import first_contact, gpu_training, kernels, measuring, operations, pipeline

FAULTS = [
    *kernels.FAULTS, *measuring.FAULTS, *operations.FAULTS, *pipeline.FAULTS, *gpu_training.FAULTS,
    *first_contact.FAULTS,
]  # fmt: skip
