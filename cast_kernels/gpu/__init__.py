"""Users' commands on a GPU, `cast-kernels gpu-check` and `tune`, and their timer, which benchmarks/ uses too."""
