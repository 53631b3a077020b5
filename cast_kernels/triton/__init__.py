"""Backend `triton`: kernels for GPUs. Imports of `triton` stay inside functions of `bcast.py`, so that CPUs need none."""
