"""Backend `triton`: kernels for GPUs. An op's file, such as `bcast.py`, imports `triton` only when it runs."""
