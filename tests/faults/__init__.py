"""All deliberate faults; `tests/mutations.py` makes them."""

from faults import first_contact, kernels, operations, pipeline

FAULTS = [*kernels.FAULTS, *operations.FAULTS, *pipeline.FAULTS, *first_contact.FAULTS]
