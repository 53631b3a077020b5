"""All deliberate faults; `tests/mutations.py` makes them."""

from faults import first_contact, kernels, measuring, operations, pipeline

FAULTS = [*kernels.FAULTS, *measuring.FAULTS, *operations.FAULTS, *pipeline.FAULTS, *first_contact.FAULTS]
