"""Backend `cpu`: native C++ kernels."""
