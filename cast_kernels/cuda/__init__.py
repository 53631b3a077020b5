"""Backend `cuda`: kernels in CUDA C++ for Hopper, in csrc/cuda. B-CAST is its own; the experts' ops run Triton's."""
