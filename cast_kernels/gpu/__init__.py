"""What users run on a GPU: `cast-kernels gpu-check` and `tune`, and the one timer, which benchmarks/ uses too."""
