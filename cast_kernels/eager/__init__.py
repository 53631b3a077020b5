"""Backend `eager`: PyTorch's own operators, tuned; runs everywhere, differentiates twice, compiles away."""
